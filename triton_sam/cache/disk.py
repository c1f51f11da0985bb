"""Embeddings in a folder, which several processes may share.

An entry is one safetensors file. It appears by a rename, so it is whole for every reader, and
its modification time is when it was used last. Nothing is locked: processes that make room at
the same time agree on which entries are oldest.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from ..embedding import Embedding, EmbeddingKey
from ..errors import EmbeddingError
from .budget import positive
from .tiers import Tier, TierStats

logger = logging.getLogger(__name__)

_SUFFIX = ".safetensors"
# What a key's name and the suffix make. A folder may hold other files: they are left alone.
_ENTRY = re.compile(r"[0-9a-f]{40}\.safetensors")
_UNFINISHED = ".writing-"
_FULL = (errno.ENOSPC, errno.EDQUOT)
# A write takes far less; what is older was left by a process that was killed.
_ABANDONED_S = 600.0


@dataclass(frozen=True)
class _Entry:
    path: Path
    used: float
    nbytes: int


class DiskTier(Tier):
    """Keeps the embeddings that were used last as files in ``folder``, up to ``max_bytes``.

    ``folder``: made when it is missing; ``~`` is the home folder. Other files in it neither count
    nor are they touched. ``float16``: half the bytes, at the cost of masks that differ slightly.
    The budget counts the entries of all processes that share the folder; they should have the same
    one. On a full disk older entries make room. ``write``: how a file gets its content, for tests.
    Raises :class:`InvalidInputError` for a budget below 1.
    """

    name = "disk"

    def __init__(
        self,
        folder: str | os.PathLike[str],
        max_bytes: int = 10 << 30,
        *,
        float16: bool = False,
        write: Callable[[Path, bytes], object] = Path.write_bytes,
    ) -> None:
        self.folder = Path(folder).expanduser()
        self._max_bytes = positive("max_bytes", max_bytes)
        self._float16 = float16
        self._write_file = write
        self._evictions = 0
        self._damaged = 0
        self._lock = threading.Lock()

    def get(self, key: EmbeddingKey) -> Embedding | None:
        path = self._path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            embedding = Embedding.from_bytes(content, name=repr(str(path)))
            if embedding.key != key:
                raise EmbeddingError(f"{str(path)!r} holds another embedding than its name says.")
        except EmbeddingError as exc:
            self._drop_damaged(path, exc)
            return None
        with suppress(OSError):  # another process may have evicted it meanwhile
            os.utime(path)
        return embedding

    def put(self, embedding: Embedding) -> bool:
        content = embedding.to_bytes(float16=self._float16)
        if len(content) > self._max_bytes:
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        self._keep_budget(len(content))
        try:
            self._write(self._path(embedding.key), content)
        except OSError as exc:
            if exc.errno not in _FULL:
                raise
            self._evict(2 * len(content))  # the disk is smaller than the budget
            self._write(self._path(embedding.key), content)
        self._keep_budget(0)  # others may have written meanwhile
        return True

    def clear(self) -> None:
        for entry in self._entries():
            entry.path.unlink(missing_ok=True)

    def stats(self) -> TierStats:
        entries = list(self._entries())
        return TierStats(
            self.name,
            evictions=self._evictions,
            damaged=self._damaged,
            entries=len(entries),
            nbytes=sum(entry.nbytes for entry in entries),
        )

    def _path(self, key: EmbeddingKey) -> Path:
        return self.folder / (key.name + _SUFFIX)

    def _write(self, path: Path, content: bytes) -> None:
        # Not a name of mkstemp's: its files are for one user, a folder may be for several.
        unfinished = self.folder / (_UNFINISHED + uuid4().hex)
        try:
            self._write_file(unfinished, content)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    def _keep_budget(self, more: int) -> None:
        """Make room, so that ``more`` bytes fit the budget."""
        self._evict(sum(entry.nbytes for entry in self._entries()) + more - self._max_bytes)

    def _evict(self, nbytes: int) -> None:
        """Drop the entries that were used longest ago, together at least ``nbytes``."""
        if nbytes <= 0:
            return
        for entry in sorted(self._entries(), key=lambda entry: entry.used):
            with suppress(FileNotFoundError):  # another process was faster
                entry.path.unlink()
                with self._lock:
                    self._evictions += 1
            nbytes -= entry.nbytes
            if nbytes <= 0:
                return

    def _entries(self) -> Iterator[_Entry]:
        """All entries; what killed processes left unfinished is removed on the way."""
        with suppress(FileNotFoundError):
            for file in os.scandir(self.folder):
                with suppress(FileNotFoundError):
                    status = file.stat()
                    if _ENTRY.fullmatch(file.name):
                        yield _Entry(Path(file.path), status.st_mtime, status.st_size)
                    elif _is_abandoned(file.name, status.st_mtime):
                        Path(file.path).unlink()

    def _drop_damaged(self, path: Path, exc: EmbeddingError) -> None:
        logger.warning("dropped a damaged entry of the disk cache: %s", exc)
        with self._lock:
            self._damaged += 1
        path.unlink(missing_ok=True)


def _is_abandoned(name: str, changed: float) -> bool:
    return name.startswith(_UNFINISHED) and time.time() - changed > _ABANDONED_S
