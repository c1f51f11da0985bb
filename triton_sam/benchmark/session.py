"""A whole run: server and references opened, benchmarks run, the record filled."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import ModelNotReadyError, ServerError
from ..repository import read_manifest
from ..server import EmbeddedServer
from ..server.models import find_models
from ..specs import Family
from ..specs.predictor import predictor_model
from ..transport import open_transport
from . import closed_loop, hovering, machine, throughput
from .cold import cold_start, import_times, start_timed
from .compare import MIN_SAMPLES
from .gpu import GpuSampler
from .limits import measure_work
from .measure import Plan
from .perf_analyzer import cross_check
from .record import Record
from .references import (
    Unavailable,
    memory_needed,
    model_files,
    open_references,
    require_memory,
)
from .run import OnProgress, Run, Workload
from .server_stats import Watch, open_statistics
from .subjects import OPTIONS, Which, served, served_name

_USUAL_ENCODE_S = 0.5


@dataclass(frozen=True)
class Benchmark:
    """What measures, given a run and its seconds; ``share``: of the time of all.

    ``encodes``: the share is that of an encoder that takes half a second, and grows with the root
    of what it takes.
    """

    measure: Callable[[Run, float], None]
    share: float
    encodes: bool = False

    def share_of(self, encode_s: float) -> float:
        """With an encoder that takes ``encode_s``."""
        slower = max(encode_s / _USUAL_ENCODE_S, 1.0)
        return self.share * (math.sqrt(slower) if self.encodes else 1)


# What an earlier one leaves over a later one has.
BENCHMARKS: Mapping[str, Benchmark] = {
    "click": Benchmark(partial(closed_loop.measure, cases=closed_loop.click), 0.36),
    "hover": Benchmark(hovering.measure, 0.10),
    "throughput": Benchmark(throughput.measure, 0.14),
    "encode": Benchmark(partial(closed_loop.measure, cases=closed_loop.encode), 0.25, True),
    "pipeline": Benchmark(partial(closed_loop.measure, cases=closed_loop.pipeline), 0.15, True),
}
# Of the whole time: the longest encode that is made a second time for the cold start.
_PATIENCE = 0.05
# Of the whole time: two runs and more of the encoder to know its limits.
_LIMITS = 0.2
_PERF_ANALYZER_S = 6.0
_LEAST_S = 1.0  # for what is left of the benchmarks when slow encodes have used the time up
_BUSY = 0.1  # of its processors' time


@dataclass(frozen=True)
class Target:
    """What is measured.

    ``which``: the models. ``url``: the server's address; ``None`` starts an embedded one on
    ``repository``, which is then reached over ``protocol``, http or grpc. ``repository``: also
    where the references find the model files. ``checkpoint``: weights for the PyTorch reference.
    ``references``: their names. ``notes``: lines for the record.
    """

    which: Which
    repository: Path
    url: str | None = None
    protocol: str = "grpc"
    checkpoint: Path | None = None
    references: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Server:
    """A server that runs: the address that is measured, its others, and how it started."""

    url: str
    others: tuple[str, ...]
    start_s: float | None


def measure(
    target: Target,
    benchmarks: Sequence[str],
    workload: Workload,
    plan: Plan,
    command: Sequence[str],
    say: OnProgress = lambda what, share: None,
) -> Record:
    """Run ``benchmarks`` on ``target`` in about ``plan.budget_s`` seconds, once a server runs.

    ``command``: what was typed, for the record. Raises a :class:`ServerError` when the server
    cannot be reached, or an :class:`EmbeddedServerError`.
    """
    begun = time.perf_counter()
    family = target.which.family  # says first whether there is such a variant
    record = _new_record(target, workload, plan, command)
    busy = machine.Busy()
    with ExitStack() as stack:
        server = stack.enter_context(_open_server(target))
        target = replace(target, which=_resolved(target.which, server.url))
        end = time.perf_counter() + plan.budget_s
        watch = stack.enter_context(_watch(server, family, record.notes))
        record.server.update(_describe_server(server, target))
        if server.start_s is not None:
            record.cold_start["server start"] = server.start_s
        source = workload.source()
        record.cold_start.update(import_times())
        patience_s = _PATIENCE * plan.budget_s
        steps = cold_start(server.url, target.which, source, patience_s)
        encode_s = steps.get("second set_image", steps["first set_image"])
        record.cold_start.update(steps)
        _limits(record, target, encode_s, plan.budget_s)
        subject = stack.enter_context(served(server.url, target.which, watch))
        references, reasons = stack.enter_context(_references(target, server, watch))
        record.notes.extend(reasons)
        gpu = stack.enter_context(GpuSampler())
        subjects = [subject, *references]
        run = Run(target.which, record, subjects, workload, plan, say, encode_s)
        _run_all(run, benchmarks, end)
        _cross_check(record, server.url, target)
    record.gpus.extend(gpu.summary())
    record.machine["busy"] = busy.share()
    return replace(record, duration_s=round(time.perf_counter() - begun, 1))


def _resolved(which: Which, url: str) -> Which:
    """``which``, with embeddings on the server where it can keep them, unless they are said."""
    predictor = predictor_model(which.family).name
    pair = [model.name for model in which.family.models]
    with closing(open_transport(url, OPTIONS)) as transport:
        if which.embedding == "auto":
            try:
                transport.check_ready([predictor])
                return replace(which, embedding="server")
            except ModelNotReadyError:
                which = replace(which, embedding="client")
        transport.check_ready([predictor] if which.embedding == "server" else pair)
    return which


def _new_record(target: Target, workload: Workload, plan: Plan, command: Sequence[str]) -> Record:
    where = machine.describe()
    notes = list(target.notes)
    if where["gpus"]:
        notes.append("The references in process ran on the processor, not on a GPU.")
    if where["busy_before"] > _BUSY:
        notes.append(
            f"The machine was {where['busy_before']:.0%} busy before this began: measure again "
            "when it does nothing else."
        )
    settings = {**asdict(workload), "budget_s": plan.budget_s, "precision": plan.precision}
    return Record(
        command=list(command),
        started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=where,
        versions=machine.versions(),
        server={"family": target.which.model_type},
        settings=settings,
        notes=notes,
    )


def _run_all(run: Run, benchmarks: Sequence[str], end: float) -> None:
    """Each gets its share of the time that is left: what one leaves over, the others have."""
    shares = {name: BENCHMARKS[name].share_of(run.encode_s) for name in benchmarks}
    for name in benchmarks:
        left = max(end - time.perf_counter(), _LEAST_S)
        BENCHMARKS[name].measure(run, left * shares[name] / sum(shares.values()))
        del shares[name]
    if run.left_out:
        what = "; ".join(run.left_out)
        run.record.notes.append(f"Left out for want of time: {what}. Give a larger --budget.")
    run.record.notes.extend(_short(run.record))


def _short(record: Record) -> Iterator[str]:
    few = dict.fromkeys(
        f"{series.benchmark}: {series.workload}"
        for series in record.series
        if series.role == "subject" and len(series.seconds) < MIN_SAMPLES
    )
    if few:
        yield (
            f"Fewer than {MIN_SAMPLES} rounds of {'; '.join(few)}: too few to compare. Give a "
            "larger --budget, or fewer --megapixels, --masks or --references."
        )


@contextmanager
def _open_server(target: Target) -> Iterator[_Server]:
    if target.url is not None:
        yield _Server(target.url, (), None)
        return
    server = EmbeddedServer(target.repository, models=_models(target))
    try:
        seconds = start_timed(server)
        urls = {"http": f"http://{server.http_url}", "grpc": server.url}
        measured = urls.pop(target.protocol)
        yield _Server(measured, tuple(urls.values()), seconds)
    finally:
        server.stop()


def _models(target: Target) -> list[str]:
    """What an embedded server has to serve, where that is not everything.

    Its pair would be in memory once more, and SAM 3's takes 4 GB before it runs.
    """
    predictor = predictor_model(target.which.family).name
    there = predictor in find_models(target.repository).names
    asks_pair = target.which.embedding == "client" or "inline" in target.references
    return [predictor] if there and not asks_pair else []


def _references(target: Target, server: _Server, watch: Watch | None) -> Any:
    return open_references(
        target.references,
        target.which,
        target.repository,
        server.url,
        server.others,
        watch,
        target.checkpoint,
    )


@contextmanager
def _watch(server: _Server, family: Family, notes: list[str]) -> Iterator[Watch | None]:
    """The server's counters, over HTTP where it can be had: asking costs less there."""
    address = next((url for url in (server.url, *server.others) if "http" in url), server.url)
    watch = Watch(open_statistics(address), family.name)
    with closing(watch):
        try:
            watch.start()
        except ServerError as exc:
            notes.append(f"The server's share of the time is unknown: {exc}")
            yield None
        else:
            yield watch


def _describe_server(server: _Server, target: Target) -> dict[str, Any]:
    family = target.which.family
    manifest = read_manifest(target.repository, family.encoder.name) or {}
    embedded = server.start_s is not None
    return {
        "title": family.title,
        "variant": manifest.get("variant") or target.which.variant,
        "precision": manifest.get("precision"),
        "embedded": embedded,
        "address": "embedded" if embedded else server.url,
        "subject": served_name(server.url, target.which),
        "model_bytes": {
            model.name: (read_manifest(target.repository, model.name) or {}).get("bytes")
            for model in family.models
        },
    }


def _limits(record: Record, target: Target, encode_s: float, budget_s: float) -> None:
    """Operations and bytes of each model beside the machine's peak."""
    models = list(target.which.family.models)
    if 2.5 * encode_s > _LIMITS * budget_s:
        models.remove(target.which.family.encoder)
        record.notes.append("No limits of the encoder, which takes long: give a larger --budget.")
    try:
        family = target.which.family
        files = model_files(target.repository, family)
        needed = memory_needed("onnxruntime", files)
        require_memory(needed, machine.available_memory())
        work = [measure_work(files[model.name], model) for model in models]
    except (Unavailable, ImportError) as exc:
        record.notes.append(f"No limits: {exc}")
        return
    peak = machine.measure_peak()
    record.limits["peak"] = asdict(peak)
    record.limits["models"] = [asdict(one) | {"bounds": one.bounds(peak)} for one in work]


def _cross_check(record: Record, url: str, target: Target) -> None:
    found = cross_check(url, target.which.family, _PERF_ANALYZER_S)
    if found is None:
        record.notes.append("No cross-check: perf_analyzer is not installed, or it failed.")
    else:
        record.cross_checks.append(asdict(found))
