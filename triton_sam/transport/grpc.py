"""gRPC for sync code."""

from __future__ import annotations

from typing import Any

from .base import TritonTransport
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


class GrpcTransport(TritonTransport):
    """KServe v2 over gRPC; needs the extra ``grpc``."""

    def __init__(self, endpoint: Endpoint, options: TransportOptions) -> None:
        super().__init__(endpoint, options)
        self._options = options
        self._grpc, _ = grpc_modules()
        secret = credentials(endpoint, options)
        self._channel = (
            self._grpc.insecure_channel(endpoint.address, CHANNEL_OPTIONS)
            if secret is None
            else self._grpc.secure_channel(endpoint.address, secret, CHANNEL_OPTIONS)
        )

    def _send(self, request: Request, timeout_s: float) -> Any:
        message = write(request)
        method = self._channel.unary_unary(
            message.path, response_deserializer=message.response.FromString
        )
        try:
            response = method(message.body, **call_arguments(self._options, timeout_s))
        except self._grpc.RpcError as exc:
            raise error(exc) from exc
        return read(request, response)

    def _disconnect(self) -> None:
        self._channel.close()
