"""The four transports against small servers on real sockets."""

from __future__ import annotations

import asyncio
import http.server
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import grpc
import numpy as np
import pytest
from fake_triton import (
    GrpcTriton,
    HttpTriton,
    free_port,
    grpc_server,
    http_server,
    silent_socket,
)
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException
from ways import HTTP, ONCE, SCHEMES, call, f32, open_way, server, transport, works

from triton_sam.errors import (
    ClientClosedError,
    InferenceError,
    InvalidInputError,
    ModelNotReadyError,
    ServerError,
    ServerTimeoutError,
    ServerUnavailableError,
)
from triton_sam.protocol import Call, Served
from triton_sam.transport import open_async_transport, open_transport
from triton_sam.transport.aio_grpc import AsyncGrpcTransport
from triton_sam.transport.aio_http import AsyncHttpTransport
from triton_sam.transport.grpc import GrpcTransport
from triton_sam.transport.grpc_messages import write
from triton_sam.transport.http import HttpTransport
from triton_sam.transport.requests import Infer


@pytest.mark.parametrize("scheme", SCHEMES)
def test_arrays_there_and_back(scheme: str) -> None:
    x = np.random.default_rng(0).normal(size=(1, 32, 256, 256)).astype(np.float32)
    y = np.zeros((2, 0, 2), np.float32)
    with server(scheme) as port, transport(scheme, port) as way:
        for _ in range(3):
            outputs = way.infer(call(x=x, y=y))
            assert set(outputs) == {"x2", "y2"}
            np.testing.assert_array_equal(outputs["x2"], 2 * x)
            assert (outputs["y2"].shape, outputs["y2"].dtype) == ((2, 0, 2), np.float32)


def test_grpc_requests_are_what_protobuf_writes() -> None:
    rng = np.random.default_rng(0)
    inputs = {
        "image": rng.normal(size=(1, 3, 300, 200)).astype(np.float32),
        "turned": rng.normal(size=(4, 5)).astype(np.float32).T,
        "empty": np.zeros((1, 0, 4), np.int64),
        "one": np.ones(1, np.float16),
        "jpeg": np.array([b"\xff\xd8"], np.object_),
    }
    body = write(Infer(Call("m", inputs, ("a", "b")))).body
    request = service_pb2.ModelInferRequest.FromString(body)
    assert (request.model_name, [tensor.name for tensor in request.outputs]) == ("m", ["a", "b"])
    declared = [(tensor.name, tensor.datatype, tuple(tensor.shape)) for tensor in request.inputs]
    types = ("FP32", "FP32", "INT64", "FP16", "BYTES")
    assert declared == [
        (name, kind, array.shape) for (name, array), kind in zip(inputs.items(), types, strict=True)
    ]
    *raw, text = request.raw_input_contents
    assert raw == [array.tobytes() for name, array in inputs.items() if name != "jpeg"]
    assert text == b"\x02\x00\x00\x00\xff\xd8"
    again = service_pb2.ModelInferRequest()
    again.CopyFrom(request)
    assert again.SerializeToString(deterministic=True) == body


@pytest.mark.parametrize("scheme", SCHEMES)
def test_messages_larger_than_grpcs_default(scheme: str) -> None:
    x = np.ones((1, 3, 1024, 1024), np.float32)  # 12.6 MB both ways; the default is 4 MB
    with server(scheme) as port, transport(scheme, port) as way:
        assert float(way.infer(call(x=x))["x2"].sum()) == 2 * x.size


@pytest.mark.parametrize("scheme", SCHEMES)
def test_only_requested_outputs_come_back(scheme: str) -> None:
    inputs = {"x": np.ones(1, np.float32), "y": np.ones(1, np.float32)}
    with server(scheme) as port, transport(scheme, port) as way:
        assert set(way.infer(Call("double", inputs, ("y2",)))) == {"y2"}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_metadata_and_readiness(scheme: str) -> None:
    with server(scheme) as port, transport(scheme, port) as way:
        assert way.served("double") == Served(frozenset({"x", "y"}), frozenset({"x2"}))
        way.check_ready(["double", "broken"])
        with pytest.raises(
            ModelNotReadyError, match=r"'other' at .* is not ready\. It serves: dou"
        ):
            way.check_ready(["double", "other"])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_token_that_is_refused_is_not_called_a_model_that_is_not_ready(scheme: str) -> None:
    class Guarded(HttpTriton):
        def do_GET(self) -> None:
            self.fail(401, "no token")

    class GuardedServicer(GrpcTriton):
        def ModelReady(self, request: Any, context: Any) -> Any:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")

    guarded = http_server(Guarded) if scheme in HTTP else grpc_server(servicer=GuardedServicer())
    with (
        guarded as port,
        transport(scheme, port) as way,
        pytest.raises(InferenceError, match=r"'double' at 127.* answered with an error: no token"),
    ):
        way.check_ready(["double"])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_unknown_models_are_named_with_those_there_are(scheme: str) -> None:
    with server(scheme) as port, transport(scheme, port) as way:
        requests: list[Callable[[], Any]] = [
            lambda: way.infer(call("other")),
            lambda: way.served("other"),
        ]
        for request in requests:
            with pytest.raises(ModelNotReadyError, match="does not serve 'other'") as caught:
                request()
            assert str(caught.value).endswith("It serves: double, broken.")
            assert isinstance(caught.value.__cause__, InferenceServerException)
        assert works(way)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_naming_the_models_stays_within_the_time_of_the_call(scheme: str) -> None:
    listing = threading.Event()

    class Slow(HttpTriton):
        def do_POST(self) -> None:
            if self.path.endswith("index"):
                listing.wait(5)
            super().do_POST()

    class SlowServicer(GrpcTriton):
        def RepositoryIndex(self, request: Any, context: Any) -> Any:
            listing.wait(5)
            return super().RepositoryIndex(request, context)

    slow = http_server(Slow) if scheme in HTTP else grpc_server(servicer=SlowServicer())
    with slow as port, transport(scheme, port) as way:
        started = time.monotonic()
        with pytest.raises(ModelNotReadyError, match=r"does not serve 'other'\.$"):
            way.infer(call("other"), 0.4)
        assert time.monotonic() - started < 2
        listing.set()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_errors_of_the_server_keep_their_message(scheme: str) -> None:
    with server(scheme) as port, transport(scheme, port) as way:
        with pytest.raises(InferenceError, match=r"'broken' at 127.*: it went wrong"):
            way.infer(call("broken"))
        assert works(way)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nobody_listens(scheme: str) -> None:
    port = free_port()
    with transport(scheme, port, retries=ONCE) as way:
        requests: list[Callable[[], Any]] = [
            lambda: way.infer(call()),
            lambda: way.served("double"),
            lambda: way.check_ready(["double"]),
        ]
        for request in requests:
            with pytest.raises(ServerUnavailableError) as caught:
                request()
            assert f"No Triton server at 127.0.0.1:{port}" in str(caught.value)
            assert "`triton-sam serve` or `docker compose up`" in str(caught.value)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_host_that_does_not_exist(scheme: str) -> None:
    url = f"{scheme}://no-such-host.invalid:8000"
    with (
        open_way(url, timeout_s=20, retries=ONCE) as way,
        pytest.raises(ServerUnavailableError, match=r"no-such-host\.invalid:8000"),
    ):
        way.infer(call())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_server_that_never_answers(scheme: str) -> None:
    with silent_socket() as port, transport(scheme, port, timeout_s=0.3) as way:
        big = np.zeros((3, 1024, 1024), np.float32)  # more than the socket's buffers take
        requests: list[Callable[[], Any]] = [
            lambda: way.infer(call()),
            lambda: way.infer(call(x=big)),
            lambda: way.served("double"),
        ]
        for request in requests:
            started = time.monotonic()
            with pytest.raises(ServerTimeoutError, match=r"no answer within 0\.3 s"):
                request()
            assert 0.2 < time.monotonic() - started < 5
    with silent_socket() as port, transport(scheme, port, timeout_s=20) as way:
        started = time.monotonic()
        with pytest.raises(ServerTimeoutError, match=r"within 0\.1 s"):
            way.check_ready(["double"], timeout_s=0.1)
        assert time.monotonic() - started < 5


@pytest.mark.parametrize("scheme", HTTP)
def test_http_timeout_bounds_the_whole_call(scheme: str) -> None:
    class Drip(HttpTriton):
        def do_POST(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b" ")
                time.sleep(0.05)

    with http_server(Drip) as port, transport(scheme, port, timeout_s=0.3) as way:
        started = time.monotonic()
        with pytest.raises(ServerTimeoutError):
            way.infer(call())
        assert time.monotonic() - started < 4  # the whole answer takes five


@pytest.mark.parametrize("scheme", HTTP)
def test_http_works_again_after_a_timeout(scheme: str) -> None:
    slow = threading.Event()

    class Slow(HttpTriton):
        def do_POST(self) -> None:
            if slow.is_set():
                time.sleep(0.5)
            super().do_POST()

    with http_server(Slow) as port, transport(scheme, port, timeout_s=0.2) as way:
        assert works(way)
        slow.set()
        with pytest.raises(ServerTimeoutError):
            way.infer(call(x=f32([7])))
        slow.clear()
        assert works(way)


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_threads_share_a_transport(scheme: str) -> None:
    def ask(number: int) -> bool:
        x = np.full((100, 100), number, np.float32)
        return bool((way.infer(call(x=x))["x2"] == 2 * number).all())

    with server(scheme) as port, transport(scheme, port) as way, ThreadPoolExecutor(6) as pool:
        assert all(pool.map(ask, range(60)))


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_many_calls_at_once(scheme: str) -> None:
    async def ask(way: Any, number: int) -> bool:
        x = np.full((100, 100), number, np.float32)
        return bool(((await way.infer(call(x=x)))["x2"] == 2 * number).all())

    async def ask_all(port: int) -> list[bool]:
        way = open_async_transport(f"{scheme}://127.0.0.1:{port}")
        try:
            return await asyncio.gather(*[ask(way, number) for number in range(60)])
        finally:
            await way.close()

    with server(scheme) as port:
        assert asyncio.run(ask_all(port)) == [True] * 60


def raw_http(answer: bytes) -> type[http.server.BaseHTTPRequestHandler]:
    class Raw(HttpTriton):
        def do_POST(self) -> None:
            self.wfile.write(answer)
            self.close_connection = True

    return Raw


def response(body: bytes, status: str = "200 OK", length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Length: {size}\r\n\r\n".encode() + body


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (b"", ServerUnavailableError, "closed connection|disconnected"),
        (b"\x00\x01garbage\r\n\r\n", ServerUnavailableError, "No Triton server"),
        (response(b"{}", length=100), ServerUnavailableError, "No Triton server"),
        (response(b"<html>"), InferenceError, "cannot be read"),
        (response(b"[]"), InferenceError, "cannot be read"),
        (response(b"<html>nope", "404 Not Found"), InferenceError, "HTTP status 404, '<html>nope"),
        (response(b'{"error": "big"}', "413 Too Large"), InferenceError, ": big"),
        (response(b"<html>", "502 Bad Gateway"), ServerUnavailableError, "HTTP status 502"),
        (response(b'{"error": "busy"}', "503 Busy"), ServerUnavailableError, "busy"),
    ],
)
@pytest.mark.parametrize("scheme", HTTP)
def test_answers_that_are_not_tritons(
    scheme: str, answer: bytes, error: type[ServerError], message: str
) -> None:
    with (
        http_server(raw_http(answer)) as port,
        transport(scheme, port, retries=ONCE) as way,
        pytest.raises(error, match=message),
    ):
        way.infer(call())


@pytest.mark.parametrize("aio", ["", "aio+"])
def test_each_protocol_on_the_port_of_the_other(aio: str) -> None:
    with (
        grpc_server() as port,
        transport(f"{aio}http", port) as way,
        pytest.raises(ServerUnavailableError),
    ):
        way.infer(call())
    with (
        http_server() as port,
        transport(f"{aio}grpc", port, timeout_s=2) as way,
        pytest.raises((ServerUnavailableError, ServerTimeoutError)),
    ):
        way.infer(call())


def test_grpc_without_grpcio() -> None:
    code = (
        "import sys; sys.modules['grpc'] = None\n"
        "from triton_sam import MissingExtraError, SAM2TritonClient\n"
        "SAM2TritonClient('localhost:8000').close()\n"
        "try: SAM2TritonClient('grpc://localhost:8001')\n"
        "except MissingExtraError as exc: sys.exit(str(exc))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'triton-sam[grpc]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_scheme_chooses_the_transport() -> None:
    for url, kind in [("localhost:8000", HttpTransport), ("grpc://localhost:8001", GrpcTransport)]:
        with closing(open_transport(url)) as way:
            assert type(way) is kind
    assert type(open_async_transport("localhost:8000")) is AsyncHttpTransport
    assert type(open_async_transport("grpc://localhost:8001")) is AsyncGrpcTransport


@pytest.mark.parametrize("scheme", SCHEMES)
def test_closed(scheme: str) -> None:
    with server(scheme) as port, transport(scheme, port) as way:
        assert works(way)
        way.close()
        uses: list[Callable[[], Any]] = [
            lambda: way.infer(call()),
            lambda: way.served("double"),
            lambda: way.check_ready(["double"]),
        ]
        for use in uses:
            with pytest.raises(ClientClosedError):
                use()


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_closing_during_a_call(scheme: str) -> None:
    async def close_during_a_call(port: int) -> None:
        way = open_async_transport(f"{scheme}://127.0.0.1:{port}")
        asking = asyncio.create_task(way.infer(call()))
        await asyncio.sleep(0.2)
        await way.close()
        with pytest.raises(ClientClosedError):
            await asking

    with silent_socket() as port:
        asyncio.run(close_during_a_call(port))


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_closing_before_a_call_is_sent(scheme: str) -> None:
    async def close_at_once(port: int) -> None:
        way = open_async_transport(f"{scheme}://127.0.0.1:{port}")
        asking = asyncio.create_task(way.infer(call()))
        await asyncio.sleep(0)
        await way.close()
        with pytest.raises(ClientClosedError):
            await asking

    with server(scheme) as port:
        asyncio.run(close_at_once(port))


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_transport_belongs_to_one_event_loop(scheme: str) -> None:
    with server(scheme) as port, transport(f"aio+{scheme}", port) as way:
        assert works(way)
        with pytest.raises(InvalidInputError, match="another event loop"):
            asyncio.run(way._inner.infer(call()))


def test_close_ends_the_connections() -> None:
    with http_server() as port:
        way = open_transport(f"127.0.0.1:{port}")
        assert works(way)
        way.close()
        assert isinstance(way, HttpTransport) and way._idle == []


def test_closing_during_a_call_in_another_thread_ends_its_connection() -> None:
    begun, closed = threading.Event(), threading.Event()

    class Waiting(HttpTriton):
        def do_POST(self) -> None:
            begun.set()
            closed.wait(10)
            super().do_POST()

    with http_server(Waiting) as port, ThreadPoolExecutor(1) as pool:
        way = open_transport(f"127.0.0.1:{port}")
        answered = pool.submit(works, way)
        assert begun.wait(10)
        way.close()
        closed.set()
        assert answered.result()
        assert isinstance(way, HttpTransport) and way._idle == []
