"""What is run next: the most urgent first, and of what nobody waits for any more nothing.

Triton's own batcher cannot order requests without standing still now and then beside an idle
model, so the order is made here.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any


class Priority(IntEnum):
    """How urgent a request is; a lower one goes first."""

    CLICK = 0
    HOVER = 1
    PREFETCH = 2


class QueueFullError(Exception):
    """So many jobs wait that a further one would only make all of them late."""


@dataclass(eq=False)
class Job:
    """Something to run.

    ``group``: jobs of equal groups may be run together; ``None`` is alone. ``width``: how much of
    such a run it takes up. ``is_cancelled``: whether nobody waits for it any more. ``deadline``:
    on the clock of the queue, after which its answer is of no use. ``drop``: called in place of
    running it, with ``"cancelled"`` or ``"late"``. Neither may raise. ``subject``: what ``run`` has
    to know of it.
    """

    run: Callable[[list[Job]], None]
    drop: Callable[[str], None]
    priority: Priority = Priority.CLICK
    group: Hashable = None
    width: int = 1
    is_cancelled: Callable[[], bool] = lambda: False
    deadline: float = float("inf")
    subject: Any = None


@dataclass(eq=False)
class Jobs:
    """A queue of at most ``limit`` jobs. Safe to use from several threads.

    ``max_width``: of the jobs that are run together. A job that waits alone is run alone: nothing
    is ever delayed for company.
    """

    limit: int
    max_width: int = 1
    clock: Callable[[], float] = time.monotonic
    _heap: list[tuple[Priority, int, Job]] = field(default_factory=list)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _closed: bool = False

    def __len__(self) -> int:
        with self._changed:
            return len(self._heap)

    def put(self, job: Job) -> None:
        """Add a job. Raises :class:`QueueFullError` when ``limit`` jobs wait that are wanted."""
        dropped = []
        with self._changed:
            if len(self._heap) >= self.limit:
                dropped = self._sweep()
            full = len(self._heap) >= self.limit
            if not full:
                self._push(job)
        _drop(dropped)
        if full:
            raise QueueFullError(f"{self.limit} requests wait already")

    def put_back(self, job: Job) -> None:
        """Have a job that was taken wait for a further turn, behind its equals; never refused."""
        with self._changed:
            self._push(job)

    def take(self) -> list[Job]:
        """The jobs to run now, one or some of one group; waits for them. Empty after the end."""
        while True:
            dropped: list[tuple[Job, str]] = []
            with self._changed:
                self._changed.wait_for(lambda: self._heap or self._closed)
                if not self._heap:
                    return []
                _, _, job = heapq.heappop(self._heap)
                reason = self._useless(job)
                taken = [] if reason else [job, *self._companions(job, dropped)]
                if reason:
                    dropped.append((job, reason))
            _drop(dropped)
            if taken:
                return taken

    def close(self) -> None:
        """Let whoever takes go once nothing waits any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _push(self, job: Job) -> None:
        heapq.heappush(self._heap, (job.priority, next(self._numbers), job))
        self._changed.notify()

    def _companions(self, job: Job, dropped: list[tuple[Job, str]]) -> list[Job]:
        """Jobs of the same group and priority, taken out, as many as fit."""
        room = self.max_width - job.width
        if job.group is None or room <= 0:
            return []
        found = []
        for item in sorted(self._heap):
            other = item[2]
            if other.priority != job.priority or other.group != job.group or other.width > room:
                continue
            self._heap.remove(item)
            reason = self._useless(other)
            if reason:
                dropped.append((other, reason))
            else:
                found.append(other)
                room -= other.width
        if found or dropped:
            heapq.heapify(self._heap)
        return found

    def _sweep(self) -> list[tuple[Job, str]]:
        judged = [(item, self._useless(item[2])) for item in self._heap]
        self._heap = [item for item, reason in judged if not reason]
        heapq.heapify(self._heap)
        return [(item[2], reason) for item, reason in judged if reason]

    def _useless(self, job: Job) -> str:
        if job.is_cancelled():
            return "cancelled"
        return "late" if self.clock() > job.deadline else ""


def _drop(dropped: list[tuple[Job, str]]) -> None:
    for job, reason in dropped:
        job.drop(reason)
