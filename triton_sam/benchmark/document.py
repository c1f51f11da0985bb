"""``docs/performance.md`` from stored records."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import limit_table
from .record import Record, Series
from .table import (
    HEADINGS,
    HOVER_HEADINGS,
    THROUGHPUT_HEADINGS,
    hover_rows,
    ms,
    ratio,
    rows_of,
    throughput_rows,
)

_INTRODUCTION = """# Performance

Made by `triton-sam benchmark document` from the stored results named under each heading; do not
edit it by hand. Machine and command stand beside every figure. Times are milliseconds of the whole
operation as its caller feels it, against a running server.

- **n** rounds, **±** half of the median's 95 % interval ("open": too few rounds to say).
- **× ref**: the median as a multiple of the first reference's, which is the pair in ONNX Runtime in
  this process. All rows of a table were measured in turn, in the same rounds, so that whatever the
  machine did meets all of them; a row with a smaller n was in the first rounds only, and its × ref
  is of those.
- **client+wire**: the client's time minus the server's, by the server's own count.
- **up**, **down**: bytes of one operation at the client's socket.
- **where the time goes**: *client* is this process outside its transport (decoding, resizing,
  masks), *wire* what is in the transport but not on the server, the rest Triton's own split. *wire
  and server* stands for both where embeddings lie on the server, whose predictor answers later than
  Triton counts.
"""


def render(records: Sequence[tuple[Path, Record]]) -> str:
    """The page. ``records``: with the files that they are stored in."""
    blocks = [_INTRODUCTION, _overview([record for _, record in records])]
    for path, record in records:
        blocks += _sections(path, record)
    return "\n".join(blocks)


def _overview(records: Sequence[Record]) -> str:
    rows = []
    for record in records:
        cells = [record.title, _machine(record)]
        for benchmark in ("encode", "click", "pipeline"):
            workload, rivals = next(iter(record.of(benchmark).items()), ("", []))
            size = f", {workload}" if benchmark == "encode" and rivals else ""
            cells.append(_medians(rivals) + size)
        best = max((one.rate for one in record.throughput if one.role == "subject"), default=None)
        cells.append("–" if best is None else f"{best:.1f}")
        rows.append(cells)
    heads = ("model", "machine", "encode", "click", "image and mask", "masks/s at best")
    return "## Overview\n\nMedians; in brackets as a multiple of the first reference.\n\n" + _table(
        heads, rows
    )


def _medians(rivals: Sequence[Series]) -> str:
    if not rivals:
        return "–"
    subject, *references = rivals
    text = ms(subject.median.value)
    if references:
        text += f" ({ratio(subject, rivals)})"
    return text


def _sections(path: Path, record: Record) -> Iterator[str]:
    server = record.server
    yield f"## {server.get('title')} {server.get('variant') or ''}".rstrip() + "\n"
    yield (
        f"{_machine(record)}, {record.machine['memory_gib']} GiB; "
        f"{record.started[:10]}; processors busy {100 * record.machine.get('busy', 0):.0f} % "
        f"of the run. Stored in `{path.name}`.\n\n```sh\n{shlex.join(record.command)}\n```\n"
    )
    yield from (f"> {note}\n" for note in record.notes)
    for benchmark in ("encode", "click", "pipeline", "hover"):
        for workload, rivals in record.of(benchmark).items():
            yield f"### {benchmark}: {workload}\n\n" + _table(HEADINGS, rows_of(rivals))
    yield from _hover(record)
    yield from _throughput(record)
    yield from _stages(record)
    yield from _limits(record)
    yield from _cold(record)


def _machine(record: Record) -> str:
    where = record.machine
    gpus = f", {'; '.join(where['gpus'])}" if where.get("gpus") else ""
    return f"{where['processor']}, {where['cores']} cores{gpus}"


def _hover(record: Record) -> Iterator[str]:
    if record.hovering:
        rows = _table(HOVER_HEADINGS, hover_rows(record))
        yield "### hover: from each event until its mask or a newer one\n\n" + rows


def _throughput(record: Record) -> Iterator[str]:
    if record.throughput:
        yield "### throughput\n\n" + _table(THROUGHPUT_HEADINGS, throughput_rows(record))


def _stages(record: Record) -> Iterator[str]:
    """Where a click's time goes, and what the client does in its part of it."""
    for workload, rivals in record.of("click").items():
        stages = rivals[0].stages
        if stages:
            yield f"### where the time goes: {workload}, {rivals[0].subject}\n\n" + _table(
                list(stages), [[ms(value) for value in stages.values()]]
            )
        busy = [
            line for line in record.profiles.get(f"click: {workload}", []) if not line["waiting"]
        ]
        if busy:
            named = (f"`{line['function']}` {ms(line['seconds'])}" for line in busy[:4])
            yield "The client's own part, by Python's profiler: " + ", ".join(named) + ".\n"


def _limits(record: Record) -> Iterator[str]:
    rows = list(limit_table.rows(record))
    if rows:
        yield (
            f"### what limits it\n\n{limit_table.peak(record)} {limit_table.ABOUT}\n\n"
            + _table(limit_table.HEADINGS, rows)
        )


def _cold(record: Record) -> Iterator[str]:
    if record.cold_start:
        steps = (f"{step} {seconds:.2f} s" for step, seconds in record.cold_start.items())
        yield "### cold start\n\n" + ", ".join(steps) + ".\n"


def _table(heads: Sequence[str], rows: Iterator[list[str]] | Sequence[list[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
