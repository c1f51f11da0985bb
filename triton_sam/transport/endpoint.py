"""Where a server listens."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from ..errors import InvalidInputError

_URL_FORMS = "localhost:8000, http://host:8000, https://host, grpc://host:8001 or grpcs://host"


@dataclass(frozen=True)
class Endpoint:
    """Where a server listens. ``path``: what stands before ``/v2`` behind an HTTP proxy."""

    scheme: str
    host: str
    port: int
    path: str = ""

    @property
    def secure(self) -> bool:
        return self.scheme in ("https", "grpcs")

    @property
    def grpc(self) -> bool:
        return self.scheme in ("grpc", "grpcs")

    @property
    def address(self) -> str:
        """``host:port``, with the brackets of an IPv6 host."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, url: str) -> Endpoint:
        """Read ``url``; without a scheme it is HTTP. Raises :class:`InvalidInputError`."""
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            scheme, host, port = parts.scheme, parts.hostname or "", parts.port
        except ValueError as exc:
            raise _bad_url(url, str(exc)) from exc
        path = parts.path.rstrip("/")
        if scheme not in ("http", "https", "grpc", "grpcs"):
            raise _bad_url(url, f"the scheme {scheme!r} is unknown")
        if port is None and scheme in ("https", "grpcs"):
            port = 443
        if not host or host != "".join(host.split()):
            raise _bad_url(url, "the host is missing or holds spaces")
        if not port:
            raise _bad_url(url, "the port is missing")
        if "@" in parts.netloc or parts.query or parts.fragment or (path and "grpc" in scheme):
            raise _bad_url(url, "only scheme, host and port are used (and a path with HTTP)")
        return cls(scheme, host, port, path)


def _bad_url(url: str, why: str) -> InvalidInputError:
    return InvalidInputError(f"Cannot use the server URL {url!r}: {why}. Use {_URL_FORMS}.")
