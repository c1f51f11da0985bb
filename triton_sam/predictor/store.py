"""Encoded images by handle: a budget of bytes, the least recently used leave first."""

from __future__ import annotations

import hashlib
import hmac
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

_HANDLE_DIGITS = 32


def image_handle(content: bytes | NDArray[Any], tenant_key: bytes = b"") -> str:
    """The handle of an image: 32 hex digits that follow from what was sent.

    ``content``: an image file's bytes, or HxWx3 uint8. With a ``tenant_key`` the handle is an HMAC
    under it, so that who does not have the key cannot find it, not even with the same image.
    """
    if isinstance(content, bytes):
        seen = hashlib.sha256(b"file:")
        seen.update(content)
    else:
        seen = hashlib.sha256(f"array:{content.shape}:".encode())
        seen.update(content.tobytes())
    digest = seen.digest()
    named = hmac.new(tenant_key, digest, "sha256").digest() if tenant_key else digest
    return named.hex()[:_HANDLE_DIGITS]


@dataclass(eq=False)
class Encoded:
    """An image as the decoder takes it.

    ``tensors``: what is kept of it by name, on the device that decodes. ``original_size``:
    (height, width) in pixels. ``nbytes``: of all tensors.
    """

    tensors: Mapping[str, Any]
    original_size: tuple[int, int]
    nbytes: int


@dataclass(eq=False)
class _Entry:
    encoded: Encoded
    expires: float
    pins: int = 0


@dataclass
class StoreStats:
    """What became of the look-ups, and how full the store is."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    expired: int = 0
    images: int = 0
    nbytes: int = 0


@dataclass(eq=False)
class Store:
    """Encoded images within ``max_bytes``, each for ``ttl_s`` seconds after its last use.

    What is in use is never evicted. Safe to use from several threads.
    """

    max_bytes: int
    ttl_s: float
    clock: Callable[[], float] = time.monotonic
    _entries: OrderedDict[str, _Entry] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stats: StoreStats = field(default_factory=StoreStats)
    _reserved: int = 0

    def __contains__(self, handle: str) -> bool:
        """Whether it is there; counts as no use."""
        with self._lock:
            self._expire()
            return handle in self._entries

    def size_of(self, handle: str) -> tuple[int, int] | None:
        """(height, width) of the image, which counts as a use; ``None`` when it is not there."""
        with self._lock:
            entry = self._used(handle)
            return None if entry is None else entry.encoded.original_size

    @contextmanager
    def pinned(self, handle: str) -> Iterator[Encoded | None]:
        """The image, kept while the block runs; ``None`` when it is not there.

        Counts as no use of its own: who pins has asked for the size before.
        """
        with self._lock:
            self._expire()
            entry = self._entries.get(handle)
            if entry is not None:
                entry.pins += 1
        try:
            yield None if entry is None else entry.encoded
        finally:
            if entry is not None:
                with self._lock:
                    entry.pins -= 1

    @contextmanager
    def room(self, nbytes: int) -> Iterator[None]:
        """Evict until ``nbytes`` more fit, and keep them free while the block runs."""
        with self._lock:
            self._make_room(nbytes)
            self._reserved += nbytes
        try:
            yield
        finally:
            with self._lock:
                self._reserved -= nbytes

    def put(self, handle: str, encoded: Encoded, reserved: int = 0) -> bool:
        """Keep an image; whether there was room for it beside what is in use.

        ``reserved``: how many of its bytes :meth:`room` holds free for it.
        """
        with self._lock:
            self._remove(handle)
            self._make_room(max(0, encoded.nbytes - reserved))
            free = self.max_bytes - self._stats.nbytes - self._reserved + reserved
            if encoded.nbytes > free:
                return False
            self._entries[handle] = _Entry(encoded, self.clock() + self.ttl_s)
            self._stats.images += 1
            self._stats.nbytes += encoded.nbytes
            return True

    def stats(self) -> StoreStats:
        """A copy of the counts."""
        with self._lock:
            self._expire()
            return StoreStats(**vars(self._stats))

    def _used(self, handle: str) -> _Entry | None:
        self._expire()
        entry = self._entries.get(handle)
        if entry is None:
            self._stats.misses += 1
            return None
        self._stats.hits += 1
        self._entries.move_to_end(handle)
        entry.expires = self.clock() + self.ttl_s
        return entry

    def _expire(self) -> None:
        # Uses come in the order of the entries, and so do their ends.
        now = self.clock()
        for handle in list(self._entries):
            entry = self._entries[handle]
            if entry.expires > now:
                return
            if not entry.pins:
                self._remove(handle)
                self._stats.expired += 1

    def _make_room(self, nbytes: int) -> None:
        for handle in list(self._entries):
            if self._stats.nbytes + self._reserved + nbytes <= self.max_bytes:
                return
            if not self._entries[handle].pins:
                self._remove(handle)
                self._stats.evictions += 1

    def _remove(self, handle: str) -> None:
        entry = self._entries.pop(handle, None)
        if entry is not None:
            self._stats.images -= 1
            self._stats.nbytes -= entry.encoded.nbytes
