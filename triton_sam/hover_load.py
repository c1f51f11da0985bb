"""Many pointers at once: whether each ends with the mask of its last position, and when."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from .core import Masks, Where
from .embedding import Embedding
from .hover import Hover, HoverResult
from .speculative_client import SpeculativeSAM2Client

_IMAGE_SIZE = (480, 640)
_LEAST = 3

Open = Callable[[], SpeculativeSAM2Client]


@dataclass(frozen=True)
class HoverLoad:
    """What was measured; times in milliseconds.

    ``requested``: positions of all pointers; ``sent``: of these, requests to the server.
    ``right``: sessions whose last result is the mask of their last position. ``settle_ms``: from
    the last position to its mask, median over the strokes of all sessions. ``single_p50_ms``: of
    one more pointer that asks for one position at a time under the same load, ``singles`` of them.
    ``click_p50_ms`` and ``click_p99_ms``: a click from one more client, which a predictor answers
    before hovers; ``clicks`` of them. Of singles and clicks those count that ended while the
    pointers moved.
    """

    sessions: int
    requested: int
    sent: int
    failed: int
    right: int
    settle_ms: float
    singles: int
    single_p50_ms: float
    clicks: int
    click_p50_ms: float
    click_p99_ms: float

    @property
    def settle_ratio(self) -> float:
        """``settle_ms`` in single decodes under the same load; at most 2 is wanted."""
        return self.settle_ms / self.single_p50_ms

    @property
    def tail_ratio(self) -> float:
        """p99 of a click in p50; more than 3 says that requests wait while the server idles."""
        return self.click_p99_ms / self.click_p50_ms


async def measure_hover_load(
    url: str,
    model_type: str = "sam2",
    *,
    sessions: int = 20,
    hovers: int = 50,
    rate_hz: float = 60.0,
    strokes: int = 1,
    embedding: Where = "auto",
) -> HoverLoad:
    """Move ``sessions`` pointers over an image of noise, ``hovers`` positions at ``rate_hz`` each.

    ``strokes``: how often at least; after each the pointers rest until they have their masks, and
    they go on until there are three singles and three clicks. ``embedding``: where it is kept.
    Raises what the client raises.
    """
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (*_IMAGE_SIZE, 3), dtype=np.uint8)
    open_client = partial(SpeculativeSAM2Client, url, model_type, embedding=embedding)
    async with open_client() as client:
        image = await client.encode(noise)
        paths = [_path(rng, hovers * strokes) for _ in range(sessions)]
        await client.predict([paths[0][0]], [1], embedding=image)  # the first one is slow
        over = asyncio.Event()
        clicks: list[float] = []
        singles: list[float] = []
        clicking = asyncio.create_task(_click(open_client, image, over, clicks))
        pointing = asyncio.create_task(_point(open_client, image, over, singles))

        def enough() -> bool:
            # One that has ended before its time has failed, and says so below.
            failed = clicking.done() or pointing.done()
            return failed or min(len(clicks), len(singles)) >= _LEAST

        pointers = [_Pointer(client, image, path, hovers, rate_hz) for path in paths]
        try:
            await asyncio.gather(*(pointer.run(enough) for pointer in pointers))
        finally:
            over.set()
            await asyncio.gather(clicking, pointing)
        right = [await _is_right(client, image, pointer) for pointer in pointers]
    statuses = [pointer.hover.status for pointer in pointers]
    return HoverLoad(
        sessions=sessions,
        requested=sum(status.queued for status in statuses),
        sent=sum(status.sent for status in statuses),
        failed=sum(status.failed for status in statuses),
        right=sum(right),
        settle_ms=1e3 * float(np.median([s for pointer in pointers for s in pointer.settled_s])),
        singles=len(singles),
        single_p50_ms=1e3 * float(np.percentile(singles, 50)),
        clicks=len(clicks),
        click_p50_ms=1e3 * float(np.percentile(clicks, 50)),
        click_p99_ms=1e3 * float(np.percentile(clicks, 99)),
    )


class _Pointer:
    """One session: strokes of a pointer, and how long the last mask of each took."""

    def __init__(
        self,
        client: SpeculativeSAM2Client,
        image: Embedding,
        path: Sequence[tuple[float, float]],
        hovers: int,
        rate_hz: float,
    ) -> None:
        self.hover: Hover = client.hover(image)
        self.path = path
        self.settled_s: list[float] = []
        self.last: HoverResult | None = None
        self._hovers = hovers
        self._period_s = 1 / rate_hz

    async def run(self, enough: Callable[[], bool]) -> None:
        """All strokes, and all of them again until there is enough of what is measured."""
        async with self.hover as hover:
            for start in itertools.cycle(range(0, len(self.path), self._hovers)):
                await self._stroke(hover, self.path[start : start + self._hovers])
                if start + self._hovers >= len(self.path) and enough():
                    return

    async def _stroke(self, hover: Hover, positions: Sequence[tuple[float, float]]) -> None:
        # By the clock, not by pauses: a busy event loop must not slow the pointer down.
        begun = time.perf_counter()
        for number, (x, y) in enumerate(positions):
            await asyncio.sleep(max(0, begun + number * self._period_s - time.perf_counter()))
            hover.move(x, y)
        moved = time.perf_counter()
        self.last = await hover.settled()
        self.settled_s.append(time.perf_counter() - moved)


async def _click(
    open_client: Open, image: Embedding, over: asyncio.Event, seconds: list[float]
) -> None:
    """Clicks, one after the other, until it is over; appends what each took to ``seconds``."""
    async with open_client() as client:
        while not over.is_set():
            begun = time.perf_counter()
            await client.predict([[100, 100]], [1], embedding=image)
            _append(seconds, begun, over)


async def _point(
    open_client: Open, image: Embedding, over: asyncio.Event, seconds: list[float]
) -> None:
    """A pointer's single positions, each after the last one's mask; likewise."""
    async with open_client() as client, client.hover(image) as hover:
        while not over.is_set():
            begun = time.perf_counter()
            hover.move(100, 100)
            await hover.settled()
            _append(seconds, begun, over)


def _append(seconds: list[float], begun: float, over: asyncio.Event) -> None:
    if not over.is_set():  # the load has gone while the others waited
        seconds.append(time.perf_counter() - begun)


async def _is_right(client: SpeculativeSAM2Client, image: Embedding, pointer: _Pointer) -> bool:
    if pointer.last is None or (pointer.last.x, pointer.last.y) != pointer.path[-1]:
        return False
    expected: Masks = await client.predict([pointer.path[-1]], [1], embedding=image)
    return _same(pointer.last.masks, expected[0])


def _same(masks: NDArray[np.float32], expected: NDArray[np.float32]) -> bool:
    # A graphics processor's answers may differ in the last bits from one time to the next.
    return bool(np.allclose(masks, expected, atol=1e-3 * float(np.abs(expected).max())))


def _path(rng: np.random.Generator, count: int) -> list[tuple[float, float]]:
    """A straight line of positions over the image, in pixels."""
    height, width = _IMAGE_SIZE
    (x1, y1), (x2, y2) = rng.uniform(0.05, 0.95, (2, 2))
    xs = np.linspace(x1, x2, count) * width
    ys = np.linspace(y1, y2, count) * height
    return [(float(x), float(y)) for x, y in zip(xs, ys, strict=True)]
