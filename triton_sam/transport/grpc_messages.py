"""KServe v2 over gRPC: how requests are written and answers read; no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException, np_to_triton_dtype, serialize_byte_tensor

from ..errors import MissingExtraError
from ..protocol import Call, Served
from ..shared_memory import Place
from .endpoint import Endpoint
from .options import TransportOptions
from .requests import (
    Describe,
    Infer,
    IsReady,
    ListReady,
    ListRegions,
    Register,
    Request,
    Unregister,
)
from .tensors import datatype, read_outputs

# Both message sizes: a SAM 3 embedding is 21 MB, gRPC's own limit 4 MB. No keepalive pings: Triton
# ends connections that ping often. A restarted server is found again within a second.
CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", 2**31 - 1),
    ("grpc.max_receive_message_length", 2**31 - 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]

_SERVICE = "/inference.GRPCInferenceService/"
_LENGTH_DELIMITED = 2  # protobuf's wire type of bytes


@dataclass(frozen=True)
class Message:
    """One call: the method's path, the serialized request, and the class of the response."""

    path: str
    body: bytes
    response: Any


def grpc_modules() -> tuple[Any, Any]:
    """``grpc`` and ``tritonclient.grpc``. Raises :class:`MissingExtraError` without grpcio."""
    # tritonclient says RuntimeError where grpcio or protobuf is not installed.
    try:
        import grpc
        import tritonclient.grpc
    except (ImportError, RuntimeError) as exc:
        raise MissingExtraError(
            "gRPC needs an extra: pip install 'triton-sam[grpc]'. HTTP works without it."
        ) from exc
    return grpc, tritonclient.grpc


def credentials(endpoint: Endpoint, options: TransportOptions) -> Any:
    """The certificates as gRPC takes them; ``None`` without TLS."""
    if not endpoint.secure:
        return None
    options.tls_context()  # gRPC itself finds fault with bad files only when it connects
    grpc, _ = grpc_modules()
    files = (options.ca_file, options.key_file or options.cert_file, options.cert_file)
    return grpc.ssl_channel_credentials(
        *(None if file is None else Path(file).read_bytes() for file in files)
    )


def call_arguments(options: TransportOptions, timeout_s: float) -> dict[str, Any]:
    """What goes with every call."""
    grpc, _ = grpc_modules()
    kinds = grpc.Compression
    kind = {"none": kinds.NoCompression, "gzip": kinds.Gzip, "deflate": kinds.Deflate}
    return {
        "timeout": timeout_s,
        "metadata": tuple(options.all_headers().items()),
        "compression": kind[options.compression],
    }


def write(request: Request) -> Message:
    """The gRPC request that asks this."""
    pb2 = grpc_modules()[1].service_pb2
    if isinstance(request, Infer):
        return Message(_SERVICE + "ModelInfer", _infer(request.call), pb2.ModelInferResponse)
    if isinstance(request, Describe):
        body = pb2.ModelMetadataRequest(name=request.model)
        method, response = "ModelMetadata", pb2.ModelMetadataResponse
    elif isinstance(request, IsReady):
        body = pb2.ModelReadyRequest(name=request.model)
        method, response = "ModelReady", pb2.ModelReadyResponse
    elif isinstance(request, ListReady):
        body = pb2.RepositoryIndexRequest()
        method, response = "RepositoryIndex", pb2.RepositoryIndexResponse
    else:
        return _memory(request)
    return Message(_SERVICE + method, body.SerializeToString(), response)


def read(request: Request, response: Any) -> Any:
    """The value that a response holds."""
    if isinstance(request, Infer):
        return read_outputs(grpc_modules()[1].InferResult(response), request.call)
    if isinstance(request, Describe):
        return Served(
            frozenset(tensor.name for tensor in response.inputs),
            frozenset(tensor.name for tensor in response.outputs),
        )
    if isinstance(request, IsReady):
        return bool(response.ready)
    if isinstance(request, (Register, Unregister)):
        return None
    if isinstance(request, ListRegions):
        return frozenset(response.regions)
    return [model.name for model in response.models if model.state == "READY"]


def error(exc: Any) -> InferenceServerException:
    """A ``grpc.RpcError`` as tritonclient's error, which HTTP's are too."""
    return InferenceServerException(str(exc.details()), str(exc.code()))


def _memory(request: Register | Unregister | ListRegions) -> Message:
    pb2 = grpc_modules()[1].service_pb2
    if isinstance(request, Register):
        method, region = "Register", request.region
        body = pb2.SystemSharedMemoryRegisterRequest(
            name=region, key=f"/{region}", byte_size=request.nbytes
        )
    elif isinstance(request, Unregister):
        method, body = "Unregister", pb2.SystemSharedMemoryUnregisterRequest(name=request.region)
    else:
        method, body = "Status", pb2.SystemSharedMemoryStatusRequest()
    response = getattr(pb2, f"SystemSharedMemory{method}Response")
    return Message(f"{_SERVICE}SystemSharedMemory{method}", body.SerializeToString(), response)


def _infer(call: Call) -> bytes:
    """A serialized ``ModelInferRequest``.

    The tensors' bytes are appended by hand, as protobuf would write them: its own serializer takes
    40 ms for the 17 MB of an embedding, and an event loop stands still meanwhile.
    """
    pb2 = grpc_modules()[1].service_pb2
    head = pb2.ModelInferRequest(model_name=call.model)
    for name, array in call.inputs.items():
        head.inputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
    for name, place in call.inputs_at.items():
        tensor = head.inputs.add(name=name, datatype=datatype(place), shape=place.shape)
        _put(tensor, place)
    for name in call.outputs:
        output = head.outputs.add(name=name)
        if name in call.outputs_at:
            _put(output, call.outputs_at[name])
    number = head.DESCRIPTOR.fields_by_name["raw_input_contents"].number
    tag = _varint(number << 3 | _LENGTH_DELIMITED)
    parts = [head.SerializeToString()]
    for array in call.inputs.values():
        content = _content(array)
        parts += [tag, _varint(len(content)), content]
    return b"".join(parts)


def _put(tensor: Any, place: Place) -> None:
    tensor.parameters["shared_memory_region"].string_param = place.region
    tensor.parameters["shared_memory_byte_size"].int64_param = place.nbytes
    tensor.parameters["shared_memory_offset"].int64_param = place.offset


def _content(array: NDArray[np.generic]) -> Any:
    if array.dtype.hasobject or array.dtype.kind in "SU":
        return serialize_byte_tensor(array).item() if array.size else b""
    if array.size == 0:
        return b""
    return np.ascontiguousarray(array).data.cast("B")


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the top bit says that more follow."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
