"""gRPC for async code."""

from __future__ import annotations

import asyncio
from typing import Any

from ..errors import ClientClosedError
from .base import AsyncTritonTransport
from .endpoint import Endpoint
from .grpc_messages import (
    CHANNEL_OPTIONS,
    call_arguments,
    credentials,
    error,
    grpc_modules,
    read,
    write,
)
from .options import TransportOptions
from .requests import Request


class AsyncGrpcTransport(AsyncTritonTransport):
    """KServe v2 over gRPC; needs the extra ``grpc``.

    Cancelling a call reaches the server: what still waits in its queue is dropped there.
    """

    cancels_on_server = True

    def __init__(self, endpoint: Endpoint, options: TransportOptions) -> None:
        super().__init__(endpoint, options)
        self._options = options
        self._address = endpoint.address
        self._grpc, _ = grpc_modules()
        self._credentials = credentials(endpoint, options)
        self._channel: Any = None

    async def _send(self, request: Request, timeout_s: float) -> Any:
        message = write(request)
        method = self._open_channel().unary_unary(
            message.path, response_deserializer=message.response.FromString
        )
        try:
            response = await method(message.body, **call_arguments(self._options, timeout_s))
        except self._grpc.RpcError as exc:
            raise error(exc) from exc
        except asyncio.CancelledError:
            if self._exchanges.closed:
                # How gRPC ends a call whose channel is closed; nobody has cancelled our task.
                raise ClientClosedError("The client was closed during the call.") from None
            raise
        return read(request, response)

    def _open_channel(self) -> Any:
        if self._channel is None:
            # Made here and not before: it belongs to the running loop.
            import grpc.aio

            self._channel = (
                grpc.aio.insecure_channel(self._address, CHANNEL_OPTIONS)
                if self._credentials is None
                else grpc.aio.secure_channel(self._address, self._credentials, CHANNEL_OPTIONS)
            )
        return self._channel

    async def _disconnect(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()
