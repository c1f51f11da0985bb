"""Memory that a server on the same machine reads and writes: regions in ``/dev/shm``.

A region is a file there, locked as long as its owner lives, so that anybody can tell what is left
of processes that crashed; process numbers mean nothing in another container. Python's own
``multiprocessing.shared_memory`` has a further process watch each region, and no locks.
"""

from __future__ import annotations

import mmap
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import SharedMemoryError

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "triton-sam-client-"
"""How the names of regions begin; then come the owner's process number and a random part."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: the region's name, the offset in bytes, and what it is."""

    region: str
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


class Region:
    """``nbytes`` of shared memory, which this user's processes alone can open.

    Raises :class:`SharedMemoryError` where there is none, or too little.
    """

    def __init__(self, nbytes: int) -> None:
        if not SHARED_MEMORY.is_dir():
            raise SharedMemoryError(f"This system has no {SHARED_MEMORY}, as Linux does.")
        self.nbytes = nbytes
        self._owner = os.getpid()
        try:
            file, self._path = _locked_file()
        except OSError as exc:
            raise SharedMemoryError(
                f"No file can be made in {SHARED_MEMORY}: {exc.strerror}."
            ) from exc
        self.name = self._path.name
        try:
            # All of it at once: memory that is missing later would end whoever writes to it.
            os.posix_fallocate(file, 0, nbytes)
            # It has a descriptor of its own, and so the lock as long as it lives.
            self._memory = mmap.mmap(file, nbytes)
        except OSError as exc:
            self.remove()
            raise SharedMemoryError(
                f"There is no room for {nbytes} bytes in {SHARED_MEMORY}: {exc.strerror}."
            ) from exc
        finally:
            os.close(file)

    def array(self, place: Place) -> NDArray[np.generic]:
        """The tensor at a place; it keeps the memory, also after :meth:`remove`."""
        array: NDArray[np.generic] = np.ndarray(
            place.shape, place.dtype, self._memory, place.offset
        )
        array.flags.writeable = False
        return array

    def remove(self) -> None:
        """Remove its name. The memory goes when nobody maps it any more."""
        if self._owner == os.getpid():  # not in a process that was forked from the owner
            self._path.unlink(missing_ok=True)


def remove_dead() -> None:
    """Remove the regions whose owners are gone."""
    for path in SHARED_MEMORY.glob(f"{PREFIX}*"):
        with suppress(OSError):  # of another user, or gone by now
            file = os.open(path, os.O_RDWR)
            try:
                if _lock(file, wait=False):
                    path.unlink(missing_ok=True)
            finally:
                os.close(file)


def is_left(name: str) -> bool:
    """Whether a region of this name exists."""
    return (SHARED_MEMORY / name).exists()


def _locked_file() -> tuple[int, Path]:
    """A new file's descriptor and path."""
    while True:
        path = SHARED_MEMORY / f"{PREFIX}{os.getpid()}-{secrets.token_hex(8)}"
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        _lock(file, wait=True)
        if os.fstat(file).st_nlink:
            return file, path
        os.close(file)  # between the two it was taken for one without an owner


def _lock(file: int, wait: bool) -> bool:
    import fcntl  # not on Windows, where there are no such regions either

    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True
