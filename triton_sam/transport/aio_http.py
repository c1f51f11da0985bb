"""HTTP for async code."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import aiohttp

from ..errors import ClientClosedError
from ..flow import Deadline
from .base import AsyncTritonTransport
from .endpoint import Endpoint
from .failures import UnsentError
from .http_messages import Answer, Message, read, write
from .options import TransportOptions
from .requests import Request


class AsyncHttpTransport(AsyncTritonTransport):
    """KServe v2 over HTTP with aiohttp; tritonclient writes and reads the bodies.

    Cancelling a call ends the connection, which the server does not notice: it goes on.
    """

    def __init__(self, endpoint: Endpoint, options: TransportOptions) -> None:
        super().__init__(endpoint, options)
        scheme = "https" if endpoint.secure else "http"
        self._base = f"{scheme}://{endpoint.address}{endpoint.path}/v2/"
        self._options = options
        self._tls = options.tls_context() if endpoint.secure else True
        self._session: aiohttp.ClientSession | None = None

    async def _send(self, request: Request, timeout_s: float) -> Any:
        deadline = Deadline(timeout_s)
        if self._options.compression == "none":
            message = write(request, self._options)
            return read(request, await self._exchange(message, deadline))
        message = await asyncio.to_thread(write, request, self._options)
        answer = await self._exchange(message, deadline)
        return await asyncio.to_thread(read, request, answer)

    async def _exchange(self, message: Message, deadline: Deadline) -> Answer:
        # Idle connections that the server has ended are noticed in a turn of the loop, and given
        # up in the next; otherwise one of them would be used.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        # A stream: aiohttp sends it in pieces, and other tasks have their turn in between.
        body = None if message.body is None else io.BytesIO(message.body)
        try:
            async with self._open_session().request(
                message.method,
                self._base + message.path,
                data=body,
                headers=message.headers,
                timeout=aiohttp.ClientTimeout(total=deadline.left()),
                allow_redirects=False,
            ) as response:
                return Answer(response.status, response.headers, await response.read())
        except aiohttp.ClientConnectorError as exc:
            raise UnsentError from exc

    def _open_session(self) -> aiohttp.ClientSession:
        if self._exchanges.closed:  # between the call's beginning and here
            raise ClientClosedError("The client was closed during the call.")
        if self._session is None:
            # Made here and not before: it belongs to the running loop. As many connections as
            # there are calls, so that a click does not wait here behind hovers.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=self._tls, limit=0),
                response_class=_Response,
                auto_decompress=False,
            )
        return self._session

    async def _disconnect(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()


class _Response(aiohttp.ClientResponse):
    """Gives its connection up at once when it fails or is cancelled."""

    async def start(self, connection: Any) -> aiohttp.ClientResponse:
        transport = connection.transport
        try:
            return await super().start(connection)
        except BaseException:
            # aiohttp's own closing waits until the server has taken what is not sent yet.
            if transport is not None:
                transport.abort()
            raise
