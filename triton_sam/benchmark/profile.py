"""What the client itself does during an operation, from Python's profiler."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .measure import Operation

_PACKAGE = "triton_sam"
# Functions in which a thread does nothing but wait for the other side.
_WAITING = ("recv", "read1", "readinto", "acquire", "next_event", "poll", "select", "run")

# gRPC's own polling is compiled, and so counts for the function that calls it.
_GRPC_WAITS = ("grpc/_channel.py", "_blocking")


@dataclass(frozen=True)
class Line:
    """A function: its own time and how often it was called, both for one operation."""

    function: str
    seconds: float
    calls: float
    waiting: bool


def profile(operation: Operation, turns: int = 10, most: int = 12) -> list[Line]:
    """The ``most`` functions in which ``operation`` spends its own time, the largest first.

    The profiler slows Python code down but not what it waits for: read the shares of the former
    against each other.
    """
    profiler = cProfile.Profile()
    for turn in range(turns):
        operation.prepare(turn)
        profiler.enable()
        operation.run()
        profiler.disable()
        operation.finish()
    lines = sorted(_lines(pstats.Stats(profiler), turns), key=lambda line: -line.seconds)
    return lines[:most]


def _lines(stats: pstats.Stats, turns: int) -> Iterator[Line]:
    timings = stats.stats  # type: ignore[attr-defined]  # documented, and missing in the types
    for (file, number, name), (_, calls, own, _, _) in timings.items():
        yield Line(_title(file, number, name), own / turns, calls / turns, _waits(file, name))


def _title(file: str, number: int, name: str) -> str:
    if file == "~":  # built-in: "<method 'recv_into' of '_socket.socket' objects>"
        return name.strip("<>")
    parts = Path(file).parts
    start = parts.index(_PACKAGE) if _PACKAGE in parts else len(parts) - 2
    return f"{'/'.join(parts[start:])}:{number} {name}"


def _waits(file: str, name: str) -> bool:
    if file.endswith(_GRPC_WAITS[0]):
        return name == _GRPC_WAITS[1]
    return file == "~" and any(f"'{word}" in name for word in _WAITING)
