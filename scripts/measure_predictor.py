#!/usr/bin/env python3
"""Measure what keeping embeddings on the server is for, each figure beside its reference.

Starts an embedded server on --repository, or on the demo model, and prints JSON. Times are in
milliseconds. What is compared is measured in turns, in one run. Measure on a machine that does
nothing else.

  set_image   a 12-megapixel JPEG: on the server, and decoded, resized and encoded in this process;
              the same file again
  encoding    a click alone, and while another client has image after image encoded
  behind      a click behind 50 hovers of others that wait already
  steady      clicks at a steady pace: their median and 99th percentile
  together    8 clients on 8 images, and the decoder alone in this process; 8 prompts about one
              image in one call, and one by one
"""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from triton_sam import AsyncSAM2TritonClient, SAM2TritonClient
from triton_sam.benchmark.workloads import photo
from triton_sam.demo import demo_repository
from triton_sam.export.parity import OnnxRuntimeTransport
from triton_sam.predictor.jobs import Priority
from triton_sam.prompts import Prompt
from triton_sam.protocol import Call
from triton_sam.server import EmbeddedServer
from triton_sam.server_embedding import ServerEmbedding, click_call
from triton_sam.specs import Family, family
from triton_sam.transport import open_async_transport

Figures = dict[str, float]
_POINT: dict[str, Any] = {"point_coords": [[300, 168]], "point_labels": [1]}


def main() -> None:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repository", type=Path, help="what the embedded server serves")
    parser.add_argument("--model-type", default="sam2")
    parser.add_argument("--only", nargs="+", choices=_MEASURES, default=list(_MEASURES))
    parser.add_argument("--calls", type=int, default=2000, help="of steady")
    args = parser.parse_args()
    root, spec = args.repository or demo_repository(), family(args.model_type)
    with EmbeddedServer(root) as server:
        bench = _Bench(server, root, spec, args.calls)
        found = {name: _MEASURES[name](bench) for name in args.only}
    print(json.dumps(found, indent=2))


class _Bench:
    """A server, and the same files in this process."""

    def __init__(self, server: EmbeddedServer, root: Path, spec: Family, calls: int) -> None:
        self.server, self.family, self.calls = server, spec, calls
        self.files = {m.name: root / m.name / "1" / m.file for m in spec.models}
        self.local = SAM2TritonClient(
            transport=OnnxRuntimeTransport(self.files), model_type=spec.name, embedding="client"
        )

    def client(self) -> SAM2TritonClient:
        return SAM2TritonClient(self.server.url, self.family.name, embedding="server")


def set_image(bench: _Bench) -> Figures:
    """Each round encodes a file that nobody has sent."""
    large = photo(12)
    seconds: dict[str, list[float]] = {"server": [], "in process": [], "again": []}
    with bench.client() as client:
        for turn in range(-1, 8):
            file = large.jpeg(turn)
            took = {
                "server": _seconds(partial(client.set_image, file)),
                "in process": _seconds(partial(bench.local.set_image, file)),
                "again": _seconds(partial(client.set_image, file)),
            }
            for name, value in took.items():
                seconds[name] += [value] if turn >= 0 else []
    found = {f"{name} p50": _ms(values, 50) for name, values in seconds.items()}
    return found | {"ratio": found["server p50"] / found["in process p50"]}


def encoding(bench: _Bench) -> Figures:
    """The other client sends one new photo after the other."""
    small, stop, encoded = photo(1), threading.Event(), [0]

    def encode() -> None:
        with bench.client() as other:
            while not stop.is_set():
                encoded[0] += 1
                other.set_image(small.jpeg(encoded[0]))

    with bench.client() as client:
        client.set_image(small.jpeg(-5))
        alone = _repeated(lambda: client.predict(**_POINT), 60)
        thread = threading.Thread(target=encode)
        thread.start()
        time.sleep(1)
        meanwhile = _repeated(lambda: client.predict(**_POINT), 100, pause_s=0.05)
        stop.set()
        thread.join()
    found = {"alone p50": _ms(alone, 50), "meanwhile p50": _ms(meanwhile, 50)}
    found |= {"meanwhile p99": _ms(meanwhile, 99), "images encoded": encoded[0]}
    return found | {"ratio": found["meanwhile p50"] / found["alone p50"]}


def behind(bench: _Bench) -> Figures:
    """The hovers are with the server before the click is sent."""

    async def measure() -> Figures:
        way = open_async_transport(bench.server.url)
        async with AsyncSAM2TritonClient(bench.server.url, bench.family.name) as client:
            small = photo(1)
            images = [await client.encode(small.jpeg(i)) for i in range(4)]
            alone = [
                await _async_seconds(client.predict(**_POINT, embedding=images[0]))
                for _ in range(40)
            ]
            waits = []
            for _ in range(10):
                calls = [_hover_call(bench.family, images[1 + i % 3], i) for i in range(50)]
                hovers = [asyncio.create_task(way.infer(call)) for call in calls]
                await asyncio.sleep(0.05)
                waits.append(await _async_seconds(client.predict(**_POINT, embedding=images[0])))
                for hover in hovers:
                    hover.cancel()
                await asyncio.gather(*hovers, return_exceptions=True)
        await way.close()
        found = {"alone p50": _ms(alone, 50), "behind 50 hovers p50": _ms(waits, 50)}
        found["behind 50 hovers worst"] = _ms(waits, 100)
        return found | {"ratio": found["behind 50 hovers p50"] / found["alone p50"]}

    return asyncio.run(measure())


def steady(bench: _Bench) -> Figures:
    """15 clicks a second: far from what the server can do, so that none should wait."""
    with bench.client() as client:
        client.set_image(photo(1).jpeg(0))
        _repeated(lambda: client.predict(**_POINT), 20)
        begun, seconds = time.perf_counter(), []
        for number in range(bench.calls):
            time.sleep(max(0.0, begun + number / 15 - time.perf_counter()))
            seconds.append(_seconds(lambda: client.predict(**_POINT)))
    found = {"p50": _ms(seconds, 50), "p99": _ms(seconds, 99), "calls": len(seconds)}
    return found | {"ratio": found["p99"] / found["p50"]}


def together(bench: _Bench, seconds: float = 8.0) -> Figures:
    """Masks a second."""
    small = photo(1)
    clients = [bench.client() for _ in range(8)]
    for number, client in enumerate(clients):
        client.set_image(small.jpeg(number))
    one = clients[0]
    bench.local.set_image(small.jpeg(0))
    many = np.random.default_rng(0).uniform(50, 600, (8, 1, 2))
    labels = np.ones((8, 1))
    rates: dict[str, list[float]] = {name: [] for name in ("clients", "local", "eight", "single")}
    for _ in range(4):
        rates["clients"].append(_rate([partial(c.predict, **_POINT) for c in clients], seconds))
        rates["local"].append(_rate([lambda: bench.local.predict(**_POINT)], seconds / 2))
        rates["eight"].append(8 * _rate([lambda: one.predict(many, labels)], seconds / 2))
        rates["single"].append(_rate([lambda: one.predict(**_POINT)], seconds / 2))
    for client in clients:
        client.close()
    found = {name: round(float(np.median(values)), 2) for name, values in rates.items()}
    return found | {
        "8 clients to the decoder in process": found["clients"] / found["local"],
        "8 prompts in a call to one by one": found["eight"] / found["single"],
    }


_MEASURES: dict[str, Callable[[_Bench], Figures]] = {
    "set_image": set_image,
    "encoding": encoding,
    "behind": behind,
    "steady": steady,
    "together": together,
}


def _hover_call(spec: Family, image: Any, number: int) -> Call:
    assert isinstance(image, ServerEmbedding)
    prompt = Prompt.create(
        [[100 + 5 * number, 200]], [1], original_size=image.original_size, layout=spec.prompts
    )
    return click_call(spec, image, prompt, Priority.HOVER)


def _rate(asks: list[Callable[[], object]], seconds: float) -> float:
    """Answers a second of threads that each ask again at once."""
    end, counts = time.perf_counter() + seconds, [0] * len(asks)

    def work(index: int) -> None:
        while time.perf_counter() < end:
            asks[index]()
            counts[index] += 1

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(asks))]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - begun)


def _repeated(action: Callable[[], object], count: int, pause_s: float = 0.0) -> list[float]:
    found = []
    for _ in range(count):
        found.append(_seconds(action))
        time.sleep(pause_s)
    return found


def _seconds(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


async def _async_seconds(waited: Any) -> float:
    begun = time.perf_counter()
    await waited
    return time.perf_counter() - begun


def _ms(seconds: list[float], percentile: float) -> float:
    return round(1e3 * float(np.percentile(seconds, percentile)), 2)


if __name__ == "__main__":
    main()
