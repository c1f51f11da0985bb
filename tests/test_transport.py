"""The two transports against small servers on real sockets, and every foreign error."""

from __future__ import annotations

import http.client
import http.server
import json
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from triton_sam import errors
from triton_sam.errors import (
    InferenceError,
    InvalidInputError,
    ModelNotReadyError,
    ServerError,
    ServerTimeoutError,
    ServerUnavailableError,
)
from triton_sam.protocol import Call, Served
from triton_sam.transport import (
    Endpoint,
    GrpcTransport,
    HttpTransport,
    Transport,
    foreign_errors,
    open_transport,
)

# The servers below know two models: `double` returns its inputs times two, `broken` fails.
MODELS = ("double", "broken")
SCHEMES = ("http", "grpc")


def f32(values: ArrayLike) -> NDArray[np.float32]:
    return np.asarray(values, np.float32)


def unknown(model: str) -> str:
    return f"Request for unknown model: '{model}' is not found"


class HttpTriton(http.server.BaseHTTPRequestHandler):
    """Just enough of KServe v2 over HTTP."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        _, _, _, model, *rest = self.path.split("/")
        if rest == ["ready"]:
            self.answer(200 if model in MODELS else 400)
        elif model in MODELS:
            self.say({"inputs": [{"name": "x"}, {"name": "y"}], "outputs": [{"name": "x2"}]})
        else:
            self.fail(400, unknown(model))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v2/repository/index":
            states = [{"name": name, "state": "READY"} for name in MODELS]
            return self.say([*states, {"name": "failed", "state": "UNAVAILABLE"}])
        model = self.path.split("/")[3]
        if model == "double":
            return self.double(body, int(self.headers["Inference-Header-Content-Length"]))
        if model == "broken":
            return self.fail(500, "it went wrong")
        return self.fail(400, unknown(model))

    def double(self, body: bytes, json_size: int) -> None:
        request, data = json.loads(body[:json_size]), body[json_size:]
        outputs, blobs = [], []
        for tensor in request["inputs"]:
            size = tensor["parameters"]["binary_data_size"]
            blob = (2 * np.frombuffer(data[:size], np.float32)).tobytes()
            data = data[size:]
            if {"name": f"{tensor['name']}2", "parameters": {"binary_data": True}} in request[
                "outputs"
            ]:
                parameters = {"binary_data_size": len(blob)}
                outputs.append({**tensor, "name": f"{tensor['name']}2", "parameters": parameters})
                blobs.append(blob)
        head = json.dumps({"outputs": outputs}).encode()
        self.answer(200, head + b"".join(blobs), {"Inference-Header-Content-Length": len(head)})

    def say(self, content: Any, status: int = 200) -> None:
        self.answer(status, json.dumps(content).encode())

    def fail(self, status: int, message: str) -> None:
        self.say({"error": message}, status)

    def answer(self, status: int, body: bytes = b"", headers: dict[str, Any] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class GrpcTriton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """The same over gRPC."""

    def ModelReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelReadyResponse(ready=request.name in MODELS)

    def ModelMetadata(self, request: Any, context: Any) -> Any:
        self.check(request.name, context)
        tensor = service_pb2.ModelMetadataResponse.TensorMetadata
        return service_pb2.ModelMetadataResponse(
            inputs=[tensor(name="x"), tensor(name="y")], outputs=[tensor(name="x2")]
        )

    def RepositoryIndex(self, request: Any, context: Any) -> Any:
        index = service_pb2.RepositoryIndexResponse()
        for name, state in [*((name, "READY") for name in MODELS), ("failed", "UNAVAILABLE")]:
            index.models.add(name=name, state=state)
        return index

    def ModelInfer(self, request: Any, context: Any) -> Any:
        self.check(request.model_name, context)
        if request.model_name == "broken":
            context.abort(grpc.StatusCode.INTERNAL, "it went wrong")
        response = service_pb2.ModelInferResponse()
        wanted = {output.name for output in request.outputs}
        for tensor, blob in zip(request.inputs, request.raw_input_contents, strict=True):
            if f"{tensor.name}2" in wanted:
                response.outputs.add(name=f"{tensor.name}2", datatype="FP32", shape=tensor.shape)
                doubled = 2 * np.frombuffer(blob, np.float32)
                response.raw_output_contents.append(doubled.tobytes())
        return response

    def check(self, model: str, context: Any) -> None:
        if model not in MODELS:
            context.abort(grpc.StatusCode.NOT_FOUND, unknown(model))


class HttpServer(http.server.ThreadingHTTPServer):
    """Ends its connections with itself, as a process does."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.connections: list[socket.socket] = []

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address

    def end(self) -> None:
        self.shutdown()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients of these tests hang up; that is no news."""


@contextmanager
def http_server(
    handler: type[http.server.BaseHTTPRequestHandler] = HttpTriton,
    port: int = 0,
    tls: ssl.SSLContext | None = None,
) -> Iterator[int]:
    with HttpServer(("127.0.0.1", port), handler) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.end()
            thread.join()


@contextmanager
def grpc_server(port: int = 0) -> Iterator[int]:
    sizes = [("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)]
    server = grpc.server(ThreadPoolExecutor(4), options=sizes)
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(GrpcTriton(), server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()


def server(scheme: str, port: int = 0) -> Any:
    return http_server(port=port) if scheme == "http" else grpc_server(port)


@contextmanager
def silent_socket() -> Iterator[int]:
    """Accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def transport(scheme: str, port: int, timeout_s: float = 10.0) -> Any:
    return closing(open_transport(f"{scheme}://127.0.0.1:{port}", timeout_s=timeout_s))


def call(model: str = "double", **inputs: NDArray[np.float32]) -> Call:
    inputs = inputs or {"x": f32([[1, 2, 3]])}
    return Call(model, inputs, tuple(f"{name}2" for name in inputs))


def works(way: Transport) -> bool:
    return np.array_equal(way.infer(call())["x2"], [[2, 4, 6]])


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
def test_errors_of_the_server_keep_their_message(scheme: str) -> None:
    with server(scheme) as port, transport(scheme, port) as way:
        with pytest.raises(InferenceError, match=r"'broken' at 127.*: it went wrong"):
            way.infer(call("broken"))
        assert works(way)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nobody_listens(scheme: str) -> None:
    port = free_port()
    with transport(scheme, port) as way:
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
    way = open_transport(f"{scheme}://no-such-host.invalid:8000", timeout_s=20)
    with closing(way), pytest.raises(ServerUnavailableError, match=r"no-such-host\.invalid:8000"):
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
            assert 0.2 < time.monotonic() - started < 2
        started = time.monotonic()
        with pytest.raises(ServerTimeoutError, match=r"within 0\.1 s"):
            way.check_ready(["double"], timeout_s=0.1)
        assert time.monotonic() - started < 0.29


def test_http_timeout_bounds_the_whole_call() -> None:
    class Drip(HttpTriton):
        def do_POST(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b" ")
                time.sleep(0.05)

    with http_server(Drip) as port, transport("http", port, timeout_s=0.3) as way:
        started = time.monotonic()
        with pytest.raises(ServerTimeoutError):
            way.infer(call())
        assert time.monotonic() - started < 1


def test_http_works_again_after_a_timeout() -> None:
    slow = threading.Event()

    class Slow(HttpTriton):
        def do_POST(self) -> None:
            if slow.is_set():
                time.sleep(0.5)
            super().do_POST()

    with http_server(Slow) as port, transport("http", port, timeout_s=0.2) as way:
        assert works(way)
        slow.set()
        with pytest.raises(ServerTimeoutError):
            way.infer(call(x=f32([7])))
        slow.clear()
        assert works(way)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_works_again_after_a_restart(scheme: str) -> None:
    port = free_port()
    with transport(scheme, port) as way:
        with server(scheme, port):
            assert works(way)
        with pytest.raises(ServerUnavailableError):
            way.infer(call())
        with server(scheme, port):
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline:
                try:
                    assert works(way)
                    break
                except ServerUnavailableError:  # gRPC waits up to a second before it reconnects
                    time.sleep(0.1)
            assert works(way)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_threads_share_a_transport(scheme: str) -> None:
    def ask(number: int) -> bool:
        x = np.full((100, 100), number, np.float32)
        return bool((way.infer(call(x=x))["x2"] == 2 * number).all())

    with server(scheme) as port, transport(scheme, port) as way, ThreadPoolExecutor(6) as pool:
        assert all(pool.map(ask, range(60)))


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
        (b"", ServerUnavailableError, "closed connection"),
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
def test_answers_that_are_not_tritons(
    answer: bytes, error: type[ServerError], message: str
) -> None:
    with (
        http_server(raw_http(answer)) as port,
        transport("http", port) as way,
        pytest.raises(error, match=message),
    ):
        way.infer(call())


def test_each_protocol_on_the_port_of_the_other() -> None:
    with (
        grpc_server() as port,
        transport("http", port) as way,
        pytest.raises(ServerUnavailableError),
    ):
        way.infer(call())
    with (
        http_server() as port,
        transport("grpc", port, timeout_s=2) as way,
        pytest.raises((ServerUnavailableError, ServerTimeoutError)),
    ):
        way.infer(call())


FOREIGN: list[tuple[Exception, type[ServerError]]] = [
    (ConnectionRefusedError(111, "Connection refused"), ServerUnavailableError),
    (ConnectionResetError(104, "reset"), ServerUnavailableError),
    (BrokenPipeError(32, "pipe"), ServerUnavailableError),
    (socket.gaierror(-2, "Name or service not known"), ServerUnavailableError),
    (ssl.SSLError(1, "wrong version number"), ServerUnavailableError),
    (ssl.SSLCertVerificationError(1, "self-signed"), ServerUnavailableError),
    (http.client.RemoteDisconnected("gone"), ServerUnavailableError),
    (http.client.BadStatusLine("???"), ServerUnavailableError),
    (http.client.IncompleteRead(b"", 9), ServerUnavailableError),
    (TimeoutError("timed out"), ServerTimeoutError),
    (InferenceServerException("slow", "StatusCode.DEADLINE_EXCEEDED"), ServerTimeoutError),
    (InferenceServerException("down", "StatusCode.UNAVAILABLE"), ServerUnavailableError),
    (InferenceServerException(unknown("m"), "StatusCode.UNAVAILABLE"), ModelNotReadyError),
    (InferenceServerException(unknown("m"), "StatusCode.NOT_FOUND"), ModelNotReadyError),
    (InferenceServerException(unknown("m"), "400"), ModelNotReadyError),
    (InferenceServerException("bad gateway", "502"), ServerUnavailableError),
    (InferenceServerException("gateway timeout", "504"), ServerUnavailableError),
    (InferenceServerException("bad shape", "StatusCode.INVALID_ARGUMENT"), InferenceError),
    (InferenceServerException("too big", "StatusCode.RESOURCE_EXHAUSTED"), InferenceError),
    (InferenceServerException("?", "StatusCode.UNIMPLEMENTED"), InferenceError),
    (InferenceServerException("stopped", "StatusCode.CANCELLED"), InferenceError),
    (InferenceServerException("no status"), InferenceError),
    (InferenceServerException("boom", "500"), InferenceError),
    (json.JSONDecodeError("no", "", 0), InferenceError),
    (KeyError("outputs"), InferenceError),
    (RuntimeError("anything else"), InferenceError),
]


@pytest.mark.parametrize(("foreign", "ours"), FOREIGN, ids=lambda value: repr(value)[:60])
def test_every_foreign_error_is_mapped(foreign: Exception, ours: type[ServerError]) -> None:
    endpoint = Endpoint.parse("localhost:8000")
    with pytest.raises(ServerError) as caught, foreign_errors(endpoint, 3.0, "m"):
        raise foreign
    assert type(caught.value) is ours
    assert caught.value.__cause__ is foreign
    assert "localhost:8000" in str(caught.value)


def test_our_own_errors_pass_unchanged() -> None:
    mine = errors.PromptError("mine")
    with (
        pytest.raises(errors.PromptError) as caught,
        foreign_errors(Endpoint.parse("localhost:8000"), 3.0),
    ):
        raise mine
    assert caught.value is mine


@pytest.mark.parametrize(
    ("url", "endpoint", "address"),
    [
        ("localhost:8000", Endpoint("http", "localhost", 8000), "localhost:8000"),
        ("10.0.0.1:80", Endpoint("http", "10.0.0.1", 80), "10.0.0.1:80"),
        ("http://host:8000/", Endpoint("http", "host", 8000), "host:8000"),
        ("host:8000/a/b/", Endpoint("http", "host", 8000, "/a/b"), "host:8000"),
        ("HTTPS://Host", Endpoint("https", "host", 443), "host:443"),
        ("https://host:8443/x", Endpoint("https", "host", 8443, "/x"), "host:8443"),
        ("grpc://host:8001", Endpoint("grpc", "host", 8001), "host:8001"),
        ("grpcs://host", Endpoint("grpcs", "host", 443), "host:443"),
        ("[::1]:8000", Endpoint("http", "::1", 8000), "[::1]:8000"),
        ("grpc://[::1]:8001", Endpoint("grpc", "::1", 8001), "[::1]:8001"),
    ],
)
def test_urls(url: str, endpoint: Endpoint, address: str) -> None:
    parsed = Endpoint.parse(url)
    assert parsed == endpoint
    assert parsed.address == address
    assert parsed.secure == (endpoint.scheme in ("https", "grpcs"))


@pytest.mark.parametrize(
    "url",
    [
        "localhost",
        "",
        ":8000",
        "http://",
        "http://host",
        "grpc://host",
        "ftp://host:21",
        "host:port",
        "host:0",
        "host:99999",
        "two hosts:8000",
        "user:secret@host:8000",
        "host:8000?x=1",
        "host:8000#x",
        "grpc://host:8001/path",
        "http://[::1:8000",
    ],
)
def test_malformed_urls_name_the_accepted_forms(url: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        open_transport(url, timeout_s=1)
    assert "localhost:8000, http://host:8000, https://host, grpc://host:8001" in str(caught.value)


def test_the_scheme_chooses_the_transport() -> None:
    for url, kind in [("localhost:8000", HttpTransport), ("grpc://localhost:8001", GrpcTransport)]:
        with closing(open_transport(url, timeout_s=1)) as way:
            assert type(way) is kind


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf")])
def test_timeouts_are_positive(timeout_s: float) -> None:
    with pytest.raises(InvalidInputError, match="positive number of seconds"):
        open_transport("localhost:8000", timeout_s=timeout_s)


def test_certificates_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="There is no certificate file"):
        open_transport("https://host", timeout_s=1, ca_file=str(tmp_path / "missing.pem"))
    (tmp_path / "bad.pem").write_text("nothing")
    with pytest.raises(InvalidInputError, match="holds no PEM certificates"):
        open_transport("https://host", timeout_s=1, ca_file=str(tmp_path / "bad.pem"))


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("makes its certificate with openssl")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = (
        f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost "
        f"-addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout {key} -out {cert}"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    return cert, key


def test_https(certificate: tuple[Path, Path]) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(*certificate)
    with http_server(tls=tls) as port:
        url = f"https://localhost:{port}"
        with closing(open_transport(url, timeout_s=5, ca_file=str(certificate[0]))) as way:
            assert works(way) and works(way)
        with (
            closing(open_transport(url, timeout_s=5)) as way,
            pytest.raises(ServerUnavailableError, match="CERTIFICATE_VERIFY_FAILED"),
        ):
            way.infer(call())


def test_https_to_a_plain_port() -> None:
    with (
        http_server() as port,
        transport("https", port, timeout_s=2) as way,
        pytest.raises(ServerUnavailableError),
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


def test_close_ends_the_connections() -> None:
    with http_server() as port:
        way = open_transport(f"127.0.0.1:{port}", timeout_s=5)
        assert works(way)
        way.close()
        assert isinstance(way, HttpTransport) and way._idle == []
