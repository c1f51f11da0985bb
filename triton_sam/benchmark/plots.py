"""Pictures of a record: how the times are spread, how they grow with load, where they go."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from typing import Any

import numpy as np

from ..errors import MissingExtraError
from .record import Record, Series, Throughput
from .table import ms

# Okabe and Ito's colours, which people with any colour vision can tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
STAGES = {
    "client": "#E69F00",
    "wire": "#D55E00",
    "wire and server": "#B07AA1",
    "queue": "#CC79A7",
    "input": "#56B4E9",
    "compute": "#0072B2",
    "output": "#009E73",
    "server, other": "#999999",
    "in process": "#444444",
}
_NARROW = 8.0  # inches, for a legend in two columns
_FEW = 20  # so many times are too few for a smooth curve: each is marked
_STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "font.size": 10,
    "figure.dpi": 130,
    "savefig.bbox": "tight",
}


def draw(record: Record) -> dict[str, bytes]:
    """The PNG files of ``record`` by name; those without data are left out.

    Raises :class:`MissingExtraError` without matplotlib.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as exc:
        raise MissingExtraError(
            "Plots need matplotlib: pip install 'triton-sam[benchmark]'"
        ) from exc
    drawn: dict[str, bytes] = {}
    colours = _colours(record)
    with matplotlib.rc_context(_STYLE):
        for benchmark in ("encode", "click", "pipeline", "hover"):
            workloads = record.of(benchmark)
            if workloads:
                drawn[f"{benchmark}-latency"] = _latency(benchmark, workloads, colours)
        if record.throughput:
            drawn["throughput"] = _throughput(record.throughput, colours)
        bars = list(_bars(record))
        if bars:
            drawn["stages"] = _stages(bars)
    return drawn


def _colours(record: Record) -> dict[str, str]:
    """A colour for each subject, the same in every picture."""
    names = dict.fromkeys(series.subject for series in record.series)
    return dict(zip(names, itertools.cycle(COLOURS), strict=False))


def _figure(rows: int, columns: int, width: float, height: float, **options: Any) -> Any:
    """A figure and its axes, row by row, without pyplot, which would keep it alive."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _png(figure: Any) -> bytes:
    data = BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()


def _latency(benchmark: str, workloads: dict[str, list[Series]], colours: dict[str, str]) -> bytes:
    """Cumulative distributions: the share of operations that took no longer."""
    count = len(workloads)
    figure, axes = _figure(1, count, 4.6 * count + 0.6, 4.3)
    for axis, (workload, rivals) in zip(axes[0], workloads.items(), strict=True):
        for series in rivals:
            _cumulative(axis, series, colours[series.subject])
        axis.set_title(f"{benchmark}: {workload}", fontsize=10)
        axis.set_xlabel("milliseconds")
        # A single outlier far out would press all curves against the left edge.
        axis.set_xlim(0, 1.3e3 * max(series.percentiles["p99"] for series in rivals))
        axis.set_ylim(0, 1.01)
    axes[0][0].set_ylabel("share of operations done")
    _legend_below(figure, axes[0])
    return _png(figure)


def _cumulative(axis: Any, series: Series, colour: str) -> None:
    ordered = np.sort(np.asarray(series.seconds)) * 1e3
    ordered = np.concatenate([ordered[:1], ordered])
    share = np.linspace(0, 1, len(ordered))
    dashed = "--" if series.role == "reference" else "-"
    axis.step(ordered, share, dashed, where="post", color=colour, label=series.subject)
    if len(series.seconds) < _FEW:
        axis.plot(ordered[1:], share[1:], "D", color=colour, markersize=2.5)
    axis.plot(series.median.value * 1e3, 0.5, "o", color=colour, markersize=4)


def _legend_below(figure: Any, axes: Iterable[Any]) -> None:
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    narrow = figure.get_figwidth() < _NARROW
    columns = 2 if narrow or len(found) <= 4 else 3 if len(found) <= 6 else 4
    figure.legend(
        found.values(), found.keys(), loc="outside lower center", ncols=columns, frameon=False
    )


def _throughput(levels: Sequence[Throughput], colours: dict[str, str]) -> bytes:
    figure, axes = _figure(1, 2, 10, 4.3)
    names = dict.fromkeys(level.subject for level in levels)
    for name in names:
        colour = colours[name]
        mine = [level for level in levels if level.subject == name]
        clients = [level.clients for level in mine]
        dashed = "--" if mine[0].role == "reference" else "-"
        axes[0][0].plot(clients, [m.rate for m in mine], f"o{dashed}", color=colour, label=name)
        # Without a single answer there is none, and a gap in the curve.
        p50, p95 = ([1e3 * m.latencies.get(q, np.nan) for m in mine] for q in ("p50", "p95"))
        axes[0][1].plot(clients, p50, f"o{dashed}", color=colour, label=name)
        if mine[0].role == "subject" or len(mine) > 2:  # else over what lies between
            axes[0][1].fill_between(clients, p50, p95, color=colour, alpha=0.15, linewidth=0)
    for axis, title in zip(axes[0], ("masks per second", "milliseconds"), strict=True):
        axis.set_xscale("log", base=2)
        ticks = sorted({level.clients for level in levels})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set_xlabel("clients at once")
        axis.set_ylabel(title)
        axis.set_ylim(bottom=0)
    axes[0][0].set_title("throughput", fontsize=10)
    axes[0][1].set_title("latency: median, shaded up to p95", fontsize=10)
    _legend_below(figure, axes[0])
    return _png(figure)


def _bars(record: Record) -> Iterator[tuple[str, str, dict[str, float]]]:
    for benchmark in ("click", "encode", "pipeline"):
        for workload, rivals in record.of(benchmark).items():
            for series in rivals:
                if series.stages:
                    yield f"{benchmark}: {workload}", series.subject, series.stages


def _stages(bars: list[tuple[str, str, dict[str, float]]]) -> bytes:
    """A panel for each workload, since an encode would dwarf every click."""
    titles = list(dict.fromkeys(title for title, _, _ in bars))
    counts = [sum(1 for title, _, _ in bars if title == wanted) for wanted in titles]
    height = 0.34 * sum(counts) + 0.75 * len(titles) + 0.8
    heights = [count + 1 for count in counts]
    figure, grid = _figure(len(titles), 1, 9.5, height, height_ratios=heights)
    axes = grid[:, 0]
    for axis, wanted in zip(axes, titles, strict=True):
        mine = [(name, stages) for title, name, stages in bars if title == wanted]
        _stack(axis, mine)
        axis.set_title(wanted, loc="left", fontsize=10)
    axes[-1].set_xlabel("milliseconds of a typical operation (mean of the middle half)")
    _legend_below(figure, axes)
    return _png(figure)


def _stack(axis: Any, bars: list[tuple[str, dict[str, float]]]) -> None:
    for row, (_, stages) in enumerate(bars):
        left = 0.0
        for stage in (stage for stage in STAGES if stage in stages):
            width = stages[stage] * 1e3
            axis.barh(row, width, left=left, color=STAGES[stage], height=0.66, label=stage)
            left += width
        axis.text(left, row, f" {ms(left / 1e3)} ms", va="center", fontsize=9)
    axis.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=9)
    axis.set_ylim(len(bars) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)
    axis.set_xlim(0, 1.12e3 * max(sum(stages.values()) for _, stages in bars))
