"""``encode``, ``click`` and ``pipeline``: one operation after the other, as one user does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

from .measure import Operation, Samples, interleave, time_round
from .operations import Click, Encode, Pipeline
from .profile import profile
from .record import series_of
from .run import Run
from .subjects import Subject, served
from .wire import Bytes, counting

# Of the time of a case, for counting bytes and for the profile; and the most turns of each.
_ASIDE = 0.2
_TURNS = 10
# The first two subjects of a case, which `compare` needs, are in every round, the others in so many
# of them, and where an operation takes long in a few, if those fit into this share of the time.
_MANY = 48
_LONG_S = 0.2
_FEW = 3
_FEW_SHARE = 0.4
# The share of all time for an encode whose only use is one more reference of a click.
_PATIENCE = 0.03


@dataclass(frozen=True)
class Case:
    """One workload: its title, how a subject does it, and which subjects can.

    ``weight``: how many rounds it is to have beside the other cases. ``encodes``: whether an image
    is encoded each time. ``needed``: measured at least once, however long that takes.
    """

    benchmark: str
    title: str
    make: Callable[[Subject], Operation]
    subjects: Sequence[Subject]
    weight: float = 1
    encodes: bool = False
    needed: bool = True

    @property
    def name(self) -> str:
        return f"{self.benchmark}: {self.title}"


def encode(run: Run) -> Iterator[Case]:
    """A photo of each size. What becomes of the larger ones does not depend on the wire."""
    in_process = [subject for subject in run.subjects[1:] if subject.in_process]
    for number, megapixels in enumerate(run.workload.megapixels):
        source = run.workload.source(megapixels)
        make = partial(Encode, source=source)
        title = source.photo.title
        if number == 0:
            yield Case("encode", title, make, run.subjects, weight=2, encodes=True)
        else:
            subjects = [run.subjects[0], *in_process]
            yield Case("encode", title, make, subjects, encodes=True, needed=False)


def click(run: Run) -> Iterator[Case]:
    """Prompts about an image that is set: low-resolution logits, then masks at image size."""
    source = run.workload.source()
    for number, count in enumerate(run.workload.prompts):
        make = partial(Click, source=source, embedding=run.embedding_of, prompts=count)
        title = f"{_several(count, 'prompt')}, logits"
        yield Case("click", title, make, run.low_resolution, weight=1 if number else 16)
    make = partial(Click, source=source, embedding=run.embedding_of, full_size=True)
    case = Case("click", f"1 prompt, mask at {source.photo.title}", make, run.subjects, weight=4)
    # What takes no embedding has to encode the image first.
    yield case if run.encode_s < _PATIENCE * run.plan.budget_s else _without_encodes(run, case)


def pipeline(run: Run) -> Iterator[Case]:
    """A photo and its clicks."""
    source = run.workload.source()
    for masks in run.workload.masks:
        make = partial(Pipeline, source=source, masks=masks)
        title = f"1 image + {_several(masks, 'mask')}"
        yield Case("pipeline", title, make, run.subjects, encodes=True, needed=False)


def _without_encodes(run: Run, case: Case) -> Case:
    names = [subject.name for subject in case.subjects if subject.full_size_only]
    run.left_out.extend(f"{name} ({case.name})" for name in names)
    return replace(case, subjects=run.low_resolution)


def _several(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


@dataclass(frozen=True)
class _Begun:
    """A case of which a first round is done. ``few``: who is in so many of the rounds only."""

    case: Case
    operations: Mapping[str, Operation]
    first: Mapping[str, Samples]
    few: Mapping[str, int]

    @property
    def cost_s(self) -> float:
        """Of as many rounds as its weight says."""
        often = [found.wall_s for name, found in self.first.items() if name not in self.few]
        return self.case.weight * sum(often)

    @property
    def few_s(self) -> float:
        """Of the rounds of those that are in a few only."""
        return sum(self.first[name].wall_s * rounds for name, rounds in self.few.items())


def measure(run: Run, budget_s: float, cases: Callable[[Run], Iterator[Case]]) -> None:
    """Time every case and put its series, bytes and profile into the record.

    Cases get time in proportion to what a round of them takes and to their weight. What there is
    no time for, by what an encode took, is left out with a note.
    """
    end = time.perf_counter() + budget_s
    possible = list(cases(run))
    begun = []
    for case in possible:
        left = end - time.perf_counter()
        fitting = _fitting(run, case, left, budget_s / len(possible))
        if fitting is not None:
            run.say(case.name, 0)
            begun.append(_begin(fitting, run.plan.pause_s))
    left = max(end - time.perf_counter(), 0.0)
    begun = _rationed(begun, _FEW_SHARE * left)
    left = max(left - sum(one.few_s for one in begun), 0.0)
    whole = sum(one.cost_s for one in begun)
    for one in begun:
        _measure(run, one, one.few_s + left * one.cost_s / whole)


def _fitting(run: Run, case: Case, left_s: float, usual_s: float) -> Case | None:
    """``case`` with those of its subjects that there is time for."""
    if not case.encodes or run.encode_s < _LONG_S:
        return case
    least, most = min(2, len(case.subjects)), len(case.subjects)
    if not case.needed and least * run.encode_s > left_s:
        run.left_out.append(case.name)
        return None
    # A first round, which may be thrown away, and a few.
    further = int(_FEW_SHARE * usual_s / ((1 + _FEW) * run.encode_s))
    count = min(least + further, most)
    if count < most:
        names = " and ".join(subject.name for subject in case.subjects[count:])
        run.left_out.append(f"{names} ({case.name})")
    return replace(case, subjects=case.subjects[:count])


def _begin(case: Case, pause_s: float) -> _Begun:
    operations = {subject.name: case.make(subject) for subject in case.subjects}
    first = time_round(operations, pause_s)
    if _is_long(first) and not case.encodes:
        # The first click of all takes several times as long as those that follow.
        first = time_round(operations, pause_s)
    rounds = _FEW if _is_long(first) else _MANY
    names = [subject.name for subject in case.subjects[2:]]
    return _Begun(case, operations, first, dict.fromkeys(names, rounds))


def _is_long(a_round: Mapping[str, Samples]) -> bool:
    return max(found.wall_s for found in a_round.values()) > _LONG_S


def _rationed(begun: Sequence[_Begun], seconds: float) -> list[_Begun]:
    """``begun`` with fewer of the rounds that some are in, as many as there is time for."""
    share = min(1.0, seconds / max(sum(one.few_s for one in begun), 1e-9))
    return [
        replace(one, few={name: max(1, int(share * rounds)) for name, rounds in one.few.items()})
        for one in begun
    ]


def _measure(run: Run, begun: _Begun, budget_s: float) -> None:
    case, operations = begun.case, begun.operations
    run.say(case.name, 0)
    slowest = max(found.wall_s for found in begun.first.values())
    # Each subject on the server counts its bytes, and one is profiled.
    passes = 1 + sum(not subject.in_process for subject in case.subjects)
    turns = max(int(budget_s * _ASIDE / passes / slowest), 0 if case.encodes else 1)
    turns = min(turns, _TURNS)
    timed_s = budget_s - turns * passes * slowest
    round_s = sum(found.wall_s for found in begun.first.values())
    counts = 3 * round_s > timed_s  # too little time to throw a round away
    samples = interleave(
        operations,
        # One round is over; those of long operations would be missed where they count.
        replace(
            run.plan,
            budget_s=timed_s,
            warmup=min(run.plan.warmup - 1, int(timed_s / 10 / round_s)),
        ),
        lambda turn, spent: run.say(case.name, min(spent / max(timed_s, round_s), 1.0)),
        begun.few,
        begun.first if counts else {},
    )
    for subject in case.subjects:
        found = series_of(
            case.benchmark, case.title, subject, samples[subject.name], run.plan.precision
        )
        wire = _count_bytes(case, subject, run, turns) if turns else None
        run.record.series.append(replace(found, wire=wire))
    if turns:
        lines = profile(operations[case.subjects[0].name], turns)
        run.record.profiles[case.name] = [asdict(line) for line in lines]
    run.say(case.name, 1)


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
