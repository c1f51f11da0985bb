"""One file over HTTP: resumed where it was cut off, tried again when the network fails."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt
from tenacity.wait import wait_exponential, wait_random
from tqdm import tqdm

from ..errors import ChecksumError, DiskSpaceError, DownloadError
from .remote import RemoteFile

# Less than this in a whole round of attempts does not count as getting on.
_PROGRESS = 1 << 20
_TRY_AGAIN_LATER = {408, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class Patience:
    """How long to wait for a network, in seconds.

    ``connect_s``: for a connection. ``stall_s``: for the next bytes. ``attempts``: in a row that
    bring nothing. ``first_wait_s`` doubles from attempt to attempt, with jitter, up to
    ``longest_wait_s``; a server's Retry-After counts up to that too.
    """

    connect_s: float = 20.0
    stall_s: float = 30.0
    attempts: int = 6
    first_wait_s: float = 1.0
    longest_wait_s: float = 60.0


class Interrupted(Exception):
    """Worth another attempt. ``retry_after_s``: what the server asked us to wait."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


def retrying(patience: Patience) -> Retrying:
    """Calls a function again for as long as it raises :class:`Interrupted`."""
    backoff = wait_exponential(patience.first_wait_s, max=patience.longest_wait_s)
    jitter = wait_random(0, patience.first_wait_s)

    def wait(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome is not None else None
        asked = error.retry_after_s if isinstance(error, Interrupted) else 0.0
        return jitter(state) + max(backoff(state), min(asked, patience.longest_wait_s))

    return Retrying(
        retry=retry_if_exception_type(Interrupted),
        stop=stop_after_attempt(patience.attempts),
        wait=wait,
        reraise=True,
    )


def new_client(patience: Patience) -> httpx2.Client:
    """An HTTP client that waits as long as ``patience`` says.

    Raises :class:`DownloadError` when the environment names a proxy that cannot be used.
    """
    timeout = httpx2.Timeout(patience.stall_s, connect=patience.connect_s)
    try:
        return httpx2.Client(timeout=timeout, follow_redirects=True)
    except ImportError as exc:
        raise DownloadError(
            "The environment names a SOCKS proxy, which needs a package: pip install socksio."
        ) from exc
    except ValueError as exc:
        raise DownloadError(
            f"The environment names a proxy that cannot be used: {_one_line(exc)}. Check "
            "HTTPS_PROXY, HTTP_PROXY and ALL_PROXY."
        ) from exc


def fetch(remote: RemoteFile, part: Path, patience: Patience) -> None:
    """Bring ``remote`` to ``part``, going on from what is there already.

    Proxies and certificates are those of the environment (``HTTPS_PROXY``, ``NO_PROXY``,
    ``SSL_CERT_FILE`` …). Raises :class:`DownloadError` or one of its kinds; ``part`` keeps what
    came.
    """
    with (
        new_client(patience) as client,
        tqdm(
            desc=remote.target.name,
            total=remote.nbytes,
            unit="B",
            unit_scale=True,
            disable=None,
        ) as bar,
    ):
        transfer = _Transfer(client, remote, part, bar)
        while True:
            before = transfer.length
            try:
                return retrying(patience)(transfer.attempt)
            except Interrupted as exc:
                if transfer.length < before + _PROGRESS:
                    raise _given_up(transfer, exc, patience.attempts) from exc


def _given_up(transfer: _Transfer, exc: Interrupted, attempts: int) -> DownloadError:
    received = transfer.length
    message = f"{transfer.remote.url} could not be fetched: {exc}, {attempts} times in a row."
    if not received:
        discard(transfer.part)
        return DownloadError(f"{message} Check the network and the proxy, then try again.")
    return DownloadError(f"{message} {received} bytes are kept; run the command again to go on.")


@dataclass(frozen=True)
class _Transfer:
    client: httpx2.Client
    remote: RemoteFile
    part: Path
    bar: tqdm[Any]

    @property
    def length(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    @property
    def _validator(self) -> Path:
        """Holds the ETag or date of the content that the part belongs to."""
        return self.part.with_name(self.part.name + ".etag")

    def attempt(self) -> None:
        """One request; returns when the part is whole."""
        have = self.length
        if have and have == self.remote.nbytes:
            return
        try:
            with self.client.stream("GET", self.remote.url, headers=self._headers(have)) as answer:
                self._receive(answer, have)
        except httpx2.TimeoutException as exc:
            raise Interrupted("the server stopped sending") from exc
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as exc:
            raise DownloadError(
                f"{self.remote.url} is not an address: {_one_line(exc)}. Check TRITON_SAM_MIRROR "
                "and HF_ENDPOINT."
            ) from exc
        except httpx2.HTTPError as exc:
            raise Interrupted(_one_line(exc)) from exc

    def _headers(self, have: int) -> dict[str, str]:
        # Compressed on the way, the bytes could neither be counted nor resumed.
        headers = {**self.remote.headers, "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
            if self._validator.exists():
                headers["If-Range"] = self._validator.read_text()
        return headers

    def _receive(self, answer: httpx2.Response, have: int) -> None:
        if answer.status_code == 416:
            self._discard()
            raise Interrupted("the server has less than was received before (416)")
        if answer.status_code in _TRY_AGAIN_LATER:
            raise Interrupted(f"the server answered {answer.status_code}", _retry_after(answer))
        if answer.status_code not in (200, 206):
            raise self.remote.refused(answer.status_code)
        start, total = _extent(answer)
        if start not in (0, have):
            self._discard()
            raise Interrupted(f"the server sent from byte {start} instead of {have}")
        self._compare_size(total)
        self._keep_validator(answer)
        self.bar.total = self.remote.nbytes or total
        self._write(answer, start)
        expected = self.remote.nbytes if total is None else total
        if expected is not None and self.length < expected:
            raise Interrupted(f"the connection ended after {self.length} of {expected} bytes")

    def _compare_size(self, total: int | None) -> None:
        if total is not None and self.remote.nbytes not in (None, total):
            raise ChecksumError(
                f"{self.remote.url} has {total} bytes and not {self.remote.nbytes}: it is another "
                "file, or a page that a proxy put in its place. Nothing was kept of it."
            )

    def _keep_validator(self, answer: httpx2.Response) -> None:
        etag = answer.headers.get("ETag", "")
        # A weak ETag must not be used for ranges.
        value = answer.headers.get("Last-Modified") if etag.startswith("W/") or not etag else etag
        if value:
            self._validator.write_text(value)
        else:
            self._validator.unlink(missing_ok=True)

    def _write(self, answer: httpx2.Response, start: int) -> None:
        self.bar.n = start
        with _full_disk(self.part), self.part.open("ab" if start else "wb") as file:
            for block in answer.iter_raw():
                file.write(block)
                self.bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())

    def _discard(self) -> None:
        discard(self.part)


def discard(part: Path) -> None:
    """Remove what was received before, and what is known about it."""
    part.unlink(missing_ok=True)
    part.with_name(part.name + ".etag").unlink(missing_ok=True)


def _extent(answer: httpx2.Response) -> tuple[int, int | None]:
    """First byte that the answer brings, and the length of the whole file if it is told."""
    if answer.status_code == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
        if found is None:
            return -1, None
        return int(found[1]), None if found[2] == "*" else int(found[2])
    length = answer.headers.get("Content-Length")
    return 0, int(length) if length is not None else None


def _retry_after(answer: httpx2.Response) -> float:
    value = answer.headers.get("Retry-After", "")
    return float(value) if value.isdecimal() else 0.0


def _one_line(exc: Exception) -> str:
    return " ".join(str(exc).split()).rstrip(".") or type(exc).__name__


@contextmanager
def _full_disk(part: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskSpaceError(
            f"The disk is full: {part.parent} took {part.stat().st_size} bytes of the file. Make "
            "room and run the command again; it goes on from there."
        ) from exc
