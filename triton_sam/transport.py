"""Moves calls to a Triton server and back, over HTTP or gRPC.

A transport decides nothing about models; :mod:`triton_sam.protocol` does. Every foreign error
becomes one of ours in :func:`foreign_errors`, and nowhere else.
"""

from __future__ import annotations

import http.client
import json
import math
import selectors
import socket
import ssl
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from .errors import (
    InferenceError,
    InvalidInputError,
    MissingExtraError,
    ModelNotReadyError,
    SamError,
    ServerError,
    ServerTimeoutError,
    ServerUnavailableError,
)
from .protocol import Arrays, Call, Served

_URL_FORMS = "localhost:8000, http://host:8000, https://host, grpc://host:8001 or grpcs://host"
_BLOCK = 1 << 20


class Transport(Protocol):
    """What a client needs of the way to a server. Safe to use from several threads."""

    def infer(self, call: Call) -> Arrays:
        """The requested outputs by name. Raises a :class:`ServerError`."""

    def served(self, model: str) -> Served:
        """What ``model`` declares. Raises a :class:`ServerError`."""

    def check_ready(self, models: Sequence[str], timeout_s: float | None = None) -> None:
        """Raise the :class:`ServerError` that says why the server or a model is not ready."""

    def close(self) -> None:
        """Give the connections back."""


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


def open_transport(url: str, *, timeout_s: float, ca_file: str | None = None) -> Transport:
    """The transport for ``url``; nothing is sent yet.

    ``timeout_s``: of a whole call, in seconds. ``ca_file``: PEM certificates to trust with
    ``https`` and ``grpcs`` instead of the system's. Raises :class:`InvalidInputError`, and
    :class:`MissingExtraError` for ``grpc`` without grpcio.
    """
    if not (math.isfinite(timeout_s) and timeout_s > 0):
        raise InvalidInputError(f"timeout_s must be a positive number of seconds; got {timeout_s}.")
    if ca_file is not None and not Path(ca_file).is_file():
        raise InvalidInputError(f"There is no certificate file {ca_file!r}.")
    endpoint = Endpoint.parse(url)
    if endpoint.scheme in ("grpc", "grpcs"):
        return GrpcTransport(endpoint, timeout_s, ca_file)
    return HttpTransport(endpoint, timeout_s, ca_file)


@contextmanager
def foreign_errors(
    endpoint: Endpoint, timeout_s: float, model: str | None = None
) -> Iterator[None]:
    """Turn whatever a client library or the network raises into a :class:`ServerError`."""
    try:
        yield
    except SamError:
        raise
    except Exception as exc:
        raise _translated(exc, endpoint, timeout_s, model) from exc


def _translated(
    exc: Exception, endpoint: Endpoint, timeout_s: float, model: str | None
) -> ServerError:
    if isinstance(exc, InferenceServerException):
        return _translated_answer(exc, endpoint, timeout_s, model)
    if isinstance(exc, TimeoutError):
        return _timeout(endpoint, timeout_s)
    if isinstance(exc, (OSError, http.client.HTTPException)):
        return _unavailable(endpoint, str(exc) or type(exc).__name__)
    return InferenceError(f"The answer of {endpoint.address} cannot be read: {exc}")


def _translated_answer(
    exc: InferenceServerException, endpoint: Endpoint, timeout_s: float, model: str | None
) -> ServerError:
    status, message = str(exc.status()), str(exc.message())
    if status == "StatusCode.DEADLINE_EXCEEDED":
        return _timeout(endpoint, timeout_s)
    if message.startswith("Request for unknown model"):
        return ModelNotReadyError(f"The server at {endpoint.address} does not serve {model!r}.")
    if status in ("StatusCode.UNAVAILABLE", "502", "503", "504"):
        return _unavailable(endpoint, message)
    where = f"The model {model!r}" if model else "The server"
    return InferenceError(f"{where} at {endpoint.address} answered with an error: {message}")


def _timeout(endpoint: Endpoint, timeout_s: float) -> ServerTimeoutError:
    return ServerTimeoutError(f"{endpoint.address} gave no answer within {timeout_s:g} s.")


def _unavailable(endpoint: Endpoint, why: str) -> ServerUnavailableError:
    return ServerUnavailableError(
        f"No Triton server at {endpoint.address}: {why}. "
        "Start one with `triton-sam serve` or `docker compose up`."
    )


class TritonTransport(ABC):
    """What both ways have in common: errors, names and who is ready."""

    def __init__(self, endpoint: Endpoint, timeout_s: float) -> None:
        self._endpoint = endpoint
        self._timeout_s = timeout_s

    def infer(self, call: Call) -> Arrays:
        with self._errors(self._timeout_s, call.model):
            return self._infer(call)

    def served(self, model: str) -> Served:
        with self._errors(self._timeout_s, model):
            return self._served(model)

    def check_ready(self, models: Sequence[str], timeout_s: float | None = None) -> None:
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        for model in models:
            with self._errors(timeout_s, model):
                if not self._is_ready(model, timeout_s):
                    raise ModelNotReadyError(
                        f"The model {model!r} at {self._endpoint.address} is not ready."
                    )

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def _infer(self, call: Call) -> Arrays: ...

    @abstractmethod
    def _served(self, model: str) -> Served: ...

    @abstractmethod
    def _is_ready(self, model: str, timeout_s: float) -> bool: ...

    @abstractmethod
    def _ready_models(self) -> list[str]: ...

    @contextmanager
    def _errors(self, timeout_s: float, model: str) -> Iterator[None]:
        try:
            with foreign_errors(self._endpoint, timeout_s, model):
                yield
        except ModelNotReadyError as exc:
            raise ModelNotReadyError(f"{exc}{self._what_it_serves()}") from exc.__cause__

    def _what_it_serves(self) -> str:
        # A help for the reader only; servers may refuse to list their models.
        with suppress(ServerError), foreign_errors(self._endpoint, self._timeout_s):
            return f" It serves: {', '.join(self._ready_models()) or 'nothing'}."
        return ""


class HttpTransport(TritonTransport):
    """KServe v2 over HTTP with binary tensors.

    tritonclient writes and reads the bodies. The connections are our own: its HTTP client belongs
    to the thread that made it, leaks that thread's event loop, and bounds each read, not the call.
    """

    def __init__(self, endpoint: Endpoint, timeout_s: float, ca_file: str | None = None) -> None:
        super().__init__(endpoint, timeout_s)
        self._tls = _tls_context(ca_file) if endpoint.secure else None
        self._idle: list[http.client.HTTPConnection] = []
        self._closed = False

    def close(self) -> None:
        self._closed = True
        while connection := self._pop_idle():
            connection.close()

    def _infer(self, call: Call) -> Arrays:
        body, json_size = triton_http.InferenceServerClient.generate_request_body(
            _tensors(triton_http, call),
            outputs=[triton_http.InferRequestedOutput(name) for name in call.outputs],
        )
        headers = {
            "Content-Type": "application/octet-stream",
            "Inference-Header-Content-Length": str(json_size),
        }
        answer = self._ask("POST", f"models/{quote(call.model)}/infer", body=body, headers=headers)
        length = answer.headers.get("Inference-Header-Content-Length")
        result = triton_http.InferenceServerClient.parse_response_body(
            answer.body, header_length=None if length is None else int(length)
        )
        return _outputs(result, call)

    def _served(self, model: str) -> Served:
        metadata = json.loads(self._ask("GET", f"models/{quote(model)}").body)
        return Served(
            frozenset(tensor["name"] for tensor in metadata["inputs"]),
            frozenset(tensor["name"] for tensor in metadata["outputs"]),
        )

    def _is_ready(self, model: str, timeout_s: float) -> bool:
        answer = self._exchange("GET", f"models/{quote(model)}/ready", timeout_s)
        if answer.status in (502, 503, 504):
            raise answer.error()
        return answer.status == 200

    def _ready_models(self) -> list[str]:
        index = json.loads(self._ask("POST", "repository/index", body=b"{}").body)
        return [model["name"] for model in index if model.get("state") == "READY"]

    def _ask(self, method: str, path: str, **content: Any) -> _Answer:
        answer = self._exchange(method, path, self._timeout_s, **content)
        if answer.status != 200:
            raise answer.error()
        return answer

    def _exchange(self, method: str, path: str, timeout_s: float, **content: Any) -> _Answer:
        """One request and its answer on a connection that no other thread uses meanwhile."""
        deadline = _Deadline(timeout_s)
        connection = self._connection(deadline)
        try:
            sock = connection.sock
            sock.settimeout(deadline.left())
            connection.request(method, f"{self._endpoint.path}/v2/{path}", **content)
            sock.settimeout(deadline.left())
            response = connection.getresponse()
            body = _read(response, sock, deadline)
        except BaseException:
            # Whatever is still under way on it would be taken for the next answer.
            connection.close()
            raise
        self._give_back(connection)
        return _Answer(response.status, response.headers, body)

    def _connection(self, deadline: _Deadline) -> http.client.HTTPConnection:
        while connection := self._pop_idle():
            if not _is_dropped(connection):
                return connection
            connection.close()
        connection = self._new_connection(deadline.left())
        connection.connect()
        return connection

    def _pop_idle(self) -> http.client.HTTPConnection | None:
        # Not `if self._idle`: another thread may take the last one in between.
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def _new_connection(self, timeout_s: float) -> http.client.HTTPConnection:
        host, port = self._endpoint.host, self._endpoint.port
        if self._tls is None:
            return http.client.HTTPConnection(host, port, timeout=timeout_s)
        return http.client.HTTPSConnection(host, port, timeout=timeout_s, context=self._tls)

    def _give_back(self, connection: http.client.HTTPConnection) -> None:
        if self._closed or connection.sock is None:
            connection.close()
        else:
            self._idle.append(connection)


@dataclass(frozen=True)
class _Answer:
    status: int
    headers: Message
    body: bytes

    def error(self) -> InferenceServerException:
        try:
            message = json.loads(self.body)["error"]
        except (ValueError, KeyError, TypeError):
            message = f"HTTP status {self.status}, {self.body[:200].decode(errors='replace')!r}"
        return InferenceServerException(message, str(self.status))


class _Deadline:
    """The moment until which a whole call has to end."""

    def __init__(self, timeout_s: float) -> None:
        self._end = time.monotonic() + timeout_s

    def left(self) -> float:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


def _read(response: http.client.HTTPResponse, sock: socket.socket, deadline: _Deadline) -> bytes:
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


def _tls_context(ca_file: str | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except ssl.SSLError as exc:
        raise InvalidInputError(f"{ca_file!r} holds no PEM certificates: {exc}.") from exc


class GrpcTransport(TritonTransport):
    """KServe v2 over gRPC; needs the extra ``grpc``."""

    def __init__(self, endpoint: Endpoint, timeout_s: float, ca_file: str | None = None) -> None:
        super().__init__(endpoint, timeout_s)
        self._grpc = _grpc_module()
        self._client = self._grpc.InferenceServerClient(
            endpoint.address,
            ssl=endpoint.secure,
            root_certificates=ca_file,
            channel_args=_CHANNEL_ARGS,
        )

    def close(self) -> None:
        self._client.close()

    def _infer(self, call: Call) -> Arrays:
        result = self._client.infer(
            call.model,
            _tensors(self._grpc, call),
            outputs=[self._grpc.InferRequestedOutput(name) for name in call.outputs],
            client_timeout=self._timeout_s,
        )
        return _outputs(result, call)

    def _served(self, model: str) -> Served:
        metadata = self._client.get_model_metadata(model, client_timeout=self._timeout_s)
        return Served(
            frozenset(tensor.name for tensor in metadata.inputs),
            frozenset(tensor.name for tensor in metadata.outputs),
        )

    def _is_ready(self, model: str, timeout_s: float) -> bool:
        return bool(self._client.is_model_ready(model, client_timeout=timeout_s))

    def _ready_models(self) -> list[str]:
        index = self._client.get_model_repository_index(client_timeout=self._timeout_s)
        return [model.name for model in index.models if model.state == "READY"]


# Given arguments replace tritonclient's own, message sizes included. Keepalive pings stay off:
# Triton ends connections that ping often. A restarted server is found again within a second.
_CHANNEL_ARGS = [
    ("grpc.max_send_message_length", 2**31 - 1),
    ("grpc.max_receive_message_length", 2**31 - 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


def _grpc_module() -> Any:
    # tritonclient says RuntimeError where grpcio or protobuf is not installed.
    try:
        import tritonclient.grpc
    except (ImportError, RuntimeError) as exc:
        raise MissingExtraError(
            "gRPC needs an extra: pip install 'triton-sam[grpc]'. HTTP works without it."
        ) from exc
    return tritonclient.grpc


def _tensors(module: Any, call: Call) -> list[Any]:
    return [
        module.InferInput(
            name, list(array.shape), np_to_triton_dtype(array.dtype)
        ).set_data_from_numpy(array)
        for name, array in call.inputs.items()
    ]


def _outputs(result: Any, call: Call) -> Arrays:
    arrays = {name: result.as_numpy(name) for name in call.outputs}
    return {name: array for name, array in arrays.items() if array is not None}
