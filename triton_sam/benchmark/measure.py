"""Repeat operations in turn until each one's median is known well enough, or time is up."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from .statistics import median_interval

_CHECK_EVERY = 5
_FIRST = -100  # a turn that is not of the warm-up either


class Operation(Protocol):
    """Something to time. Only :meth:`run` is timed; the three are called in this order."""

    def prepare(self, turn: int) -> None:
        """Get ready for round ``turn``; the rounds of the warm-up are negative."""

    def run(self) -> None:
        """Do it, once."""

    def finish(self) -> Mapping[str, float]:
        """What else is known about that run, in seconds by name."""


@dataclass(frozen=True)
class Plan:
    """When to stop.

    ``budget_s``: of the whole measurement, warm-up included. ``precision``: half the width of
    the median's 95 % interval, as a share of the median, that is narrow enough. ``warmup``: how
    many rounds are thrown away; fewer when they would take a third of the budget. ``pause_s``:
    before each run, so that the threads of the one before have stopped spinning.
    """

    budget_s: float = 30.0
    precision: float = 0.025
    warmup: int = 3
    min_rounds: int = 20
    max_rounds: int = 1000
    pause_s: float = 0.01


@dataclass
class Samples:
    """What was seen of one operation: ``seconds`` of each round, ``details`` of each round."""

    seconds: list[float] = field(default_factory=list)
    details: list[Mapping[str, float]] = field(default_factory=list)
    cpu_s: float = 0.0

    def add(self, seconds: float, details: Mapping[str, float]) -> None:
        self.seconds.append(seconds)
        self.details.append(details)


def interleave(
    operations: Mapping[str, Operation],
    plan: Plan,
    on_round: Callable[[int, float], None] = lambda turn, spent: None,
) -> dict[str, Samples]:
    """Time every operation once a round, in an order that is drawn anew for each round.

    Whatever changes on the machine meanwhile meets all of them alike, and the n-th samples
    belong together. Ends when every median is precise enough or the next round would go beyond
    the budget, after one round at least. ``on_round``: is told the rounds done and the seconds
    spent.
    """
    started = time.perf_counter()
    order = random.Random(0)
    _warm_up(operations, plan, started)
    samples = {name: Samples() for name in operations}
    begun = time.perf_counter()
    for turn in range(plan.max_rounds):
        for name in order.sample(list(operations), len(operations)):
            _time_once(operations[name], turn, plan.pause_s, samples[name])
        now = time.perf_counter()
        spent, a_round = now - started, (now - begun) / (turn + 1)
        on_round(turn + 1, spent)
        if spent + a_round > plan.budget_s or _is_precise(samples, turn + 1, plan):
            break
    return samples


def time_round(operations: Mapping[str, Operation]) -> float:
    """Seconds of one round of all operations, a first one that is thrown away."""
    started = time.perf_counter()
    for operation in operations.values():
        _time_once(operation, _FIRST, 0, Samples())
    return time.perf_counter() - started


def is_precise(seconds: Sequence[float], precision: float) -> bool:
    """Whether the median's interval is as narrow as asked for."""
    return median_interval(seconds).half_width <= precision


def _is_precise(samples: Mapping[str, Samples], turns: int, plan: Plan) -> bool:
    if turns < plan.min_rounds or turns % _CHECK_EVERY:
        return False
    return all(is_precise(s.seconds, plan.precision) for s in samples.values())


def _warm_up(operations: Mapping[str, Operation], plan: Plan, started: float) -> None:
    for turn in range(-plan.warmup, 0):
        for operation in operations.values():
            _time_once(operation, turn, 0, Samples())
        if time.perf_counter() - started > plan.budget_s / 3:
            return


def _time_once(operation: Operation, turn: int, pause_s: float, samples: Samples) -> None:
    operation.prepare(turn)
    time.sleep(pause_s)
    cpu, started = time.process_time(), time.perf_counter()
    operation.run()
    seconds = time.perf_counter() - started
    samples.cpu_s += time.process_time() - cpu
    samples.add(seconds, operation.finish())
