"""Flows: what is decided between two exchanges, written once for sync and async code.

A flow is a generator. It yields steps, is sent what came of each, and returns its result; an
error of a step is raised inside it, where it was yielded. :func:`run` and :func:`run_async` carry
the steps out and decide nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Exchange:
    """Ask the other side; ``ask`` is given it and returns the answer, or an awaitable of it."""

    ask: Callable[[Any], Any]


@dataclass(frozen=True)
class Work:
    """Compute something that takes long enough to hold up an event loop."""

    do: Callable[[], Any]


@dataclass(frozen=True)
class Pause:
    """Wait."""

    seconds: float


@dataclass(frozen=True)
class Shared:
    """Carry a flow out once for everybody who wants the same now.

    ``wait`` and ``wait_async`` are given a function that carries it out, and decide whether to.
    """

    flow: Callable[[], Flow[Any]]
    wait: Callable[[Callable[[], Any]], Any]
    wait_async: Callable[[Callable[[], Awaitable[Any]]], Awaitable[Any]]


Step: TypeAlias = "Exchange | Work | Pause | Shared"
Flow: TypeAlias = Generator[Step, Any, T]


def run(flow: Flow[T], other: Any) -> T:
    """Carry a flow out in this thread; ``other`` is the side that it talks to."""
    take = flow.send
    given: Any = None
    try:
        while True:
            step = take(given)
            try:
                take, given = flow.send, _taken(step, other)
            except BaseException as exc:
                take, given = flow.throw, exc
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        given = None  # an error would keep this frame, and with it whole embeddings, alive


def _taken(step: Step, other: Any) -> Any:
    if isinstance(step, Exchange):
        return step.ask(other)
    if isinstance(step, Work):
        return step.do()
    if isinstance(step, Shared):
        return step.wait(lambda: run(step.flow(), other))
    return time.sleep(step.seconds)


async def run_async(flow: Flow[T], other: Any) -> T:
    """Carry a flow out in the running event loop; work is done in a thread."""
    take = flow.send
    given: Any = None
    try:
        while True:
            step = take(given)
            try:
                take, given = flow.send, await _taken_async(step, other)
            except BaseException as exc:
                take, given = flow.throw, exc
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        given = None  # an error would keep this frame, and with it whole embeddings, alive


async def _taken_async(step: Step, other: Any) -> Any:
    if isinstance(step, Exchange):
        return await step.ask(other)
    if isinstance(step, Work):
        return await asyncio.to_thread(step.do)
    if isinstance(step, Shared):
        return await step.wait_async(lambda: run_async(step.flow(), other))
    return await asyncio.sleep(step.seconds)


class Deadline:
    """The moment until which a whole call has to end; ``None`` sets none."""

    def __init__(self, timeout_s: float | None) -> None:
        self._end = None if timeout_s is None else time.monotonic() + timeout_s

    def left(self) -> float | None:
        """Seconds that are left. Raises ``TimeoutError`` when there are none."""
        if self._end is None:
            return None
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def is_within(self, seconds: float) -> bool:
        """Whether fewer than so many seconds are left."""
        return self._end is not None and self._end - time.monotonic() < seconds
