"""A server that speaks just enough KServe v2 for the client, with latencies that are known.

Run as a program, so that it has an interpreter of its own: its waiting must not take part in what
is measured. It prints its port; ``--latencies`` are the milliseconds of the decoder's answers, one
after the other and then from the beginning, counted from when the request's first byte was read.
"""

from __future__ import annotations

import argparse
import http.server
import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from triton_sam.specs import FAMILIES, Model

FAMILY = FAMILIES["sam2"]
# Only the one feature that a decoder cannot do without: less to send with each click.
ENCODER = Model(FAMILY.encoder.name, FAMILY.encoder.inputs, FAMILY.encoder.outputs[:1])
DECODER = Model(FAMILY.decoder.name, FAMILY.decoder.inputs[:3], FAMILY.decoder.outputs)
MODELS = {model.name: model for model in (ENCODER, DECODER)}
_SPIN_S = 0.0005


class Stub(http.server.ThreadingHTTPServer):
    """What the requests share: the schedule, the counters, a stall."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, latencies_s: Sequence[float], stall: tuple[int, float]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.latencies = itertools.cycle(latencies_s)
        self.stall_at, self.stall_s = stall
        self.counts = dict.fromkeys(MODELS, 0)
        self.nanoseconds = dict.fromkeys(MODELS, 0)
        self.lock = threading.Lock()
        self.instance = threading.Lock()  # one request is executed at a time, the others queue

    def wait(self, model: str, started: float) -> None:
        """Return when the answer of ``model`` is due."""
        if model == DECODER.name:
            queued = not self.instance.acquire(blocking=False)
            if queued:
                self.instance.acquire()
            begun = time.perf_counter() if queued else started
            stall = self.stall_s if self.counts[model] == self.stall_at else 0.0
            sleep_until(begun + next(self.latencies) + stall)
            self.instance.release()
        with self.lock:
            self.counts[model] += 1
            self.nanoseconds[model] += round((time.perf_counter() - started) * 1e9)

    def statistics(self) -> dict[str, Any]:
        def of(name: str) -> dict[str, Any]:
            spent = {"count": self.counts[name], "ns": self.nanoseconds[name]}
            none = {"count": self.counts[name], "ns": 0}
            stats = {"success": spent, "fail": none, "queue": none, "compute_input": none}
            stats |= {"compute_infer": spent, "compute_output": none}
            return {"name": name, "execution_count": self.counts[name], "inference_stats": stats}

        with self.lock:
            return {"model_stats": [of(name) for name in MODELS]}


def sleep_until(moment: float) -> None:
    """Sleep, and spin for the last bit, which a sleep would miss."""
    left = moment - time.perf_counter() - _SPIN_S
    if left > 0:
        time.sleep(left)
    while time.perf_counter() < moment:
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Stub

    def do_GET(self) -> None:
        parts = self.path.strip("/").split("/")
        if parts == ["v2", "models", "stats"]:
            return self.say(self.server.statistics())
        if parts[2] not in MODELS:
            unknown = f"Request for unknown model: '{parts[2]}' is not found"
            return self.say({"error": unknown}, status=400)
        model = MODELS[parts[2]]
        if parts[3:] == ["ready"]:
            return self.say({})
        tensors = {"inputs": model.inputs, "outputs": model.outputs}
        return self.say({kind: [{"name": t.name} for t in ts] for kind, ts in tensors.items()})

    def do_POST(self) -> None:
        started = time.perf_counter()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        name = self.path.split("/")[3]
        asked = json.loads(body[: int(self.headers["Inference-Header-Content-Length"])])
        shapes = {tensor["name"]: tensor["shape"] for tensor in asked["inputs"]}
        answer = self.answer(MODELS[name], asked, shapes)
        self.server.wait(name, started)
        self.send(*answer)

    def answer(self, model: Model, asked: Any, shapes: Any) -> tuple[bytes, int]:
        """Zeros of the right shapes, for as many prompts as there were."""
        prompts = shapes.get("point_coords", [1])[0]
        blobs, outputs = [], []
        for wanted in asked["outputs"]:
            dims = model.output(wanted["name"]).dims
            shape = [prompts, *(1 if length == -1 else length for length in dims[1:])]
            blobs.append(np.zeros(shape, np.float32).tobytes())
            size = {"binary_data_size": len(blobs[-1])}
            outputs.append(
                {"name": wanted["name"], "datatype": "FP32", "shape": shape, "parameters": size}
            )
        head = json.dumps({"outputs": outputs}).encode()
        return head + b"".join(blobs), len(head)

    def say(self, content: Any, status: int = 200) -> None:
        self.send(json.dumps(content).encode(), status=status)

    def send(self, body: bytes, header: int | None = None, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if header is not None:
            self.send_header("Inference-Header-Content-Length", str(header))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def running(latencies_ms: Sequence[float], stall: tuple[int, float] = (-1, 0.0)) -> Iterator[str]:
    """A stub with these latencies; gives its URL.

    ``stall``: (which of the decoder's requests, seconds that it takes longer).
    """
    command = [sys.executable, str(Path(__file__).resolve()), "--latencies"]
    command += [*map(str, latencies_ms), "--stall", *map(str, stall)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--latencies", type=float, nargs="+", required=True)
    parser.add_argument("--stall", type=float, nargs=2, required=True)
    args = parser.parse_args()
    stall = int(args.stall[0]), args.stall[1]
    with Stub([value / 1e3 for value in args.latencies], stall) as stub:
        print(stub.server_address[1], flush=True)
        stub.serve_forever()


if __name__ == "__main__":
    main()
