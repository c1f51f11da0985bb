"""The record as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from .record import Record, Series


def render(record: Record) -> str:
    """Every number of ``record`` that people ask for first; times in milliseconds."""
    blocks = [_head(record), *_closed(record), *_hover(record), *_throughput(record)]
    blocks += [*_cold(record), *_notes(record)]
    return "\n\n".join(blocks) + "\n"


def ms(seconds: float | None) -> str:
    """Milliseconds with about three digits."""
    if seconds is None:
        return "–"
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def size(count: int | None) -> str:
    """Bytes with a unit of a thousand."""
    if count is None:
        return "–"
    value, units = float(count), iter(("B", "kB", "MB", "GB"))
    unit = next(units)
    while value >= 1000:
        value, unit = value / 1000, next(units)
    return f"{value:.3g} {unit}"


def ratio(series: Series, rivals: Sequence[Series]) -> str:
    """The median as a multiple of the first reference's among ``rivals``, in the same rounds."""
    reference = next((one for one in rivals if one.role == "reference"), None)
    if reference is None:
        return "–"
    rounds = min(len(series.seconds), len(reference.seconds))
    mine, theirs = (median(one.seconds[:rounds]) for one in (series, reference))
    return f"{mine / theirs:.2f}"


def rows_of(rivals: Sequence[Series]) -> Iterator[list[str]]:
    """A row for each series of a workload: name, percentiles, sureness, ratio, bytes."""
    for one in rivals:
        found, interval = one.percentiles, one.median
        wire = one.wire or {}
        yield [
            one.subject,
            *(ms(found[name]) for name in ("p50", "p90", "p95", "p99")),
            f"{100 * interval.half_width:.1f} %" if interval.half_width < 10 else "open",
            str(len(one.seconds)),
            ratio(one, rivals),
            ms(one.overhead_s),
            size(wire.get("up")),
            size(wire.get("down")),
        ]


def hover_rows(record: Record) -> Iterator[list[str]]:
    """A row for each subject that was hovered over."""
    for one in record.hovering:
        counts = (one.events, one.answered, one.cancelled, one.dropped, one.executed)
        latencies = [ms(value) for value in one.latencies.values()]
        yield [one.subject, *("–" if c is None else str(c) for c in counts), *latencies]


def throughput_rows(record: Record) -> Iterator[list[str]]:
    """A row for each subject and number of clients."""
    for one in record.throughput:
        yield [
            one.subject,
            str(one.clients),
            f"{one.rate:.1f}",
            *(ms(one.latencies.get(name)) for name in ("p50", "p95", "p99")),
            *(ms(one.stages.get(name)) for name in ("queue", "compute")),
            str(one.failures),
        ]


HEADINGS = ("", "p50", "p90", "p95", "p99", "±", "n", "× ref", "client+wire", "up", "down")
HOVER_HEADINGS = (
    *("", "events", "answered", "cancelled", "dropped", "executed"),
    *("p50", "p90", "p95", "p99"),
)
THROUGHPUT_HEADINGS = (
    *("", "clients", "masks/s", "p50", "p95", "p99", "queue", "compute", "failed"),
)


def _head(record: Record) -> str:
    where = record.machine
    server = record.server
    return (
        f"{server.get('title')} {server.get('variant') or ''}, {server.get('address')}; "
        f"{where['processor']}, {where['cores']} cores, {where['memory_gib']} GiB; "
        f"{record.duration_s:.0f} s, processors busy {100 * where.get('busy', 0):.0f} %\n"
        "Times in ms. ±: half of the median's 95 % interval. × ref: median against the first "
        "reference.\nclient+wire: the client's time minus the server's."
    )


def _closed(record: Record) -> Iterator[str]:
    for benchmark in ("encode", "click", "pipeline", "hover"):
        for workload, rivals in record.of(benchmark).items():
            yield f"{benchmark}: {workload}\n" + columns([HEADINGS, *rows_of(rivals)])


def _hover(record: Record) -> Iterator[str]:
    if record.hovering:
        rows = [HOVER_HEADINGS, *hover_rows(record)]
        yield "hover: from each event until its mask or a newer one\n" + columns(rows)


def _throughput(record: Record) -> Iterator[str]:
    if record.throughput:
        rows = [THROUGHPUT_HEADINGS, *throughput_rows(record)]
        yield "throughput: clients that click at once\n" + columns(rows)


def _cold(record: Record) -> Iterator[str]:
    if record.cold_start:
        rows = [[step, f"{seconds:.3f} s"] for step, seconds in record.cold_start.items()]
        yield "cold start\n" + columns(rows)


def _notes(record: Record) -> Iterator[str]:
    if record.notes:
        yield "\n".join(f"note: {note}" for note in record.notes)


def columns(rows: Sequence[Sequence[str]]) -> str:
    """``rows`` under each other: the first column to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  "
        + "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
