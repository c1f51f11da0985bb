"""What is known of a file's hash, so that gigabytes are not read again each time.

Beside ``name`` lies ``name.sha256``, which ``sha256sum --check`` reads too. Its second line holds
the size and the time of the file when it was hashed: a file that was touched since is read again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ..files import write_atomically

_BLOCK = 1 << 20
_GIT_DIGITS = 40


@dataclass(frozen=True)
class Note:
    """``sha256`` of the content; ``digest`` and ``origin``: what it was held against, or "-"."""

    sha256: str
    digest: str = "-"
    origin: str = "-"


def note_path(path: Path) -> Path:
    """Where the note about ``path`` is."""
    return path.with_name(path.name + ".sha256")


def read_note(path: Path) -> Note | None:
    """The note about ``path``, or ``None`` when there is none or it is of other content."""
    try:
        first, second = note_path(path).read_text().splitlines()
        _, size, mtime_ns, digest, origin = second.split()
        stat = path.stat()
    except (OSError, ValueError):
        return None
    if (int(size), int(mtime_ns)) != (stat.st_size, stat.st_mtime_ns):
        return None
    return Note(first.split()[0], digest, origin)


def write_note(path: Path, note: Note) -> None:
    """Remember ``note`` for ``path`` as it is now."""
    stat = path.stat()
    text = (
        f"{note.sha256}  {path.name}\n"
        f"# {stat.st_size} {stat.st_mtime_ns} {note.digest} {note.origin}\n"
    )
    write_atomically(note_path(path), text.encode())


def sha256_of(path: Path) -> str:
    """The hex SHA-256 of ``path``; read from the note where that is of the same content."""
    note = read_note(path)
    if note is None:
        note = Note(compute(path))
        write_note(path, note)
    return note.sha256


def is_right(path: Path, origin: str, digest: str | None) -> bool:
    """Whether ``path`` is what ``digest`` says, or, without one, was checked against ``origin``."""
    if not path.is_file():
        return False
    note = read_note(path)
    if digest is None:
        return note is not None and note.origin == origin
    if note is not None and digest in (note.sha256, note.digest):
        return True
    if not matches(path, digest):
        return False
    write_note(path, Note(compute(path) if is_git(digest) else digest, digest, origin))
    return True


def matches(path: Path, digest: str) -> bool:
    """Whether the content of ``path`` has this ``digest``, whatever a note says."""
    return compute(path, git=is_git(digest)) == digest


def is_git(digest: str) -> bool:
    """Whether ``digest`` is the id of a git blob and not a SHA-256."""
    return len(digest) == _GIT_DIGITS


def compute(path: Path, git: bool = False) -> str:
    """The hex SHA-256 of ``path``, or its id as a git blob."""
    size = path.stat().st_size
    digest = hashlib.sha1(f"blob {size}\0".encode()) if git else hashlib.sha256()
    # Shown only where it takes long enough to be wondered at.
    bar = tqdm(total=size, desc=f"check {path.name}", unit="B", unit_scale=True, delay=2)
    with path.open("rb") as file, bar:
        while block := file.read(_BLOCK):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()
