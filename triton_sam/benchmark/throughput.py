"""``throughput``: 1 to N clients that click, each with an embedding of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from ..client import SAM2TritonClient
from ..embedding import Embedding
from .measure import is_precise
from .operations import Source
from .record import Series, Throughput
from .run import Run
from .server_stats import Counters
from .statistics import percentiles
from .subjects import Subject, served
from .sweep import Level, concurrency_levels, run_segment

_SEGMENTS = 10
_MIN_SEGMENTS = 1
_SHORTEST_S = 0.3
# Of the time, for encoding the photo that each client has for itself.
_ENCODING = 0.2

Ask = Callable[[int], object]


@dataclass
class _Measured:
    """A level, what the server counted meanwhile, and :meth:`Subject.call_s` of each segment."""

    level: Level
    counters: Counters = field(default_factory=Counters)
    calls: list[float | None] = field(default_factory=list)


def measure(run: Run, budget_s: float) -> None:
    """Every level of every subject in turn, several times.

    Those after the first reference are asked by one client and by the most, and no other number.
    """
    every = concurrency_levels(run.workload.clients)
    subjects = run.low_resolution
    levels = {
        subject.name: every if number < 2 else sorted({every[0], every[-1]})
        for number, subject in enumerate(subjects)
    }
    found = {(s.name, n): _Measured(Level(n)) for s in subjects for n in levels[s.name]}
    seconds = max(budget_s / (_SEGMENTS * len(found)), _SHORTEST_S)
    what = f"throughput: 1 to {every[-1]} clients"
    photos = every[-1]
    if run.encode_s > 0:
        photos = max(1, min(photos, int(_ENCODING * budget_s / run.encode_s)))
    if photos < every[-1]:
        run.record.notes.append(f"throughput: the clients shared {_photos(photos)}.")
    with ExitStack() as stack:
        asks = {s.name: stack.enter_context(_clients(run, s, every[-1], photos)) for s in subjects}
        for turn in run.turns(what, budget_s, _MIN_SEGMENTS, 3 * _SEGMENTS):
            for subject in subjects:
                for n in levels[subject.name][:: 1 if turn % 2 == 0 else -1]:
                    _segment(subject, asks[subject.name][:n], seconds, found[subject.name, n])
    for subject in subjects:
        for n in levels[subject.name]:
            _add(run, subject, found[subject.name, n])


def _photos(count: int) -> str:
    return "one photo" if count == 1 else f"{count} photos"


@contextmanager
def _clients(run: Run, subject: Subject, count: int, photos: int) -> Iterator[list[Ask]]:
    """What each of ``count`` clients calls; those of a server have a connection each.

    ``photos``: how many different ones they have, if the server keeps the embeddings.
    """
    source = run.workload.source()
    with ExitStack() as stack:
        asks = []
        for number in range(count):
            client = subject.client
            if subject.url is not None:
                which = subject.which or run.which
                client = stack.enter_context(served(subject.url, which)).client
            embedding = _copy(run.embedding_of(subject, number % photos))
            asks.append(_ask(client, source, number, embedding))
        yield asks


def _copy(embedding: Embedding) -> Embedding:
    """In memory of its own, as that of another image would be; others have theirs already."""
    if type(embedding) is not Embedding:
        return embedding
    tensors = {name: tensor.copy() for name, tensor in embedding.tensors.items()}
    return replace(embedding, tensors=tensors)


def _ask(client: SAM2TritonClient, source: Source, number: int, embedding: Embedding) -> Ask:
    def ask(turn: int) -> object:
        click = source.clicks(1, 1000 * number + turn % 1000)
        return client.predict(click.points, click.labels, embedding=embedding)

    return ask


def _segment(subject: Subject, asks: list[Ask], seconds: float, measured: _Measured) -> None:
    before = len(measured.level.seconds)
    subject.start()
    run_segment(asks, seconds, measured.level)
    if subject.watch is not None:
        measured.counters += subject.watch.stop(len(measured.level.seconds) - before)
    measured.calls.append(subject.call_s())


def _add(run: Run, subject: Subject, measured: _Measured) -> None:
    level, counters = measured.level, measured.counters
    per_request = (
        {name: value / counters.requests for name, value in counters.seconds().items()}
        if counters.requests
        else {}
    )
    rate = float(np.median(level.rates))
    title = f"{level.clients} client{'' if level.clients == 1 else 's'}"
    run.record.throughput.append(
        Throughput(
            subject=subject.name,
            role=subject.role,
            workload="1 prompt, logits",
            clients=level.clients,
            rate=rate,
            rates=level.rates,
            latencies=percentiles(level.seconds) if level.seconds else {},
            stages=per_request,
            failures=level.failures,
        )
    )
    answered = [index for index, rate in enumerate(level.rates) if rate > 0]
    each = [1 / level.rates[index] for index in answered]
    calls = [measured.calls[index] for index in answered]
    if each:
        run.record.series.append(
            Series(
                "throughput",
                title,
                subject.name,
                subject.role,
                each,
                is_precise(each, run.plan.precision),
                yardstick=[call for call in calls if call is not None],
            )
        )
