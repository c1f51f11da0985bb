"""KServe v2 over HTTP with binary tensors: how requests are written and answers read; no I/O."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from email.message import Message as EmailHeaders
from typing import Any
from urllib.parse import quote

import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from ..protocol import Arrays, Call, Served
from .options import Compression, TransportOptions
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
from .tensors import read_outputs, write_inputs, write_outputs

# The fastest: floats hardly shrink, however hard one tries.
_LEVEL = 1
# What Triton says of a model that is not ready. Anything else comes from something in between.
_NOT_READY = (400, 404)


@dataclass(frozen=True)
class Message:
    """An HTTP request; ``path`` is relative to the server's ``/v2/``."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes | None = None


@dataclass(frozen=True)
class Answer:
    """An HTTP response; the names in ``headers`` are taken in any case."""

    status: int
    headers: Mapping[str, str] | EmailHeaders
    body: bytes


def write(request: Request, options: TransportOptions) -> Message:
    """The HTTP request that asks this."""
    # Said also where it is none: aiohttp would ask for gzip, and Triton does what it is asked.
    encoding = "identity" if options.compression == "none" else options.compression
    headers = {**options.all_headers(), "Accept-Encoding": encoding}
    if isinstance(request, Infer):
        return _infer_message(request.call, headers, options.compression)
    if isinstance(request, Describe):
        return Message("GET", f"models/{quote(request.model)}", headers)
    if isinstance(request, IsReady):
        return Message("GET", f"models/{quote(request.model)}/ready", headers)
    if isinstance(request, ListReady):
        return Message("POST", "repository/index", headers, b"{}")
    if isinstance(request, ListRegions):
        return Message("GET", "systemsharedmemory/status", headers)
    region = f"systemsharedmemory/region/{quote(request.region)}"
    if isinstance(request, Unregister):
        return Message("POST", f"{region}/unregister", headers, b"")
    content = {"key": f"/{request.region}", "offset": 0, "byte_size": request.nbytes}
    return Message("POST", f"{region}/register", headers, json.dumps(content).encode())


def read(request: Request, answer: Answer) -> Any:
    """The value that an answer holds. Raises ``InferenceServerException`` for an error."""
    if isinstance(request, IsReady) and answer.status in (200, *_NOT_READY):
        return answer.status == 200
    body = _decompressed(answer.body, answer.headers.get("Content-Encoding"))
    if answer.status != 200:
        raise _error(answer.status, body)
    if isinstance(request, Infer):
        return _outputs(request.call, body, answer.headers.get("Inference-Header-Content-Length"))
    if isinstance(request, (Register, Unregister)):
        return None
    content = json.loads(body)
    if isinstance(request, Describe):
        return Served(
            frozenset(tensor["name"] for tensor in content["inputs"]),
            frozenset(tensor["name"] for tensor in content["outputs"]),
        )
    if isinstance(request, ListRegions):
        return frozenset(region["name"] for region in content)
    return [model["name"] for model in content if model.get("state") == "READY"]


def _infer_message(call: Call, headers: dict[str, str], compression: Compression) -> Message:
    body, json_size = triton_http.InferenceServerClient.generate_request_body(
        write_inputs(triton_http, call),
        outputs=write_outputs(triton_http, call),
    )
    headers["Content-Type"] = "application/octet-stream"
    headers["Inference-Header-Content-Length"] = str(json_size)
    if compression != "none":
        headers["Content-Encoding"] = compression
        body = _compressed(body, compression)
    return Message("POST", f"models/{quote(call.model)}/infer", headers, body)


def _outputs(call: Call, body: bytes, json_size: str | None) -> Arrays:
    result = triton_http.InferenceServerClient.parse_response_body(
        body, header_length=None if json_size is None else int(json_size)
    )
    return read_outputs(result, call)


def _compressed(body: bytes, encoding: str) -> bytes:
    # HTTP's "deflate" is the zlib format.
    return gzip.compress(body, _LEVEL) if encoding == "gzip" else zlib.compress(body, _LEVEL)


def _decompressed(body: bytes, encoding: str | None) -> bytes:
    if encoding == "gzip":
        return gzip.decompress(body)
    return zlib.decompress(body) if encoding == "deflate" else body


def _error(status: int, body: bytes) -> InferenceServerException:
    try:
        message = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        message = f"HTTP status {status}, {body[:200].decode(errors='replace')!r}"
    return InferenceServerException(message, str(status))
