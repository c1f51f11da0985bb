"""The hover: events that come at their own pace, whether or not the last one was answered.

Every event counts from the moment at which it was *due*. A harness that waits for an answer
before it sends the next request would, while the server stands still, send nothing and so
measure nothing: one slow request instead of a second's worth of them (coordinated omission).

An event is served by the first mask for its position or a newer one. Positions that were
replaced before they were sent therefore still have a latency: how long their user looked at an
older mask.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..background import BackgroundSAM2Client
from ..embedding import Embedding
from ..errors import ServerTimeoutError
from ..hover import HoverResult

Position = tuple[float, float]
_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Burst:
    """One movement of the mouse.

    ``due_s``: when each event was due, ``done``: (event, when its answer came) in order, both in
    seconds since the start. ``cancelled``: events that were replaced before they were sent.
    ``dropped``: events that were given up after that. ``late_s``: how much later than due the
    harness itself was at worst.
    """

    due_s: list[float]
    done: list[tuple[int, float]]
    cancelled: int
    dropped: int
    late_s: float

    @property
    def latencies(self) -> list[float]:
        """For each event the seconds until a mask for it, or for a newer one, was there."""
        fresh = np.full(len(self.due_s), np.inf)
        for event, moment in self.done:
            fresh[event] = min(fresh[event], moment)
        until = np.minimum.accumulate(fresh[::-1])[::-1]
        return [float(value) for value in until - np.asarray(self.due_s)]

    @property
    def last(self) -> float:
        """Seconds from the last event to its mask."""
        return self.latencies[-1]


class Pointer(Protocol):
    """Something that finds masks for a mouse that moves.

    ``done``: (event, moment of its answer) in order; ``cancelled``: events that were replaced
    before they were sent; ``dropped``: events that were given up after that.
    """

    done: list[tuple[int, float]]

    @property
    def cancelled(self) -> int: ...

    @property
    def dropped(self) -> int: ...

    def move(self, event: int, position: Position) -> None:
        """The mouse is at ``position`` now; returns at once."""

    def end(self) -> None:
        """Wait until the last position has its mask.

        Raises what went wrong, and :class:`ServerTimeoutError` when the mask does not come.
        """


class LatestWins:
    """A pointer over anything that can be called, in place of the client's own hover.

    At most one position is on its way and one waits; a newer one replaces the one that waits.

    ``ask``: gives the mask of a position; called on a thread of its own.
    """

    def __init__(self, ask: Callable[[Position], object]) -> None:
        self._ask = ask
        self._changed = threading.Condition()
        self._waiting: tuple[int, Position] | None = None
        self._ended = False
        self._error: BaseException | None = None
        self.cancelled = 0
        self.dropped = 0
        self.done: list[tuple[int, float]] = []
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def move(self, event: int, position: Position) -> None:
        """The mouse is at ``position`` now; returns at once."""
        with self._changed:
            self.cancelled += self._waiting is not None
            self._waiting = event, position
            self._changed.notify()

    def end(self) -> None:
        """As of :class:`Pointer`; raises what ``ask`` raised."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join(_TIMEOUT_S)
        if self._error is not None:
            raise self._error
        if self._thread.is_alive():
            raise _no_mask()

    def _work(self) -> None:
        try:
            while (taken := self._take()) is not None:
                event, position = taken
                self._ask(position)
                self.done.append((event, time.perf_counter()))
        except BaseException as exc:
            self._error = exc

    def _take(self) -> tuple[int, Position] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or self._ended)
            taken, self._waiting = self._waiting, None
            return taken


class ServedPointer:
    """The client's own hover, as a program without an event loop uses it.

    ``embedding``: of the image that the mouse is over.
    """

    def __init__(self, client: BackgroundSAM2Client, embedding: Embedding) -> None:
        self.done: list[tuple[int, float]] = []
        self._moves = 0
        self._changed = threading.Condition()
        self._error: Exception | None = None
        self._hover = client.hover(embedding, self._found, self._failed)

    @property
    def cancelled(self) -> int:
        return self._hover.status.cancelled_before_execution

    @property
    def dropped(self) -> int:
        return self._hover.status.dropped

    def move(self, event: int, position: Position) -> None:
        """The mouse is at ``position`` now; returns at once."""
        self._moves = self._hover.move(*position)

    def end(self) -> None:
        """As of :class:`Pointer`; raises the error of a request."""
        with self._changed:
            done = self._changed.wait_for(self._is_done, _TIMEOUT_S)
        self._hover.close()
        if self._error is not None:
            raise self._error
        if not done:
            raise _no_mask()

    def _is_done(self) -> bool:
        last = self.done[-1][0] if self.done else -1
        return self._error is not None or last == self._moves - 1

    def _found(self, found: HoverResult) -> None:
        moment = time.perf_counter()
        with self._changed:
            self.done.append((found.number - 1, moment))
            self._changed.notify()

    def _failed(self, error: Exception) -> None:
        with self._changed:
            self._error = error
            self._changed.notify()


def _no_mask() -> ServerTimeoutError:
    return ServerTimeoutError(f"No mask for the last position within {_TIMEOUT_S:g} s.")


def hover(session: Pointer, positions: Sequence[Position], rate_hz: float) -> Burst:
    """Move the mouse through ``positions``, ``rate_hz`` events a second."""
    started = time.perf_counter()
    due = [index / rate_hz for index in range(len(positions))]
    late = 0.0
    for index, position in enumerate(positions):
        wait = started + due[index] - time.perf_counter()
        if wait > 0:
            time.sleep(wait)
        late = max(late, time.perf_counter() - started - due[index])
        session.move(index, position)
    session.end()
    done = [(event, moment - started) for event, moment in session.done]
    return Burst(due, done, session.cancelled, session.dropped, late)
