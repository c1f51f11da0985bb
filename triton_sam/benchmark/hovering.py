"""``hover``: a mouse that moves on, whatever the server does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from .measure import is_precise
from .openloop import Burst, LatestWins, Pointer, ServedPointer, hover
from .operations import Source
from .record import Hovering, Series
from .run import Run
from .statistics import percentiles
from .subjects import Subject, open_background
from .workloads import mouse_path

_PAUSE_S = 0.05
_MIN_BURSTS, _MAX_BURSTS = 1, 60


@dataclass(frozen=True)
class _Bursted:
    """A burst, how many requests the server ran for it, and :meth:`Subject.call_s` of it."""

    burst: Burst
    executed: int | None
    call_s: float | None


def measure(run: Run, budget_s: float) -> None:
    """Bursts of mouse events, a burst of each subject in turn."""
    rate, subjects, source = run.workload.rate_hz, run.low_resolution, run.workload.source()
    title = f"{rate:g} events/s"
    found: dict[str, list[_Bursted]] = {s.name: [] for s in subjects}
    with ExitStack() as stack:
        begin = {s.name: stack.enter_context(_pointers(run, s)) for s in subjects}
        for turn in run.turns(f"hover: {title}", budget_s, _MIN_BURSTS, _MAX_BURSTS):
            for subject in subjects:
                burst = _burst(run, subject, begin[subject.name], source, turn)
                found[subject.name].append(burst)
    for subject in subjects:
        bursts = [one.burst for one in found[subject.name]]
        executed = [one.executed for one in found[subject.name]]
        calls = [one.call_s for one in found[subject.name] if one.call_s is not None]
        run.record.hovering.append(_summary(subject, rate, bursts, executed))
        last = [burst.last for burst in bursts]
        precise = is_precise(last, run.plan.precision)
        run.record.series.append(
            Series(
                "hover",
                f"{title}, last mask",
                subject.name,
                subject.role,
                last,
                precise,
                yardstick=calls,
            )
        )


@contextmanager
def _pointers(run: Run, subject: Subject) -> Iterator[Callable[[], Pointer]]:
    """What begins a burst: the client's hover on a server, a stand-in for it in process."""
    embedding = run.embedding_of(subject)
    if subject.url is not None:
        with open_background(subject.url, subject.which or run.which) as client:
            yield lambda: ServedPointer(client, embedding)
    else:
        predict = partial(subject.client.predict, embedding=embedding)
        yield lambda: LatestWins(lambda at: predict([at], [1]))


def _burst(
    run: Run, subject: Subject, begin: Callable[[], Pointer], source: Source, turn: int
) -> _Bursted:
    """One movement of the mouse."""
    events = max(2, round(run.workload.rate_hz * run.workload.burst_s))
    positions = mouse_path(events, source.photo.image.size, turn)
    time.sleep(_PAUSE_S)
    subject.start()
    burst = hover(begin(), positions, run.workload.rate_hz)
    executed = None if subject.watch is None else subject.watch.stop(len(burst.done)).executions
    return _Bursted(burst, executed, subject.call_s())


def _summary(
    subject: Subject, rate_hz: float, bursts: list[Burst], executed: list[int | None]
) -> Hovering:
    known = [count for count in executed if count is not None]
    return Hovering(
        subject=subject.name,
        role=subject.role,
        rate_hz=rate_hz,
        events=sum(len(burst.due_s) for burst in bursts),
        answered=sum(len(burst.done) for burst in bursts),
        cancelled=sum(burst.cancelled for burst in bursts),
        dropped=sum(burst.dropped for burst in bursts),
        executed=sum(known) if known else None,
        late_s=max(burst.late_s for burst in bursts),
        latencies=percentiles([value for burst in bursts for value in burst.latencies]),
    )
