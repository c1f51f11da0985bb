"""A server that is a function: transports behind the real clients."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from triton_sam.errors import ModelNotReadyError
from triton_sam.images import load_image, preprocess
from triton_sam.protocol import Arrays, Call, Served
from triton_sam.specs import Family

Answer = Callable[[Call], Arrays]


def f32(values: ArrayLike) -> NDArray[np.float32]:
    return np.asarray(values, np.float32)


class FakeTransport:
    """Answers calls with a function and keeps them."""

    def __init__(self, family: Family, answer: Answer) -> None:
        self.answer = answer
        self.calls: list[Call] = []
        self.asked: list[str] = []
        self.timeouts: list[float | None] = []
        self.not_ready: list[Exception] = []
        self.closed = 0
        self.models = {
            model.name: Served(
                frozenset(t.name for t in model.inputs), frozenset(t.name for t in model.outputs)
            )
            for model in family.models
        }

    def infer(self, call: Call, timeout_s: float | None = None) -> Arrays:
        self.timeouts.append(timeout_s)
        self.calls.append(call)
        return self.answer(call)

    def served(self, model: str, timeout_s: float | None = None) -> Served:
        if model not in self.models:
            raise ModelNotReadyError(f"There is no {model!r}.")
        self.asked.append(model)
        return self.models[model]

    def check_ready(self, models: Sequence[str], timeout_s: float | None = None) -> None:
        if list(models) != list(self.models):
            raise ModelNotReadyError(f"There is no {models!r}.")
        if self.not_ready:
            raise self.not_ready.pop(0)

    def close(self) -> None:
        self.closed += 1


def answer(family: Family, call: Call) -> Arrays:
    """An encoder that says the mean of the image; a decoder whose mask is a disc at the point."""
    if call.model == family.encoder.name:
        pixels = call.inputs[family.encoder.inputs[0].name]
        return {
            tensor.name: np.full([abs(n) for n in tensor.dims], pixels.mean(), np.float32)
            for tensor in family.encoder.outputs
            if tensor.name in call.outputs
        }
    layout, side = family.prompts, family.prompts.mask_size
    given = [call.inputs[name] for name in (layout.points, layout.boxes) if name is not None]
    points = np.concatenate([f32(array).reshape(len(array), -1, 2) for array in given], axis=1)
    points *= f32(side / family.image.size)
    always_three = family.decoder.output(family.scores).dims[-1] == 3
    masks = 3 if always_three or layout.multimask in call.inputs else 1
    y, x = np.mgrid[:side, :side] + 0.5
    discs = [60 - 3 * np.hypot(x - px, y - py) for px, py in points[:, 0]]
    logits = np.repeat(np.stack(discs)[:, None], masks, axis=1).astype(np.float32)
    scores = np.tile(np.linspace(0.5, 0.9, masks, dtype=np.float32), (len(points), 1))
    if layout.group_axis:
        logits, scores = logits[:, None], scores[:, None]
    return {family.masks: logits, family.scores: scores}


def mean(image: NDArray[np.uint8], family: Family) -> float:
    """What the encoder above says of an image."""
    return float(preprocess(load_image(image), family.image).mean())


def photo(width: int = 400, height: int = 300, seed: int = 0) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run an async test; it leaves no task behind."""

    async def checked() -> None:
        await asyncio.wait_for(test(), 30)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(checked())


async def turns(count: int = 20) -> None:
    """Let the event loop go on."""
    for _ in range(count):
        await asyncio.sleep(0)


class GatedTransport:
    """An async server that carries out one decode, in order of arrival, for each ``let()``."""

    def __init__(self, family: Family, cancels_on_server: bool = False) -> None:
        self.cancels_on_server = cancels_on_server
        self.fake = FakeTransport(family, lambda call: answer(family, call))
        self.family = family
        self.started: list[tuple[float, ...]] = []
        self.cancelled: list[tuple[float, ...]] = []
        self.at_once = self.most_at_once = 0
        self.failing: Exception | None = None
        self._gate = asyncio.Semaphore(0)

    def let(self, count: int = 1) -> None:
        for _ in range(count):
            self._gate.release()

    async def infer(self, call: Call, timeout_s: float | None = None) -> Arrays:
        if call.model == self.family.encoder.name:
            return self.fake.infer(call)
        place = self._place(call)
        self.started.append(place)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await self._gate.acquire()
        except asyncio.CancelledError:
            self.cancelled.append(place)
            raise
        finally:
            self.at_once -= 1
        if self.failing is not None:
            raise self.failing
        return self.fake.infer(call)

    async def served(self, model: str, timeout_s: float | None = None) -> Served:
        return self.fake.served(model)

    async def check_ready(self, models: Sequence[str], timeout_s: float | None = None) -> None:
        self.fake.check_ready(models)

    async def close(self) -> None:
        self.fake.close()

    def _place(self, call: Call) -> tuple[float, ...]:
        """The last point that is asked for, in the encoder's frame."""
        points = f32(call.inputs[self.family.prompts.points]).reshape(-1, 2)
        return tuple(float(value) for value in points[-1])


class AsyncFake:
    """An async server that answers at once, or while ``hang`` is set never."""

    def __init__(self, family: Family) -> None:
        self.fake = FakeTransport(family, lambda call: answer(family, call))
        self.failing: Exception | None = None
        self.hang = threading.Event()
        self.hanging = threading.Event()
        self.cancelled = threading.Event()

    async def infer(self, call: Call, timeout_s: float | None = None) -> Arrays:
        await asyncio.sleep(0)
        if self.failing is not None:
            raise self.failing
        if self.hang.is_set():
            await self._hang()
        return self.fake.infer(call)

    async def _hang(self) -> None:
        self.hanging.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()

    async def served(self, model: str, timeout_s: float | None = None) -> Served:
        return self.fake.served(model)

    async def check_ready(self, models: Sequence[str], timeout_s: float | None = None) -> None:
        self.fake.check_ready(models)

    async def close(self) -> None:
        self.fake.close()
