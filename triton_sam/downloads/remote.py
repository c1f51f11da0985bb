"""What is to be fetched: a file, where it comes from and how it is known to be right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DownloadError


@dataclass(frozen=True)
class RemoteFile:
    """A file that somebody publishes.

    ``target``: where it goes. ``origin``: its name whatever the mirror, kept in the note beside
    the target. ``digest``: hex SHA-256, or the 40 digits of a git blob; ``None`` where only the
    server knows it. ``headers``: what the server has to be sent.
    """

    target: Path
    url: str
    origin: str
    nbytes: int | None = None
    digest: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def locate(self) -> RemoteFile:
        """The file with all that is known just before it is fetched; may ask a server."""
        return self

    def refused(self, status: int) -> DownloadError:
        """The error for an answer with the HTTP ``status`` 4xx."""
        return DownloadError(
            f"{self.url} cannot be fetched: the server answered {status}. Check "
            "TRITON_SAM_MIRROR and the proxy where they are set."
        )

    def describe(self) -> str:
        """Name, size and address, and the place where a copy of one's own would be found."""
        size = "" if self.nbytes is None else f" ({readable(self.nbytes)})"
        return f"{self.target.name}{size} from {self.url}, to be put at {self.target.absolute()}"


def readable(nbytes: int) -> str:
    """``nbytes`` for people: 1.2 GB, 156 MB, 21 kB."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.{int(factor == 10**9)}f} {unit}"
    return f"{nbytes} bytes"
