"""Embeddings in this process's memory."""

from __future__ import annotations

import threading
from collections import OrderedDict

from ..embedding import Embedding, EmbeddingKey
from .budget import positive
from .tiers import Tier, TierStats


class MemoryTier(Tier):
    """Keeps the embeddings that were used last, up to ``max_bytes`` of their tensors.

    A SAM 2.1 embedding has 17 MB. Raises :class:`InvalidInputError` for a budget below 1.
    """

    name = "memory"
    in_memory = True

    def __init__(self, max_bytes: int = 512 << 20) -> None:
        self._max_bytes = positive("max_bytes", max_bytes)
        self._entries: OrderedDict[EmbeddingKey, Embedding] = OrderedDict()
        self._nbytes = 0
        self._evictions = 0
        self._lock = threading.Lock()

    def get(self, key: EmbeddingKey) -> Embedding | None:
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key]

    def put(self, embedding: Embedding) -> bool:
        if embedding.nbytes > self._max_bytes:
            return False
        with self._lock:
            self._drop(embedding.key)
            while self._nbytes + embedding.nbytes > self._max_bytes:
                self._drop(next(iter(self._entries)))
                self._evictions += 1
            self._entries[embedding.key] = embedding
            self._nbytes += embedding.nbytes
        return True

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._nbytes = 0

    def stats(self) -> TierStats:
        with self._lock:
            return TierStats(
                self.name,
                evictions=self._evictions,
                entries=len(self._entries),
                nbytes=self._nbytes,
            )

    def _drop(self, key: EmbeddingKey) -> None:
        dropped = self._entries.pop(key, None)
        self._nbytes -= dropped.nbytes if dropped is not None else 0
