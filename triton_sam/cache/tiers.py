"""What a tier is, and a guard that keeps a failing one out of the way."""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from ..embedding import Embedding, EmbeddingKey

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


@dataclass(frozen=True)
class TierStats:
    """What one tier did since it was made, and what it holds.

    ``hits``, ``misses``, ``stored``: look-ups and writes. ``evictions``: entries that made room
    for others. ``damaged``: entries that could not be read and were dropped. ``errors``: calls
    that failed. ``entries`` and ``nbytes``: what it holds now, with the entries of other programs
    that share it; ``None`` where asking would be costly (Redis).
    """

    name: str
    hits: int = 0
    misses: int = 0
    stored: int = 0
    evictions: int = 0
    damaged: int = 0
    errors: int = 0
    entries: int | None = None
    nbytes: int | None = None


@dataclass(frozen=True)
class CacheStats:
    """What a whole cache did.

    ``hits``: embeddings found in any tier. ``misses``: look-ups that found none. ``encoded``:
    images encoded because of that. ``shared``: callers that waited for another's encoding
    instead of starting their own. ``tiers``: upper first.
    """

    hits: int
    misses: int
    encoded: int
    shared: int
    tiers: tuple[TierStats, ...]


class Tier(ABC):
    """A place for embeddings. Safe to use from several threads; any call may fail."""

    name: str
    in_memory = False
    """Whether its calls are too short to be moved off an event loop."""

    @abstractmethod
    def get(self, key: EmbeddingKey) -> Embedding | None:
        """The embedding stored under ``key``, or ``None``."""

    @abstractmethod
    def put(self, embedding: Embedding) -> bool:
        """Store it under its own key; ``False`` when it is too large for this tier."""

    @abstractmethod
    def clear(self) -> None:
        """Drop every entry."""

    @abstractmethod
    def stats(self) -> TierStats:
        """``evictions``, ``damaged`` and what it holds; its guard counts the rest."""

    def close(self) -> None:  # noqa: B027 - most tiers have nothing to give back
        """Give connections back; entries stay where they outlive the process."""


@dataclass
class _Breaker:
    """Says when to leave one kind of call out, after it failed."""

    verb: str
    until: float = 0.0
    failing: bool = False


@dataclass
class GuardedTier:
    """A tier that never raises: what fails is logged, and left out for ``retry_s`` seconds.

    Reading and writing are left out apart: from a full disk one can still read.
    """

    tier: Tier
    retry_s: float = 30.0
    clock: Callable[[], float] = time.monotonic
    _counted: TierStats = field(init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __post_init__(self) -> None:
        self._counted = TierStats(self.tier.name)
        self._reading, self._writing = _Breaker("read"), _Breaker("write")

    def get(self, key: EmbeddingKey, *, first_look: bool = False) -> Embedding | None:
        """What the tier has under ``key``; ``None`` also when it fails or is left out.

        ``first_look``: another one follows, so a miss does not count.
        """
        found = self._call(self._reading, lambda: self.tier.get(key))
        self._count(hits=found is not None, misses=found is None and not first_look)
        return found

    def put(self, embedding: Embedding) -> None:
        """Store, unless the tier fails or is left out."""
        self._count(stored=bool(self._call(self._writing, lambda: self.tier.put(embedding))))

    def clear(self) -> None:
        """Drop every entry, unless the tier fails or is left out."""
        self._call(self._writing, self.tier.clear)

    def close(self) -> None:
        """Close the tier, also one that is left out."""
        try:
            self.tier.close()
        except Exception as exc:
            logger.warning("cannot close the %s cache: %s", self.tier.name, exc)

    def stats(self) -> TierStats:
        """All that is known about the tier."""
        held = self._call(self._reading, self.tier.stats) or TierStats(self.tier.name)
        with self._lock:
            counted = self._counted
        return replace(
            counted,
            evictions=held.evictions,
            damaged=held.damaged,
            entries=held.entries,
            nbytes=held.nbytes,
        )

    def _call(self, breaker: _Breaker, call: Callable[[], _T]) -> _T | None:
        if self.clock() < breaker.until:
            return None
        try:
            answer = call()
        # Whatever it is, a cache that fails costs an encoding and nothing more.
        except Exception as exc:
            self._failed(breaker, exc)
            return None
        if breaker.failing:
            breaker.failing = False
            logger.info("the %s cache works again (%s)", self.tier.name, breaker.verb)
        return answer

    def _failed(self, breaker: _Breaker, exc: Exception) -> None:
        self._count(errors=True)
        with self._lock:
            known = self.clock() < breaker.until  # another thread was first to notice
            breaker.until, breaker.failing = self.clock() + self.retry_s, True
        if not known:
            logger.warning(
                "cannot %s the %s cache, left out for %g s: %s",
                *(breaker.verb, self.tier.name, self.retry_s, exc),
            )

    def _count(self, **happened: bool) -> None:
        with self._lock:
            now = {name: getattr(self._counted, name) + yes for name, yes in happened.items()}
            self._counted = replace(self._counted, **now)
