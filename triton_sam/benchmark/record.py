"""What a run found, as JSON: with the machine, the versions and the command beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InvalidInputError
from ..files import write_atomically
from .measure import Samples, is_precise
from .statistics import Interval, median_interval, percentiles
from .subjects import Role, Subject, typical

SCHEMA = "triton-sam/benchmark/1"
MAX_SAMPLES = 2000


@dataclass(frozen=True)
class Series:
    """The times of one subject at one workload, in the order in which they were taken.

    ``benchmark``: encode, click, pipeline, hover or throughput. ``seconds``: of each operation;
    with ``hover`` from the last event of a burst to its mask; with ``throughput`` those that an
    answer takes on average, one for each segment. The n-th samples of all subjects of a workload
    were taken in the same round. ``precise``: whether the median is as sure as was asked for.
    ``stages``: where the time of a typical operation goes, in seconds. ``overhead_s``: median of
    the client's time minus the server's. ``cpu_s``: processor time of this process for one
    operation. ``wire``: bytes up and down for one operation at the client's socket. ``yardstick``:
    of a reference in this process, the part of each of ``seconds`` that its models took, where
    none of the client's code runs; with ``hover`` and ``throughput`` of a call on average.
    """

    benchmark: str
    workload: str
    subject: str
    role: Role
    seconds: list[float]
    precise: bool
    stages: dict[str, float] = field(default_factory=dict)
    overhead_s: float | None = None
    cpu_s: float | None = None
    wire: dict[str, int] | None = None
    yardstick: list[float] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes two series of different runs comparable."""
        return self.benchmark, self.workload, self.subject

    @property
    def median(self) -> Interval:
        return median_interval(self.seconds)

    @property
    def percentiles(self) -> dict[str, float]:
        return percentiles(self.seconds)


@dataclass(frozen=True)
class Hovering:
    """Many bursts of mouse events at ``rate_hz``.

    ``latencies``: percentiles in seconds, over all events, of the time from when an event was due
    to the first mask for it or a newer one. ``cancelled``: events replaced before they were sent,
    ``dropped``: after that, for the last one. ``late_s``: the worst delay of the harness itself.
    ``executed``: requests that the server ran; what was dropped may be among them.
    """

    subject: str
    role: Role
    rate_hz: float
    events: int
    answered: int
    cancelled: int
    dropped: int
    executed: int | None
    late_s: float
    latencies: dict[str, float]


@dataclass(frozen=True)
class Throughput:
    """What a number of clients got together.

    ``rate``: median of the segments, answers a second. ``latencies``: percentiles in seconds.
    ``stages``: mean seconds of an answer on the server.
    """

    subject: str
    role: Role
    workload: str
    clients: int
    rate: float
    rates: list[float]
    latencies: dict[str, float]
    stages: dict[str, float]
    failures: int


@dataclass(frozen=True)
class Record:
    """One run of a benchmark command; times in seconds throughout."""

    command: list[str]
    started: str
    machine: dict[str, Any]
    versions: dict[str, str]
    server: dict[str, Any]
    settings: dict[str, Any]
    series: list[Series] = field(default_factory=list)
    hovering: list[Hovering] = field(default_factory=list)
    throughput: list[Throughput] = field(default_factory=list)
    cold_start: dict[str, float] = field(default_factory=dict)
    profiles: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    limits: dict[str, Any] = field(default_factory=dict)
    cross_checks: list[dict[str, Any]] = field(default_factory=list)
    gpus: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    duration_s: float = 0.0
    schema: str = SCHEMA

    def of(self, benchmark: str) -> dict[str, list[Series]]:
        """The series of ``benchmark`` by workload, in the order in which they were measured."""
        found: dict[str, list[Series]] = {}
        for series in self.series:
            if series.benchmark == benchmark:
                found.setdefault(series.workload, []).append(series)
        return found

    @property
    def title(self) -> str:
        """The model that was measured, such as ``sam2 demo``."""
        return f"{self.server['family']} {self.server.get('variant') or ''}".strip()


def series_of(
    benchmark: str, workload: str, subject: Subject, samples: Samples, precision: float
) -> Series:
    """The series of ``samples``."""
    rows = [
        {"total": total, **details}
        for total, details in zip(samples.seconds, samples.details, strict=True)
    ]
    overheads = [row["total"] - row["request"] for row in rows if "request" in row]
    in_models = [row.get("transport", row["total"]) for row in rows] if subject.in_process else []
    return Series(
        benchmark,
        workload,
        subject.name,
        subject.role,
        seconds=[round(value, 7) for value in samples.seconds[:MAX_SAMPLES]],
        precise=is_precise(samples.seconds, precision),
        stages=typical_stages(rows),
        overhead_s=float(np.median(overheads)) if overheads else None,
        cpu_s=samples.cpu_s / len(samples.seconds),
        yardstick=[round(value, 7) for value in in_models[:MAX_SAMPLES]],
    )


def typical_stages(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean stages of the middle half of the operations; they add up to its mean time.

    Of those whose share on the server is known, where it is of some.
    """
    known = [row for row in rows if "request" in row] or rows
    ordered = sorted(known, key=lambda row: row["total"])
    quarter = len(ordered) // 4
    middle = [typical(row) for row in ordered[quarter : len(ordered) - quarter]]
    names = dict.fromkeys(name for row in middle for name in row)
    return {name: float(np.mean([row.get(name, 0.0) for row in middle])) for name in names}


def write_record(record: Record, path: Path) -> None:
    """Write ``record`` as JSON, whole or not at all."""
    write_atomically(path, (json.dumps(asdict(record), indent=1) + "\n").encode())


def read_record(path: Path) -> Record:
    """The record in the file ``path``. Raises :class:`InvalidInputError` for any other file."""
    try:
        content = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as exc:
        raise InvalidInputError(f"{path} is not JSON: {exc}.") from exc
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise InvalidInputError(
            f"{path} has the schema {schema!r}; this version reads {SCHEMA!r}. "
            "Make it again with `triton-sam benchmark`."
        )
    return _from_json(content)


def _from_json(content: Mapping[str, Any]) -> Record:
    parts = {"series": Series, "hovering": Hovering, "throughput": Throughput}
    values = dict(content)
    for name, kind in parts.items():
        values[name] = [kind(**entry) for entry in content[name]]
    return Record(**values)
