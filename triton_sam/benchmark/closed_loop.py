"""``encode``, ``click`` and ``pipeline``: one operation after the other, as one user does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

from .measure import Operation, interleave, time_round
from .operations import Click, Encode, Pipeline
from .profile import profile
from .record import series_of
from .run import Run
from .subjects import Subject, served
from .wire import Bytes, counting

# Of the time of a case, for counting bytes and for the profile; and the most turns of each.
_ASIDE = 0.2
_TURNS = 10


@dataclass(frozen=True)
class Case:
    """One workload: its title, how a subject does it, and which subjects can."""

    benchmark: str
    title: str
    make: Callable[[Subject], Operation]
    subjects: Sequence[Subject]


def encode(run: Run) -> Iterator[Case]:
    """A photo of each size."""
    for megapixels in run.workload.megapixels:
        source = run.workload.source(megapixels)
        yield Case("encode", source.photo.title, partial(Encode, source=source), run.subjects)


def click(run: Run) -> Iterator[Case]:
    """Prompts about an image that is set: low-resolution logits, then masks at image size."""
    source = run.workload.source()
    for count in run.workload.prompts:
        make = partial(Click, source=source, embedding=run.embedding_of, prompts=count)
        yield Case("click", f"{_several(count, 'prompt')}, logits", make, run.low_resolution)
    make = partial(Click, source=source, embedding=run.embedding_of, full_size=True)
    yield Case("click", f"1 prompt, mask at {source.photo.title}", make, run.subjects)


def pipeline(run: Run) -> Iterator[Case]:
    """A photo and its clicks."""
    source = run.workload.source()
    for masks in run.workload.masks:
        make = partial(Pipeline, source=source, masks=masks)
        yield Case("pipeline", f"1 image + {_several(masks, 'mask')}", make, run.subjects)


def _several(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def measure(run: Run, budget_s: float, cases: Callable[[Run], Iterator[Case]]) -> None:
    """Time every case and put its series, bytes and profile into the record.

    A case gets time in proportion to what one round of it takes: all get as many rounds.
    """
    end = time.perf_counter() + budget_s
    begun = []
    for case in cases(run):
        run.say(f"{case.benchmark}: {case.title}", 0)
        operations = {subject.name: case.make(subject) for subject in case.subjects}
        begun.append((case, operations, time_round(operations)))
    left, whole = max(end - time.perf_counter(), 0.0), sum(round_s for _, _, round_s in begun)
    for case, operations, round_s in begun:
        _measure(run, case, operations, left * round_s / whole, round_s)


def _measure(
    run: Run, case: Case, operations: Mapping[str, Operation], budget_s: float, round_s: float
) -> None:
    what = f"{case.benchmark}: {case.title}"
    run.say(what, 0)
    timed_s = budget_s * (1 - _ASIDE)
    # One round is over; those of long operations would be missed where they count.
    warmup = min(run.plan.warmup - 1, int(timed_s / 3 / round_s))
    samples = interleave(
        operations,
        replace(run.plan, budget_s=timed_s, warmup=warmup),
        lambda turn, spent: run.say(what, min(spent / max(timed_s, round_s), 1.0)),
    )
    slowest = max(max(found.seconds) for found in samples.values())
    turns = min(max(int(budget_s * _ASIDE / 4 / slowest), 1), _TURNS)
    for subject in case.subjects:
        found = series_of(
            case.benchmark, case.title, subject, samples[subject.name], run.plan.precision
        )
        wire = _count_bytes(case, subject, run, turns)
        run.record.series.append(replace(found, wire=wire))
    lines = profile(operations[case.subjects[0].name], turns)
    run.record.profiles[what] = [asdict(line) for line in lines]
    run.say(what, 1)


def _count_bytes(case: Case, subject: Subject, run: Run, turns: int) -> dict[str, int] | None:
    """Bytes of one operation, on a connection of its own; ``None`` where there is no wire.

    Where images are encoded, the kilobyte that describes the encoder is among those of the first.
    """
    if subject.url is None:
        return None
    with counting(subject.url) as proxy:
        if proxy is None:
            return None
        with served(proxy.url, subject.which or run.which) as counted:
            # Opens the connection and asks for the decoder's description.
            counted.client.predict([[1, 1]], [1], embedding=run.embedding_of(counted))
            operation = case.make(counted)
            before = proxy.total
            for turn in range(1, 1 + turns):
                _once(operation, turn)
            passed = proxy.total - before
    return asdict(Bytes(passed.up // turns, passed.down // turns))


def _once(operation: Operation, turn: int) -> None:
    operation.prepare(turn)
    operation.run()
    operation.finish()
