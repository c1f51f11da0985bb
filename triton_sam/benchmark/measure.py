"""Repeat operations in turn until each one's median is known well enough, or time is up."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

from .statistics import median_interval

_CHECK_EVERY = 5
_FIRST = -100  # a turn that is not of the warm-up either
_Found = dict[str, "Samples"]


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
    before each run, so that the threads of the one before have stopped spinning: ONNX Runtime as
    Triton's own backend has it spins for 28 ms after a decoder's run.
    """

    budget_s: float = 30.0
    precision: float = 0.025
    warmup: int = 3
    min_rounds: int = 20
    max_rounds: int = 1000
    pause_s: float = 0.04


@dataclass
class Samples:
    """What was seen of one operation: ``seconds`` of each round, ``details`` of each round.

    ``cpu_s``: processor time of all rounds. ``wall_s``: of all of them with what is not timed.
    """

    seconds: list[float] = field(default_factory=list)
    details: list[Mapping[str, float]] = field(default_factory=list)
    cpu_s: float = 0.0
    wall_s: float = 0.0

    def add(self, seconds: float, details: Mapping[str, float]) -> None:
        self.seconds.append(seconds)
        self.details.append(details)


def interleave(
    operations: Mapping[str, Operation],
    plan: Plan,
    on_round: Callable[[int, float], None] = lambda turn, spent: None,
    few: Mapping[str, int] = MappingProxyType({}),
    first: Mapping[str, Samples] = MappingProxyType({}),
) -> dict[str, Samples]:
    """Time every operation once a round, in an order that is drawn anew for each round.

    Whatever changes on the machine meanwhile meets all of them alike, and the n-th samples
    belong together. Ends when every median is precise enough or the next round would go beyond
    the budget, after one round at least. ``on_round``: is told the rounds done and the seconds
    spent. ``few``: the operations that take part in the first rounds only, and in how many.
    ``first``: a round that :func:`time_round` has timed already, if it is to count.
    """
    started = time.perf_counter()
    order = random.Random(0)
    if not first:
        _warm_up(operations, plan, started)
    samples = {name: first.get(name, Samples()) for name in operations}
    for turn in range(len(next(iter(samples.values())).seconds), plan.max_rounds):
        taking = [name for name in operations if turn < few.get(name, plan.max_rounds)]
        a_round = sum(samples[name].wall_s / turn for name in taking) if turn else 0.0
        if turn and time.perf_counter() - started + a_round > plan.budget_s:
            break
        for name in order.sample(taking, len(taking)):
            _time_once(operations[name], turn, plan.pause_s, samples[name])
        on_round(turn + 1, time.perf_counter() - started)
        if _is_precise([samples[name] for name in taking], turn + 1, plan):
            break
    return samples


def time_round(operations: Mapping[str, Operation], pause_s: float = 0) -> dict[str, Samples]:
    """One round of all operations, the first: to know how long they take, or to throw away.

    ``pause_s``: as in :class:`Plan`, so that a round's costs are known whole.
    """
    samples = {name: Samples() for name in operations}
    for name, operation in operations.items():
        _time_once(operation, _FIRST, pause_s, samples[name])
    return samples


def is_precise(seconds: Sequence[float], precision: float) -> bool:
    """Whether the median's interval is as narrow as asked for."""
    return median_interval(seconds).half_width <= precision


def _is_precise(samples: Sequence[Samples], turns: int, plan: Plan) -> bool:
    if turns < plan.min_rounds or turns % _CHECK_EVERY:
        return False
    return all(is_precise(s.seconds, plan.precision) for s in samples)


def _warm_up(operations: Mapping[str, Operation], plan: Plan, started: float) -> None:
    for turn in range(-plan.warmup, 0):
        for operation in operations.values():
            _time_once(operation, turn, 0, Samples())
        if time.perf_counter() - started > plan.budget_s / 3:
            return


def _time_once(operation: Operation, turn: int, pause_s: float, samples: Samples) -> None:
    begun = time.perf_counter()
    operation.prepare(turn)
    time.sleep(pause_s)
    cpu, started = time.process_time(), time.perf_counter()
    operation.run()
    seconds = time.perf_counter() - started
    samples.cpu_s += time.process_time() - cpu
    samples.add(seconds, operation.finish())
    samples.wall_s += time.perf_counter() - begun
