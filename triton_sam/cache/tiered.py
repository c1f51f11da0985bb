"""Several tiers as one cache, in front of an encoder."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from ..embedding import Embedding, EmbeddingKey
from ..errors import InvalidInputError
from .flights import Flights
from .tiers import CacheStats, GuardedTier, Tier

if TYPE_CHECKING:
    from typing_extensions import Self

_T = TypeVar("_T")


class EmbeddingCache:
    """Finds an embedding in the first tier that has it, or has it encoded, once.

    ``tiers``: from the fastest to the slowest. What a lower one has is copied into those above.
    A tier that fails is logged, left out for ``retry_s`` seconds and tried again; it never makes
    a call fail. Without tiers nothing is kept, and concurrent callers still share an encoding.

    Safe to share between threads, event loops and clients.
    """

    def __init__(self, *tiers: Tier, retry_s: float = 30.0) -> None:
        self._tiers = [GuardedTier(tier, retry_s) for tier in tiers]
        self._flights: Flights[Embedding] = Flights()
        self._hits = self._misses = self._encoded = 0
        self._lock = threading.Lock()

    def get(self, key: EmbeddingKey) -> Embedding | None:
        """The embedding under ``key`` from the first tier that has it, or ``None``."""
        found = self._look_up(key)
        with self._lock:
            self._hits += found is not None
            self._misses += found is None
        return found

    def put(self, embedding: Embedding) -> None:
        """Store an embedding in every tier."""
        for tier in self._tiers:
            tier.put(embedding)

    @property
    def keeps(self) -> bool:
        """Whether it has a tier."""
        return bool(self._tiers)

    def get_or_encode(
        self,
        key: EmbeddingKey,
        encode: Callable[[], Embedding],
        timeout_s: float | None = None,
    ) -> Embedding:
        """The embedding under ``key``; where no tier has it, ``encode()``, which is stored.

        Callers that ask for the same key meanwhile wait for this one, at most ``timeout_s``
        seconds. Raises what ``encode`` raises, :class:`ServerTimeoutError` after a wait that is
        too long, and :class:`InvalidInputError` when ``encode`` returns another key's embedding.
        """
        return self._in_memory(key) or self._flights.run(
            key, lambda: self.get(key) or self._keep(key, encode()), timeout_s
        )

    async def get_or_encode_async(
        self,
        key: EmbeddingKey,
        encode: Callable[[], Awaitable[Embedding]],
        timeout_s: float | None = None,
    ) -> Embedding:
        """As :meth:`get_or_encode`. The slow tiers are asked in a thread."""

        async def find() -> Embedding:
            found = await self._off_loop(lambda: self.get(key))
            if found is not None:
                return found
            embedding = await encode()
            return await self._off_loop(lambda: self._keep(key, embedding))

        return self._in_memory(key) or await self._flights.run_async(key, find, timeout_s)

    def clear(self) -> None:
        """Drop every entry of every tier, also those of other programs that share them."""
        for tier in self._tiers:
            tier.clear()

    def stats(self) -> CacheStats:
        """What it did so far, and what its tiers hold."""
        tiers = tuple(tier.stats() for tier in self._tiers)
        with self._lock:
            return CacheStats(self._hits, self._misses, self._encoded, self._flights.shared, tiers)

    def close(self) -> None:
        """Give connections back. What is on disk and in Redis stays."""
        for tier in self._tiers:
            tier.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _in_memory(self, key: EmbeddingKey) -> Embedding | None:
        """A first look at what costs no time; misses do not count yet."""
        for tier in self._tiers:
            if tier.tier.in_memory and (found := tier.get(key, first_look=True)) is not None:
                with self._lock:
                    self._hits += 1
                return found
        return None

    def _look_up(self, key: EmbeddingKey) -> Embedding | None:
        for level, tier in enumerate(self._tiers):
            if (found := tier.get(key)) is not None:
                for upper in self._tiers[:level]:
                    upper.put(found)
                return found
        return None

    def _keep(self, key: EmbeddingKey, embedding: Embedding) -> Embedding:
        if embedding.key != key:
            raise InvalidInputError(f"Asked for {key}, the encoder returned {embedding.key}.")
        with self._lock:
            self._encoded += 1
        self.put(embedding)
        return embedding

    async def _off_loop(self, call: Callable[[], _T]) -> _T:
        if all(tier.tier.in_memory for tier in self._tiers):
            return call()
        return await asyncio.to_thread(call)
