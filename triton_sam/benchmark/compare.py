"""What changed between two records beyond what noise does."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .record import Record, Series
from .statistics import Values, bootstrap
from .table import columns, ms

Verdict = Literal["same", "slower", "faster", "too few rounds"]

TOLERANCE = 0.05
CONFIDENCE = 0.95
MIN_SAMPLES = 8
_RESAMPLES = 1000


@dataclass(frozen=True)
class Change:
    """One series in both records.

    ``ratio``: the medians' after / before, corrected by how much the models of the ``reference``
    of the same rounds moved, where both records have one; ``low``, ``high``: its confidence
    interval.
    """

    before: Series
    after: Series
    reference: str | None
    ratio: float
    low: float
    high: float
    verdict: Verdict


def compare(
    before: Record,
    after: Record,
    tolerance: float = TOLERANCE,
    confidence: float = CONFIDENCE,
) -> list[Change]:
    """Each series that both records have, and whether it changed.

    A change is reported when the ratio of the medians differs from 1 by ``tolerance`` or more
    *and* its interval excludes 1. Without one they are the same if the interval leaves no room for
    a change of twice the tolerance; else there are too few rounds to tell. The interval is a block
    bootstrap's, which takes drift within a run into account. Drift between runs is taken out with
    the yardstick of a reference that was measured in the same rounds: never with another way to
    the same server, nor with the client's own part of a reference, since either would take out a
    change of the build as well. The ``confidence`` holds for all subjects' series together, and
    for all references' (Bonferroni).
    """
    pairs = _pairs(before, after)
    roles = Counter(new.role for _, new in pairs)
    return [
        _change(
            old,
            new,
            _references(before, after, old),
            tolerance,
            1 - (1 - confidence) / roles[new.role],
        )
        for old, new in pairs
    ]


def _pairs(before: Record, after: Record) -> list[tuple[Series, Series]]:
    known = {series.key: series for series in before.series}
    return [(known[new.key], new) for new in after.series if new.key in known]


def _references(before: Record, after: Record, subject: Series) -> tuple[Series, Series] | None:
    """The first yardstick of the workload that both have; none for a reference itself."""
    if subject.role == "reference":
        return None
    old, new = (_yardsticks(record, subject) for record in (before, after))
    return next(((old[name], new[name]) for name in old if name in new), None)


def _yardsticks(record: Record, subject: Series) -> dict[str, Series]:
    """References whose n-th time was taken in the same round as the n-th of ``subject``."""
    rivals = record.of(subject.benchmark).get(subject.workload, [])
    rounds = next(len(one.seconds) for one in rivals if one.key == subject.key)
    return {one.subject: one for one in rivals if len(one.yardstick) == rounds}


def _change(
    before: Series,
    after: Series,
    references: tuple[Series, Series] | None,
    tolerance: float,
    confidence: float,
) -> Change:
    old_reference, new_reference = references or (None, None)
    old = _log_median(before, old_reference, seed=1)
    new = _log_median(after, new_reference, seed=2)
    centre = new.value - old.value
    reach = NormalDist().inv_cdf(0.5 + confidence / 2) * math.hypot(new.error, old.error)
    ratio, low, high = (math.exp(value) for value in (centre, centre - reach, centre + reach))
    verdict = _verdict(ratio, low, high, tolerance)
    if min(len(before.seconds), len(after.seconds)) < MIN_SAMPLES:
        verdict = "too few rounds"
    name = None if old_reference is None else old_reference.subject
    return Change(before, after, name, ratio, low, high, verdict)


def _verdict(ratio: float, low: float, high: float, tolerance: float) -> Verdict:
    if ratio >= 1 + tolerance and low > 1:
        return "slower"
    if ratio <= 1 / (1 + tolerance) and high < 1:
        return "faster"
    room = 1 + 2 * tolerance
    return "same" if 1 / room <= low and high <= room else "too few rounds"


@dataclass(frozen=True)
class _Estimate:
    value: float
    error: float


def _log_median(series: Series, reference: Series | None, seed: int) -> _Estimate:
    """Logarithm of the median, less that of the yardstick, and its standard error."""
    own = np.asarray(series.seconds)
    if reference is None:

        def alone(times: Values) -> Values:
            logarithm: NDArray[np.float64] = np.log(np.median(times, axis=-1))
            return logarithm

        value = alone(own[None])
        return _Estimate(float(value[0]), _spread(bootstrap([own], alone, _RESAMPLES, seed)))

    def against(times: Values, others: Values) -> Values:
        difference: NDArray[np.float64] = np.log(np.median(times, axis=-1)) - np.log(
            np.median(others, axis=-1)
        )
        return difference

    other = np.asarray(reference.yardstick)
    value = against(own[None], other[None])
    return _Estimate(float(value[0]), _spread(bootstrap([own, other], against, _RESAMPLES, seed)))


def _spread(values: Values) -> float:
    return float(np.std(values))


def circumstances(before: Record, after: Record) -> list[str]:
    """What else differs: machine, model, versions, settings and series, a line for each."""
    pairs = {
        "processor": (before.machine.get("processor"), after.machine.get("processor")),
        "cores": (before.machine.get("cores"), after.machine.get("cores")),
        "model": (before.title, after.title),
        "precision": (before.server.get("precision"), after.server.get("precision")),
    }
    for name in ("versions", "settings"):
        old, new = getattr(before, name), getattr(after, name)
        pairs |= {key: (old.get(key), new.get(key)) for key in {**old, **new}}
    lines = [
        f"{name}: {old} before, {new} after" for name, (old, new) in pairs.items() if old != new
    ]
    return lines + _only(before, after, "before") + _only(after, before, "after")


def _only(these: Record, others: Record, when: str) -> list[str]:
    known = {series.key for series in others.series}
    missing = [series for series in these.series if series.key not in known]
    return [f"{_title(series)}: only {when}, not compared" for series in missing]


def _title(series: Series) -> str:
    return f"{series.benchmark}: {series.workload} · {series.subject}"


def slower(changes: Sequence[Change]) -> list[Change]:
    """The subjects, not the references, that became slower."""
    return [c for c in changes if c.verdict == "slower" and c.after.role == "subject"]


def render(changes: Sequence[Change]) -> str:
    """The changes as text, and a last line that says what they come to."""
    rows = [["", "before", "after", "ratio", "interval", "verdict"]]
    for change in changes:
        mark = "" if change.reference is None else " *"
        rows.append(
            [
                _title(change.after),
                ms(change.before.median.value),
                ms(change.after.median.value),
                f"{change.ratio:.3f}{mark}",
                f"{change.low:.3f}–{change.high:.3f}",
                change.verdict,
            ]
        )
    text = columns(rows) + "\n\n"
    if any(change.reference is not None for change in changes):
        text += "  * corrected by how much the models of a reference in the same rounds moved\n\n"
    return text + _conclusion(changes)


def _conclusion(changes: Sequence[Change]) -> str:
    subjects = [change for change in changes if change.after.role == "subject"]
    counts = {
        verdict: sum(change.verdict == verdict for change in subjects)
        for verdict in ("slower", "faster", "same", "too few rounds")
    }
    text = f"{counts['slower']} slower, {counts['faster']} faster, {counts['same']} the same"
    if counts["too few rounds"]:
        text += f", {counts['too few rounds']} with too few rounds to tell"
    moved = [
        change.after.subject
        for change in changes
        if change.after.role == "reference" and change.verdict in ("slower", "faster")
    ]
    if moved:
        names = ", ".join(dict.fromkeys(moved))
        text += f". The machine, its load or the client's code changed: {names} moved too"
    return text + "."
