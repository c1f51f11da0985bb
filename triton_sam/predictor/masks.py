"""Masks that were answered lately, by name, so that one can be a prompt without being sent back."""

from __future__ import annotations

import hashlib
import hmac
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_MASKS = 64
"""An answer with more masks is kept for who asks for their names alone: it pushes others out."""

_NAME_DIGITS = 32


def mask_name(handle: str, logits: NDArray[np.float32]) -> str:
    """The name of a mask of the image ``handle``: 32 hex digits that follow from its values.

    ``logits``: as ``mask_input`` of one prompt, clamped where the family clamps. The name is
    HMAC-SHA256, under the handle, of SHA-256 of ``mask:`` and the little-endian float32 values
    row by row: who cannot find the image cannot find its masks.
    """
    seen = hashlib.sha256(b"mask:")
    seen.update(np.ascontiguousarray(logits, "<f4").data.cast("B"))
    return hmac.new(handle.encode(), seen.digest(), "sha256").hexdigest()[:_NAME_DIGITS]


@dataclass
class MaskStats:
    """What became of the look-ups, and how full the store is."""

    hits: int = 0
    misses: int = 0
    nbytes: int = 0


@dataclass(eq=False)
class Masks:
    """Masks within ``max_bytes``; the least recently used leave first. Safe to use from threads."""

    max_bytes: int
    _kept: OrderedDict[str, NDArray[np.float32]] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stats: MaskStats = field(default_factory=MaskStats)

    def keep(self, handle: str, logits: NDArray[np.float32]) -> NDArray[np.object_]:
        """Keep the masks of an answer, BxMxhxw as a client has them; their names, BxM bytes."""
        names = np.empty(logits.shape[:2], np.object_)
        for index in np.ndindex(*names.shape):
            name = mask_name(handle, logits[index])
            names[index] = name.encode()
            self._put(name, logits[index])
        return names

    def find(self, names: Sequence[str]) -> NDArray[np.float32] | None:
        """The masks as a ``mask_input``, (B, 1, h, w); ``None`` when one of them is not there."""
        with self._lock:
            found = [self._kept[name] for name in names if name in self._kept]
            for name in names:
                if name in self._kept:
                    self._kept.move_to_end(name)
            if len(found) < len(names):
                self._stats.misses += 1
                return None
            self._stats.hits += 1
        return np.stack(found)[:, None]

    def stats(self) -> MaskStats:
        """A copy of the counts."""
        with self._lock:
            return MaskStats(**vars(self._stats))

    def _put(self, name: str, mask: NDArray[np.float32]) -> None:
        own = mask.copy()  # a part of an answer would keep the whole of it
        with self._lock:
            replaced: Any = self._kept.pop(name, None)
            self._stats.nbytes += own.nbytes - (0 if replaced is None else replaced.nbytes)
            self._kept[name] = own
            while self._stats.nbytes > self.max_bytes:
                _, oldest = self._kept.popitem(last=False)
                self._stats.nbytes -= oldest.nbytes
