"""Moves calls to a Triton server and back, over HTTP or gRPC, for sync and async code.

A transport decides nothing about models; :mod:`triton_sam.protocol` does. What all four share is
written once and without I/O: retries, deadlines and errors in ``base`` and ``failures``, HTTP's
messages in ``http_messages``, gRPC's in ``grpc_messages``. The other four modules hold connections.
"""

from __future__ import annotations

from .base import AsyncTransport, Transport
from .endpoint import Endpoint
from .failures import foreign_errors
from .options import Retries, TransportOptions

__all__ = [
    "AsyncTransport",
    "Endpoint",
    "Retries",
    "Transport",
    "TransportOptions",
    "foreign_errors",
    "open_async_transport",
    "open_transport",
]


def open_transport(url: str, options: TransportOptions | None = None) -> Transport:
    """The transport for ``url``; nothing is sent yet.

    Raises :class:`InvalidInputError` for a URL or files that cannot be used, and
    :class:`MissingExtraError` for ``grpc`` without grpcio.
    """
    endpoint, options = Endpoint.parse(url), options or TransportOptions()
    # Each is imported when it is asked for: gRPC and aiohttp take long to load.
    if endpoint.grpc:
        from .grpc import GrpcTransport

        return GrpcTransport(endpoint, options)
    from .http import HttpTransport

    return HttpTransport(endpoint, options)


def open_async_transport(url: str, options: TransportOptions | None = None) -> AsyncTransport:
    """As :func:`open_transport`, for async code; connections are made in the loop that calls."""
    endpoint, options = Endpoint.parse(url), options or TransportOptions()
    if endpoint.grpc:
        from .aio_grpc import AsyncGrpcTransport

        return AsyncGrpcTransport(endpoint, options)
    from .aio_http import AsyncHttpTransport

    return AsyncHttpTransport(endpoint, options)
