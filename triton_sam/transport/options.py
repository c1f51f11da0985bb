"""How a client talks to a server: deadline, certificates, headers, compression, retries."""

from __future__ import annotations

import math
import random
import re
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from ..errors import InvalidInputError

Compression = Literal["none", "gzip", "deflate"]

_HEADER_NAME = re.compile(r"[A-Za-z0-9._-]+")
_HEADER_VALUE = re.compile(r"[\x20-\x7e]*")


@dataclass(frozen=True)
class Retries:
    """How often a call is tried when nobody answers, and how long to wait in between.

    Repeated is what cannot be running any more: a call whose connection could not be made, one
    that the server refused as unavailable or because it has unloaded the model (it stops), and
    over gRPC also one whose connection broke, because that cancels it on the server, and one that
    the server cancelled before its time. An inference whose HTTP connection broke may still run
    and is not sent again. All attempts together stay within the timeout of the call.

    ``attempts``: how often in all; 1 turns retries off. ``backoff_s``: the pause before the second
    attempt, doubled before each further one up to ``max_backoff_s``. ``jitter``: the share of a
    pause, 0 to 1, that is left to chance, so that many clients do not come back at once.
    """

    attempts: int = 3
    backoff_s: float = 0.2
    max_backoff_s: float = 2.0
    jitter: float = 0.5

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise InvalidInputError(f"attempts counts the first one too; got {self.attempts}.")
        if not (0 <= self.backoff_s <= self.max_backoff_s < math.inf and 0 <= self.jitter <= 1):
            raise InvalidInputError(
                "Retries need 0 <= backoff_s <= max_backoff_s and a jitter from 0 to 1; "
                f"got {self}."
            )

    def pauses(self) -> Iterator[float]:
        """The seconds to wait before each attempt after the first."""
        pause = self.backoff_s
        for _ in range(self.attempts - 1):
            yield pause * (1 - self.jitter * random.random())
            pause = min(self.max_backoff_s, 2 * pause)


@dataclass(frozen=True)
class TransportOptions:
    """How a client talks to a server; the same for HTTP and gRPC, sync and async.

    ``timeout_s``: of a whole call, retries included, in seconds. ``ca_file``: PEM certificates to
    trust. Without it ``https`` trusts the system's, and ``grpcs`` those that gRPC brings along,
    which a company's own authority is not among. ``cert_file``, ``key_file``: the client's own
    certificate and its key, both PEM, for servers that ask for one. ``headers``: sent with every
    call. ``bearer_token``: sent as ``Authorization: Bearer …``; it is left out of the ``repr``.
    ``compression``: of what is sent, and over HTTP of the answer too. Embeddings are floats that
    hardly shrink: it pays on slow lines only.

    Raises :class:`InvalidInputError` for what cannot be used.
    """

    timeout_s: float = 60.0
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    bearer_token: str | None = field(default=None, repr=False)
    compression: Compression = "none"
    retries: Retries = field(default_factory=Retries)

    def __post_init__(self) -> None:
        check_timeout(self.timeout_s)
        if self.compression not in get_args(Compression):
            raise InvalidInputError(
                f"compression is one of {', '.join(get_args(Compression))}; "
                f"got {self.compression!r}."
            )
        if self.key_file is not None and self.cert_file is None:
            raise InvalidInputError("key_file belongs to a certificate; cert_file is missing.")
        for path in (self.ca_file, self.cert_file, self.key_file):
            if path is not None and not Path(path).is_file():
                raise InvalidInputError(f"There is no certificate file {path!r}.")
        for name, value in self.all_headers().items():
            _check_header(name, value)

    def all_headers(self) -> dict[str, str]:
        """What goes with every call; names in lower case, as gRPC demands."""
        headers = {name.lower(): value for name, value in self.headers.items()}
        if self.bearer_token is not None:
            headers["authorization"] = f"Bearer {self.bearer_token}"
        return headers

    def tls_context(self) -> ssl.SSLContext:
        """The certificates for Python's own TLS. Raises :class:`InvalidInputError`."""
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
        except OSError as exc:  # an ssl.SSLError is one, and so is a file that cannot be read
            raise InvalidInputError(f"{self.ca_file!r} holds no PEM certificates: {exc}.") from exc
        if self.cert_file is not None:
            try:
                # An empty password: rather an error than a question at the terminal.
                context.load_cert_chain(self.cert_file, self.key_file, password="")
            except (ssl.SSLError, OSError) as exc:
                raise InvalidInputError(
                    f"{self.cert_file!r} and {self.key_file or self.cert_file!r} are no PEM "
                    f"certificate and unencrypted key that belong together: {exc}."
                ) from exc
        return context


def check_timeout(timeout_s: float) -> None:
    """Raise :class:`InvalidInputError` unless this is a time that a call can take."""
    if not (math.isfinite(timeout_s) and timeout_s > 0):
        raise InvalidInputError(f"timeout_s must be a positive number of seconds; got {timeout_s}.")


def _check_header(name: str, value: str) -> None:
    if not (_HEADER_NAME.fullmatch(name) and _HEADER_VALUE.fullmatch(value)):
        raise InvalidInputError(
            f"The header {name!r} cannot be sent: names are letters, digits and -._, values "
            "printable ASCII."
        )
