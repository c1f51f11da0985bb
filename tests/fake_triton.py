"""Small servers on real sockets that speak just enough of KServe v2."""

from __future__ import annotations

import gzip
import http.server
import json
import socket
import ssl
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

# The servers below know two models: `double` returns its inputs times two, `broken` fails.
MODELS = ("double", "broken")


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
        body = self.decompressed(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v2/repository/index":
            states = [{"name": name, "state": "READY"} for name in MODELS]
            return self.say([*states, {"name": "failed", "state": "UNAVAILABLE"}])
        model = self.path.split("/")[3]
        if model == "double":
            return self.double(body, int(self.headers["Inference-Header-Content-Length"]))
        if model == "broken":
            return self.fail(500, "it went wrong")
        return self.fail(400, unknown(model))

    def double(self, sent: bytes, json_size: int) -> None:
        request, data = json.loads(sent[:json_size]), sent[json_size:]
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
        headers: dict[str, Any] = {"Inference-Header-Content-Length": len(head)}
        body, encoding = head + b"".join(blobs), self.headers["Accept-Encoding"]
        if encoding in ("gzip", "deflate"):
            body = gzip.compress(body) if encoding == "gzip" else zlib.compress(body)
            headers["Content-Encoding"] = encoding
        self.answer(200, body, headers)

    def decompressed(self, body: bytes) -> bytes:
        encoding = self.headers["Content-Encoding"]
        if encoding is None:
            return body
        return gzip.decompress(body) if encoding == "gzip" else zlib.decompress(body)

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

    request_queue_size = 128

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
def grpc_server(
    port: int = 0, servicer: GrpcTriton | None = None, tls: Any = None
) -> Iterator[int]:
    """``tls``: gRPC's server credentials."""
    sizes = [("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)]
    server = grpc.server(ThreadPoolExecutor(4), options=sizes)
    servicer = servicer or GrpcTriton()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    address = f"127.0.0.1:{port}"
    port = server.add_secure_port(address, tls) if tls else server.add_insecure_port(address)
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()


@contextmanager
def silent_socket() -> Iterator[int]:
    """Accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
