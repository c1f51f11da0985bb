"""The record as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Mapping
from importlib.resources import files as package_files
from pathlib import Path

from ..errors import MissingExtraError
from ..files import write_atomically
from . import limit_table, table
from .plots import draw
from .record import Record, write_record

RECORD_FILE = "benchmark.json"
REPORT_FILE = "report.html"


def write_all(record: Record, folder: Path) -> list[Path]:
    """Write JSON, PNG and HTML files of ``record`` into ``folder``; their paths are returned.

    Raises :class:`MissingExtraError` without the extra ``benchmark``, after the JSON is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_record(record, folder / RECORD_FILE)
    pictures = draw(record)
    for name, data in pictures.items():
        write_atomically(folder / f"{name}.png", data)
    write_atomically(folder / REPORT_FILE, render(record, pictures).encode())
    names = [RECORD_FILE, *(f"{name}.png" for name in pictures), REPORT_FILE]
    return [folder / name for name in names]


def render(record: Record, pictures: Mapping[str, bytes]) -> str:
    """The HTML page; ``pictures``: PNG files by name, as :func:`~.plots.draw` makes them."""
    try:
        import jinja2
    except ModuleNotFoundError as exc:
        raise MissingExtraError("Reports need jinja2: pip install 'triton-sam[benchmark]'") from exc
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(ms=table.ms, size=table.size, shell=shlex.join)
    source = package_files("triton_sam") / "benchmark" / "templates" / "report.html"
    return environment.from_string(source.read_text()).render(
        record=record,
        headings=table.HEADINGS,
        rows_of=table.rows_of,
        hover_headings=table.HOVER_HEADINGS,
        hover_rows=list(table.hover_rows(record)),
        throughput_headings=table.THROUGHPUT_HEADINGS,
        throughput_rows=list(table.throughput_rows(record)),
        limits=list(limit_table.rows(record)),
        limit_headings=limit_table.HEADINGS,
        limit_peak=limit_table.peak(record),
        limit_about=limit_table.ABOUT,
        pictures={name: _data_url(data) for name, data in pictures.items()},
        details=_details(record),
    )


def _details(record: Record) -> str:
    parts = (record.machine, record.versions, record.server, record.settings)
    return json.dumps(
        dict(zip(("machine", "versions", "server", "settings"), parts, strict=True)), indent=1
    )


def _data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()
