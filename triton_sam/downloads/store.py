"""Files that are there and right: fetched only where they are not."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import ChecksumError, DiskSpaceError, OfflineError
from .notes import Note, compute, is_git, is_right, note_path, write_note
from .remote import RemoteFile, readable
from .transfer import Patience, discard, fetch

_log = logging.getLogger(__name__)

_SPARE = 50_000_000


def _free_space(folder: Path) -> int:
    return shutil.disk_usage(folder).free


@dataclass(frozen=True)
class Store:
    """Brings files to their place.

    ``offline``: raise :class:`OfflineError` instead of fetching. ``force``: fetch again what is
    right already. ``free_space``: bytes that are free in a folder.
    """

    offline: bool = False
    force: bool = False
    patience: Patience = field(default_factory=Patience)
    free_space: Callable[[Path], int] = _free_space

    def ensure(self, files: Sequence[RemoteFile]) -> list[Path]:
        """Make all ``files`` be there and right; those that had to be fetched are returned.

        Each appears at its target only when it is whole and its hash is right; until then what
        was there stays. Two processes do not hinder each other: the second waits, and finds the
        file right. Raises :class:`DownloadError` or one of its kinds.
        """
        if self.offline:
            self._require(files)
            return []
        return [file.target for file in files if self._ensure_one(file)]

    def _require(self, files: Sequence[RemoteFile]) -> None:
        missing = [file for file in files if not _usable_offline(file)]
        if missing:
            what = "; ".join(file.describe() for file in missing)
            count = "1 file is" if len(missing) == 1 else f"{len(missing)} files are"
            raise OfflineError(f"Offline, and {count} missing: {what}.")

    def _ensure_one(self, wanted: RemoteFile) -> bool:
        wanted.target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(wanted.target):
            if not self.force and is_right(wanted.target, wanted.origin, wanted.digest):
                return False
            remote = wanted.locate()
            # The hub may have told a digest that the table does not know.
            if not self.force and is_right(wanted.target, remote.origin, remote.digest):
                return False
            if wanted.target.exists() and not self.force:
                _log.warning("%s is not the file of that name; it is replaced.", wanted.target)
            self._fetch(remote)
        return True

    def _fetch(self, remote: RemoteFile) -> None:
        part = remote.target.with_name(remote.target.name + ".part")
        if self.force:
            discard(part)
        resumed = part.exists()
        self._check_space(remote, part)
        fetch(remote, part, self.patience)
        try:
            sha256 = _verify(remote, part)
        except ChecksumError:
            discard(part)
            if not resumed:
                raise
            # The part may have been of an older file: once more from the beginning.
            fetch(remote, part, self.patience)
            sha256 = _verify(remote, part)
        note_path(remote.target).unlink(missing_ok=True)
        part.replace(remote.target)
        discard(part)
        write_note(remote.target, Note(sha256, remote.digest or "-", remote.origin))

    def _check_space(self, remote: RemoteFile, part: Path) -> None:
        have = part.stat().st_size if part.exists() else 0
        needed = max(0, (remote.nbytes or 0) - have) + _SPARE
        free = self.free_space(part.parent)
        if free < needed:
            raise DiskSpaceError(
                f"{remote.target.name} needs {readable(needed)} and {part.parent.absolute()} has "
                f"{readable(free)} free. Make room, or choose another folder (--output of "
                "`download`, --checkpoints of `setup`)."
            )


def _verify(remote: RemoteFile, part: Path) -> str:
    """The SHA-256 of ``part``; raises :class:`ChecksumError` when it is not ``remote``."""
    sha256 = compute(part)
    if remote.digest is not None:
        got = compute(part, git=True) if is_git(remote.digest) else sha256
        if got != remote.digest:
            raise ChecksumError(
                f"{remote.url} is not the file expected: its hash is {got} and not "
                f"{remote.digest}. It was thrown away; try again, or another mirror."
            )
    return sha256


def _usable_offline(file: RemoteFile) -> bool:
    """Right, or, where only the hub knows the hash, at least there."""
    if file.digest is not None:
        return is_right(file.target, file.origin, file.digest)
    if file.target.is_file() and not is_right(file.target, file.origin, None):
        _log.warning("%s is used as it is: only the hub knows its hash.", file.target)
    return file.target.is_file()


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _log.warning("Another process fetches %s; waiting for it.", target)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
