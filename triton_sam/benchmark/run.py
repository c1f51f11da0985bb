"""What every benchmark is given: who is measured, with what, for how long."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ..embedding import Embedding
from .measure import Plan
from .operations import Source
from .record import Record
from .subjects import Subject, Which
from .workloads import photo

OnProgress = Callable[[str, float], None]


@dataclass(frozen=True)
class Workload:
    """What is asked for.

    ``megapixels``: sizes of the photos of ``encode``; everything else is about the first.
    ``image``: a photo of your own instead of the shipped one. ``prompts``: in one call of
    ``click``. ``masks``: of ``pipeline``, for each photo. ``clients``: the most of
    ``throughput``. ``rate_hz``, ``burst_s``: events a second and length of a burst of ``hover``.
    """

    megapixels: tuple[float, ...] = (1.0, 12.0)
    image: str | None = None
    prompts: tuple[int, ...] = (1, 10)
    masks: tuple[int, ...] = (1, 10)
    clients: int = 8
    rate_hz: float = 60.0
    burst_s: float = 0.5

    def source(self, megapixels: float | None = None) -> Source:
        """A photo of so many megapixels, by default of the first size."""
        return Source(photo(megapixels or self.megapixels[0], self.image))


@dataclass(frozen=True)
class Run:
    """One run of a command.

    ``which``: the models. ``record``: where what is found goes. ``subjects``: the first is the
    one that the others are references for. ``say``: is told what is measured and how much of its
    time is spent, 0 to 1. ``encode_s``: what an image took in the cold start, to know what fits.
    ``left_out``: what did not.
    """

    which: Which
    record: Record
    subjects: Sequence[Subject]
    workload: Workload
    plan: Plan
    say: OnProgress = lambda what, share: None
    encode_s: float = 0.0
    left_out: list[str] = field(default_factory=list)

    @cached_property
    def embedding(self) -> Embedding:
        """Of the photo that clicks are about: encoded once for all that have it with them.

        With a slow encoder every other encode would take time that nobody measures.
        """
        able = [subject for subject in self.low_resolution if not subject.keeps_embeddings]
        return able[0].client.encode(self.workload.source().file(0))

    def embedding_of(self, subject: Subject, number: int = 0) -> Embedding:
        """As :attr:`embedding`, for one subject; of one that keeps them a photo each ``number``."""
        if subject.keeps_embeddings:
            return subject.client.encode(self.workload.source().file(number))
        return self.embedding

    @property
    def low_resolution(self) -> list[Subject]:
        """Those that can give low-resolution logits and be asked by several threads."""
        return [subject for subject in self.subjects if not subject.full_size_only]

    def turns(self, what: str, budget_s: float, at_least: int, at_most: int) -> Iterator[int]:
        """0, 1, 2, … until the budget is spent, within bounds."""
        started = time.perf_counter()
        for turn in range(at_most):
            spent = time.perf_counter() - started
            if turn >= at_least and spent * (turn + 1) / turn > budget_s:
                break
            self.say(what, spent / budget_s)
            yield turn
        self.say(what, 1.0)
