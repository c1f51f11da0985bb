"""Embeddings that are not computed twice: in memory, on disk, in Redis or Valkey, in tiers.

>>> from triton_sam.cache import DiskTier, EmbeddingCache, MemoryTier
>>> cache = EmbeddingCache(MemoryTier(), DiskTier("~/.cache/triton-sam/embeddings"))

An entry is found by the digest of the image's pixels, the model family, its variant and its
version. Whoever replaces a model without changing the version has to clear the cache.
"""

from __future__ import annotations

from .disk import DiskTier
from .memory import MemoryTier
from .redis import RedisTier
from .tiered import EmbeddingCache
from .tiers import CacheStats, Tier, TierStats

__all__ = [
    "CacheStats",
    "DiskTier",
    "EmbeddingCache",
    "MemoryTier",
    "RedisTier",
    "Tier",
    "TierStats",
]
