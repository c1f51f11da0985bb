"""HTTP for sync code."""

from __future__ import annotations

import http.client
import selectors
import socket
from typing import Any

from ..flow import Deadline
from .base import TritonTransport
from .endpoint import Endpoint
from .failures import UnsentError
from .http_messages import Answer, Message, read, write
from .options import TransportOptions
from .requests import Request

_BLOCK = 1 << 20


class HttpTransport(TritonTransport):
    """KServe v2 over HTTP.

    tritonclient writes and reads the bodies. The connections are our own: its HTTP client belongs
    to the thread that made it, leaks that thread's event loop, and bounds each read, not the call.
    """

    def __init__(self, endpoint: Endpoint, options: TransportOptions) -> None:
        super().__init__(endpoint, options)
        self._endpoint, self._options = endpoint, options
        self._tls = options.tls_context() if endpoint.secure else None
        self._idle: list[http.client.HTTPConnection] = []

    def _disconnect(self) -> None:
        while connection := self._pop_idle():
            connection.close()

    def _send(self, request: Request, timeout_s: float) -> Any:
        deadline = Deadline(timeout_s)
        return read(request, self._exchange(write(request, self._options), deadline))

    def _exchange(self, message: Message, deadline: Deadline) -> Answer:
        """One request and its answer on a connection that no other thread uses meanwhile."""
        connection = self._connection(deadline)
        try:
            self._submit(connection, message, deadline)
            connection.sock.settimeout(deadline.left())
            # The response may take the socket away from the connection.
            sock = connection.sock
            response = connection.getresponse()
            body = _read(response, sock, deadline)
        except BaseException:
            # Whatever is still under way on it would be taken for the next answer.
            connection.close()
            raise
        self._give_back(connection)
        return Answer(response.status, response.headers, body)

    def _submit(
        self, connection: http.client.HTTPConnection, message: Message, deadline: Deadline
    ) -> None:
        connection.sock.settimeout(deadline.left())
        try:
            connection.request(
                message.method,
                f"{self._endpoint.path}/v2/{message.path}",
                body=message.body,
                headers=dict(message.headers),
            )
        except ConnectionError as exc:
            raise UnsentError from exc

    def _connection(self, deadline: Deadline) -> http.client.HTTPConnection:
        while connection := self._pop_idle():
            if not _is_dropped(connection):
                return connection
            connection.close()
        connection = self._new_connection(deadline.left())
        try:
            connection.connect()
        except OSError as exc:
            connection.close()
            raise UnsentError from exc
        return connection

    def _pop_idle(self) -> http.client.HTTPConnection | None:
        # Not `if self._idle`: another thread may take the last one in between.
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def _new_connection(self, timeout_s: float | None) -> http.client.HTTPConnection:
        host, port = self._endpoint.host, self._endpoint.port
        if self._tls is None:
            return http.client.HTTPConnection(host, port, timeout=timeout_s)
        return http.client.HTTPSConnection(host, port, timeout=timeout_s, context=self._tls)

    def _give_back(self, connection: http.client.HTTPConnection) -> None:
        if connection.sock is None:
            connection.close()
            return
        self._idle.append(connection)
        if self._exchanges.closed:  # looked at last: another thread may be closing just now
            self._disconnect()


def _read(response: http.client.HTTPResponse, sock: socket.socket, deadline: Deadline) -> bytes:
    blocks = []
    while block := response.read1(_BLOCK):
        blocks.append(block)
        sock.settimeout(deadline.left())
    if response.length:
        raise http.client.IncompleteRead(b"", response.length)
    response.close()  # otherwise the connection takes no further request
    return b"".join(blocks)


def _is_dropped(connection: http.client.HTTPConnection) -> bool:
    """An idle connection has nothing to read, unless the other side ended it."""
    with selectors.DefaultSelector() as selector:
        selector.register(connection.sock, selectors.EVENT_READ)
        return bool(selector.select(0))
