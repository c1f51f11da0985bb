"""Throughput: 1 to N clients, each of which asks again as soon as it has its answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..errors import SamError

_DRAIN_S = 120.0


@dataclass
class Level:
    """What a number of clients got.

    ``seconds``: of each answer. ``rates``: answers a second, one for each segment. ``failures``:
    calls that ended in an error; they are in no other number.
    """

    clients: int
    seconds: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    failures: int = 0


def concurrency_levels(most: int) -> list[int]:
    """1, 2, 4, … up to ``most``, which is the last."""
    levels = [1]
    while levels[-1] * 2 < most:
        levels.append(levels[-1] * 2)
    return levels if most == 1 else [*levels, most]


def run_segment(calls: Sequence[Callable[[int], object]], seconds: float, level: Level) -> None:
    """Let every one of ``calls`` go round on a thread of its own for ``seconds``.

    A call is given how many times it has been called. What began within the time counts, and the
    rate is that of the time until the last of them was answered.
    """
    begin, stop = threading.Event(), threading.Event()
    lock = threading.Lock()
    last = [0.0]

    def go_round(call: Callable[[int], object]) -> None:
        begin.wait()
        turn = 0
        while not stop.is_set():
            started = time.perf_counter()
            try:
                call(turn)
                failed = False
            except SamError:
                failed = True
            ended = time.perf_counter()
            turn += 1
            with lock:
                last[0] = max(last[0], ended)
                if failed:
                    level.failures += 1
                else:
                    level.seconds.append(ended - started)

    threads = [threading.Thread(target=go_round, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    before, started = len(level.seconds), time.perf_counter()
    begin.set()
    stop.wait(seconds)
    stop.set()
    for thread in threads:
        thread.join(_DRAIN_S)
    level.rates.append((len(level.seconds) - before) / (last[0] - started))
