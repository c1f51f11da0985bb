#!/usr/bin/env python3
"""Soak the predictor's store: thousands of images, a small budget, a server that is killed.

Images of random sizes, some of them seen before, are set and clicked by several clients over gRPC
and HTTP. The pair is that of plain_pair.py, whose tensors have SAM 2.1's sizes and whose answer
shows the image, so that each one is held against the image it was asked about: two colours, one of
which no other image has, and the place of the click. One in --every is also compared with ONNX
Runtime in this process, value by value. Meanwhile the store's bytes and the memory of the
predictor's process are watched; halfway the server is killed and started again. Prints JSON; the
exit status is 1 for a wrong answer, an error, more bytes than the budget, or memory that grows.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from plain_pair import FAMILY, install_plain_pair, logits_of
from soak import free_ports
from tqdm import tqdm

from triton_sam import Retries, SAM2TritonClient, SamError, ServerUnavailableError, TransportOptions
from triton_sam.images import load_image, preprocess
from triton_sam.server import EmbeddedServer
from triton_sam.specs.predictor import predictor_model

_MODEL = predictor_model(FAMILY).name
_MAX_SIDE = 1000
# Of colours: 32 to a channel, far enough apart for JPEG.
_STEP = 8
_BITS = 5
# From here on an image has a disc beside its ground, and may be a JPEG.
_DISC_SIDE = 64
_RECENT = 8
_PATIENT = Retries(attempts=60, backoff_s=0.2, max_backoff_s=1.0)
# Until buffers and arenas are as large as they get; what is shorter is not judged.
_WARM_IMAGES = 500
_MAX_GROWTH = 0.05


@dataclass(frozen=True)
class Picture:
    """An image and a click: ``size`` is (height, width), ``ground`` and ``disc`` are RGB."""

    content: bytes | NDArray[np.uint8]
    size: tuple[int, int]
    ground: tuple[int, ...]
    disc: tuple[int, ...] | None
    point: tuple[float, float]


@dataclass
class Life:
    """What one process of the predictor showed. ``memory``: (images answered, MB) in order."""

    memory: list[tuple[int, float]] = field(default_factory=list)
    counts: dict[str, float] = field(default_factory=dict)
    most_bytes: float = 0.0

    def medians(self) -> tuple[float, float] | None:
        """MB after warming up and at the end, each of a fifth of the images; for long lives."""
        last = self.memory[-1][0] if self.memory else 0
        if last < 2 * _WARM_IMAGES:
            return None
        fifth = (last - _WARM_IMAGES) / 5
        early = [mb for n, mb in self.memory if _WARM_IMAGES <= n <= _WARM_IMAGES + fifth]
        late = [mb for n, mb in self.memory if n >= last - fifth]
        return statistics.median(early), statistics.median(late)

    def summary(self) -> dict[str, Any]:
        medians = self.medians()
        found = {"images": self.memory[-1][0] if self.memory else 0, "store": self.counts}
        if medians is None:
            return found
        growth = 100 * (medians[1] / medians[0] - 1)
        return found | {
            "memory_warm_mb": round(medians[0], 1),
            "memory_end_mb": round(medians[1], 1),
            "growth_percent": round(growth, 1),
        }


@dataclass
class Figures:
    """What came of the images.

    ``compared``: with ONNX Runtime. ``interrupted``: HTTP calls that the kill broke, which are the
    caller's to repeat, for over HTTP nothing says that the first is not still under way.
    """

    budget: int
    answered: int = 0
    repeats: int = 0
    compared: int = 0
    interrupted: int = 0
    kills: int = 0
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    lives: list[Life] = field(default_factory=list)

    def violations(self) -> list[str]:
        """What must not be, in words."""
        found = [*self.wrong, *self.errors]
        for life in self.lives:
            medians = life.medians()
            if life.most_bytes > self.budget:
                found.append(f"store_bytes was {life.most_bytes:.0f}, the budget {self.budget}")
            if medians is not None and medians[1] > (1 + _MAX_GROWTH) * medians[0]:
                found.append(f"memory grew from {medians[0]:.0f} to {medians[1]:.0f} MB")
        counts = self.lives[-1].counts
        gone = counts["store_evictions_total"] + counts["store_expired_total"]
        if counts["encodes_total"] != gone + counts["store_images"]:
            found.append(f"encoded images are neither kept nor evicted: {counts}")
        return found

    def summary(self) -> dict[str, Any]:
        shown = asdict(self) | {"lives": [life.summary() for life in self.lives]}
        most = max(life.most_bytes for life in self.lives)
        return shown | {"most_bytes": most, "violations": self.violations()}


def picture(number: int) -> Picture:
    """The image of that number, always the same. The colours of its ground are no other's."""
    rng = random.Random(number)
    width, height = (_side(rng) for _ in range(2))
    # An odd factor: neighbours differ in all channels, and all of the 15 bits are used once.
    mixed = number * 20_011 % (1 << 3 * _BITS)
    ground = tuple(_colour(mixed >> _BITS * channel) for channel in range(3))
    has_disc = min(width, height) >= _DISC_SIDE
    disc = tuple(_colour(rng.randrange(1 << _BITS)) for _ in range(3)) if has_disc else None
    image = Image.new("RGB", (width, height), ground)
    if disc is not None:
        box = (0.4 * width, 0.4 * height, 0.9 * width, 0.9 * height)
        ImageDraw.Draw(image).ellipse(box, fill=disc)
    kind = rng.choice(("array", "png", "jpeg" if has_disc else "png"))
    point = rng.uniform(0, width - 1), rng.uniform(0, height - 1)
    return Picture(_content(image, kind), (height, width), ground, disc, point)


def _side(rng: random.Random) -> int:
    """From 1 to the largest: half of them small, half of any size."""
    return rng.randint(1, _MAX_SIDE) if rng.random() < 0.5 else round(_MAX_SIDE ** rng.random())


def _colour(bits: int) -> int:
    return _STEP * (bits % (1 << _BITS)) + _STEP // 2


def _content(image: Image.Image, kind: str) -> bytes | NDArray[np.uint8]:
    if kind == "array":
        return np.asarray(image)
    data = io.BytesIO()
    if kind == "png":
        image.save(data, "PNG", compress_level=1)
    else:
        image.save(data, "JPEG", quality=95, subsampling=0)
    return data.getvalue()


def order(count: int, seed: int) -> Iterator[tuple[int, bool]]:
    """Numbers of images, and whether each is a repeat: three in twenty, half of those recent."""
    rng, made = random.Random(seed), 0
    for _ in range(count):
        if made and rng.random() < 0.15:
            first = max(0, made - _RECENT) if rng.random() < 0.5 else 0
            yield rng.randrange(first, made), True
        else:
            yield made, False
            made += 1


class Pair:
    """The pair in ONNX Runtime, in this process: what the server has to answer."""

    def __init__(self, repository: Path) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        self._encoder, self._decoder = (
            ort.InferenceSession(repository / model.name / "1" / model.file, options)
            for model in FAMILY.models
        )

    def answer(self, asked: Picture) -> list[NDArray[np.float32]]:
        """Logits and scores, of one prompt."""
        pixels = preprocess(load_image(asked.content), FAMILY.image)
        names = [output.name for output in FAMILY.encoder.outputs]
        features = dict(zip(names, self._encoder.run(names, {"image": pixels}), strict=True))
        scale = FAMILY.image.size / np.array(asked.size[::-1])
        prompt = {
            "point_coords": (np.array([[asked.point]]) * scale).astype(np.float32),
            "point_labels": np.ones((1, 1), np.float32),
            "multimask_output": np.ones(1, np.float32),
        }
        found: list[NDArray[np.float32]] = self._decoder.run(
            [FAMILY.masks, FAMILY.scores], features | prompt
        )
        return found


class Soak:
    """Clients that share the images out among them, and a watch over the server."""

    def __init__(
        self, server: EmbeddedServer, pair: Pair, budget: int, images: int, every: int, seed: int
    ) -> None:
        self.figures = Figures(budget)
        self._server, self._pair = server, pair
        self._images, self._every = images, every
        self._order = enumerate(order(images, seed))
        self._lock = threading.Lock()
        self._restarting = threading.Event()
        self._over = threading.Event()
        self._bar = tqdm(total=images, unit="image", mininterval=2, disable=None)

    def run(self, clients: int) -> Figures:
        """Set and click all images; every fourth client over HTTP."""
        urls = [self._server.url, f"http://{self._server.http_url}"]
        workers = [
            threading.Thread(target=self._client, args=(urls[n % 4 == 3],)) for n in range(clients)
        ]
        watch = threading.Thread(target=self._watch)
        for thread in (watch, *workers):
            thread.start()
        while any(worker.is_alive() for worker in workers):
            if not self.figures.kills and self.figures.answered >= self._images // 2:
                self._restart()
            time.sleep(0.05)
        time.sleep(1.5)  # the page of metrics is up to a second behind
        self._over.set()
        watch.join()
        self._bar.close()
        return self.figures

    def _client(self, url: str) -> None:
        options = TransportOptions(timeout_s=120, retries=_PATIENT)
        with SAM2TritonClient(url, options=options, embedding="server") as client:
            while (turn := self._next()) is not None:
                index, (number, repeated) = turn
                asked = picture(number)
                try:
                    answer = self._ask(client, asked, url.startswith("http"))
                    problem = self._problem(asked, answer, index % self._every == 0)
                except SamError as exc:
                    problem = ""
                    self.figures.errors.append(f"image {number}: {type(exc).__name__}: {exc}")
                if problem:
                    self.figures.wrong.append(f"image {number} of {asked.size}: {problem}")
                with self._lock:
                    self.figures.answered += 1
                    self.figures.repeats += repeated
                    self._bar.update()

    def _next(self) -> tuple[int, tuple[int, bool]] | None:
        with self._lock:
            return next(self._order, None)

    def _ask(
        self, client: SAM2TritonClient, asked: Picture, over_http: bool
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        while True:
            try:
                client.set_image(asked.content)
                return client.predict([asked.point], [1], multimask_output=True)
            except ServerUnavailableError:
                if not (over_http and self._restarting.is_set()):
                    raise
                with self._lock:
                    self.figures.interrupted += 1
                time.sleep(0.2)

    def _problem(self, asked: Picture, answer: tuple[NDArray[np.float32], ...], fully: bool) -> str:
        """What is wrong about an answer; nothing if it is that of the image and the click."""
        logits, scores = answer
        height, width = asked.size
        near = logits_of(_STEP // 2) - logits_of(0)
        corner = np.abs(logits[0, :, :8, :8] - logits_of(asked.ground)[:, None, None])
        if corner.max() >= near:
            return f"its ground is not {asked.ground}"
        if asked.disc is not None:
            middle = np.abs(logits[0, :, 160:172, 160:172] - logits_of(asked.disc)[:, None, None])
            if middle.max() >= near:
                return f"its disc is not {asked.disc}"
        place = np.array([asked.point[0] / width, asked.point[1] / height, 1])
        if np.abs(scores[0] - place).max() > 1e-5:
            return f"the click was at {place}, and answered as {scores[0]}"
        if fully:
            expected = self._pair.answer(asked)
            with self._lock:
                self.figures.compared += 1
            for got, wanted in zip(answer, expected, strict=True):
                if np.abs(got - wanted).max() > 1e-4:
                    return f"differs from ONNX Runtime by {np.abs(got - wanted).max()}"
        return ""

    def _restart(self) -> None:
        assert self._server.pid is not None
        self._restarting.set()
        os.kill(self._server.pid, signal.SIGKILL)
        while self._server.running:
            time.sleep(0.05)
        self._server.start()
        self.figures.kills += 1
        time.sleep(2)  # what was broken says so within this time
        self._restarting.clear()

    def _watch(self) -> None:
        known: int | None = None
        start = 0
        while not self._over.wait(0.25):
            pid = _stub(self._server.pid)
            if pid is None:
                continue
            if pid != known:
                known, start = pid, self.figures.answered
                self.figures.lives.append(Life())
            life = self.figures.lives[-1]
            try:
                life.memory.append((self.figures.answered - start, _memory_mb(pid)))
                life.counts = read_metrics(self._server.metrics_url) or life.counts
            except OSError:
                continue  # it was just killed, or does not listen yet
            life.most_bytes = max(life.most_bytes, life.counts.get("store_bytes", 0))


def _stub(server: int | None) -> int | None:
    """The process that runs the predictor: a child of Triton's."""
    children = Path(f"/proc/{server}/task/{server}/children")
    try:
        threads = children.parent.parent.glob("*/children")
        pids = [int(pid) for thread in threads for pid in thread.read_text().split()]
        named = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().decode() for pid in pids}
    except OSError:
        return None
    return next((pid for pid, words in named.items() if f"{_MODEL}_0_0" in words), None)


def _memory_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def read_metrics(url: str) -> dict[str, float]:
    """The predictor's counts by name, without the common prefix."""
    with urllib.request.urlopen(url, timeout=5) as page:
        found = re.findall(
            rf'^triton_sam_(\w+){{device="cpu",model="{_MODEL}"}} (\S+)$',
            page.read().decode(),
            re.M,
        )
    return {name: float(value) for name, value in found}


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def soak(
    images: int, clients: int = 4, every: int = 25, budget_mb: int = 200, seed: int = 0
) -> Figures:
    """Run it on an embedded server that keeps its addresses when it is started again."""
    http, grpc, metrics = free_ports(3)
    with (
        tempfile.TemporaryDirectory() as folder,
        _environment(TRITON_SAM_STORE_MB=str(budget_mb)),
    ):
        repository = Path(folder)
        install_plain_pair(repository)
        with EmbeddedServer(
            repository, http_port=http, grpc_port=grpc, metrics_port=metrics, quiet=True
        ) as server:
            budget = budget_mb * 1_000_000
            return Soak(server, Pair(repository), budget, images, every, seed).run(clients)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, soak and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=4, help="every fourth one over HTTP")
    parser.add_argument("--every", type=int, default=25, help="how many to a full comparison")
    parser.add_argument("--budget-mb", type=int, default=200, help="of the store")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    figures = soak(args.images, args.clients, args.every, args.budget_mb, args.seed)
    print(json.dumps(figures.summary(), indent=2))
    return 1 if figures.violations() else 0


if __name__ == "__main__":
    sys.exit(main())
