"""Foreign errors become ours, and server addresses are read or refused."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import ssl

import aiohttp
import pytest
from fake_triton import unknown
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
from triton_sam.transport import Endpoint, open_transport
from triton_sam.transport.failures import UnsentError, foreign_errors

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
    (InferenceServerException("stopped", "StatusCode.CANCELLED"), ServerTimeoutError),
    (InferenceServerException("no status"), InferenceError),
    (asyncio.TimeoutError(), ServerTimeoutError),
    (aiohttp.ServerTimeoutError(), ServerTimeoutError),
    (aiohttp.ServerDisconnectedError(), ServerUnavailableError),
    (aiohttp.ClientPayloadError("cut off"), ServerUnavailableError),
    (aiohttp.ClientOSError(104, "reset"), ServerUnavailableError),
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


@pytest.mark.parametrize(("foreign", "ours"), FOREIGN[:3], ids=lambda value: repr(value)[:60])
def test_what_was_not_sent_names_its_cause(foreign: Exception, ours: type[ServerError]) -> None:
    unsent = UnsentError()
    unsent.__cause__ = foreign
    with pytest.raises(ours) as caught, foreign_errors(Endpoint.parse("localhost:8000"), 3.0):
        raise unsent
    assert caught.value.__cause__ is foreign
    assert str(foreign) in str(caught.value)


def test_a_timeout_is_told_in_milliseconds() -> None:
    endpoint = Endpoint.parse("localhost:8000")
    with (
        pytest.raises(ServerTimeoutError, match=r"^localhost:8000 gave no answer within 0\.3 s\.$"),
        foreign_errors(endpoint, 0.299987),
    ):
        raise TimeoutError


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
        open_transport(url)
    assert "localhost:8000, http://host:8000, https://host, grpc://host:8001" in str(caught.value)
