"""The four ways to a server, behind the methods of the sync ones."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import numpy as np
from faces import Blocking
from fake_triton import grpc_server, http_server
from numpy.typing import ArrayLike, NDArray

from triton_sam.protocol import Call
from triton_sam.transport import (
    Retries,
    Transport,
    TransportOptions,
    open_async_transport,
    open_transport,
)

SCHEMES = ("http", "grpc", "aio+http", "aio+grpc")
HTTP = ("http", "aio+http")
ONCE = Retries(attempts=1)


def f32(values: ArrayLike) -> NDArray[np.float32]:
    return np.asarray(values, np.float32)


def server(scheme: str, port: int = 0) -> Any:
    return http_server(port=port) if scheme in HTTP else grpc_server(port)


def open_way(url: str, **options: Any) -> Any:
    """A transport with sync methods; the real one is async for a url that starts with aio+."""
    given = TransportOptions(**options)
    if url.startswith("aio+"):
        return Blocking(lambda: open_async_transport(url[4:], given))
    return closing(open_transport(url, given))


def transport(scheme: str, port: int, timeout_s: float = 10.0, **options: Any) -> Any:
    return open_way(f"{scheme}://127.0.0.1:{port}", timeout_s=timeout_s, **options)


def call(model: str = "double", **inputs: NDArray[np.float32]) -> Call:
    inputs = inputs or {"x": f32([[1, 2, 3]])}
    return Call(model, inputs, tuple(f"{name}2" for name in inputs))


def works(way: Transport) -> bool:
    return np.array_equal(way.infer(call())["x2"], [[2, 4, 6]])
