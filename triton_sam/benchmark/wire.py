"""Bytes on the wire: a proxy on this machine that counts what passes its sockets.

What is counted is what a client writes to and reads from its TCP connection, headers and
framing included. The pass that counts is not the one that is timed.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..transport import Endpoint

_BLOCK = 1 << 18


@dataclass(frozen=True)
class Bytes:
    """What a client sent (``up``) and received (``down``)."""

    up: int
    down: int

    def __sub__(self, other: Bytes) -> Bytes:
        return Bytes(self.up - other.up, self.down - other.down)


class CountingProxy:
    """Forwards connections to ``endpoint``; use it as a context manager."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = [self._listener]
        self._counts = {"up": 0, "down": 0}
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """The address for a client, with the scheme and the path of the server's own."""
        port = self._listener.getsockname()[1]
        return f"{self._endpoint.scheme}://127.0.0.1:{port}{self._endpoint.path}"

    @property
    def total(self) -> Bytes:
        """What has passed so far."""
        with self._lock:
            return Bytes(**self._counts)

    def __enter__(self) -> CountingProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        for sock in self._sockets:
            # A thread that waits in accept or recv is only woken by a shutdown.
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection((self._endpoint.host, self._endpoint.port))
                self._sockets += [client, server]
                for source, sink, way in ((client, server, "up"), (server, client, "down")):
                    threading.Thread(
                        target=self._forward, args=(source, sink, way), daemon=True
                    ).start()

    def _forward(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        with contextlib.suppress(OSError):
            while block := source.recv(_BLOCK):
                with self._lock:
                    self._counts[way] += len(block)
                sink.sendall(block)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


@contextmanager
def counting(url: str) -> Iterator[CountingProxy | None]:
    """A proxy for ``url``, or ``None`` with TLS, whose certificate names another host."""
    endpoint = Endpoint.parse(url)
    if endpoint.secure:
        yield None
        return
    with CountingProxy(endpoint) as proxy:
        yield proxy
