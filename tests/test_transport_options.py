"""Certificates, headers and compression, against servers that look at them."""

from __future__ import annotations

import gzip
import shutil
import ssl
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from fake_triton import GrpcTriton, HttpTriton, grpc_server, http_server
from ways import HTTP, ONCE, SCHEMES, call, open_way, transport, works

from triton_sam.errors import InvalidInputError, ServerTimeoutError, ServerUnavailableError
from triton_sam.transport import Retries, TransportOptions, open_transport

Seen = list[dict[str, str]]


def listening_server(scheme: str, seen: Seen) -> Any:
    """A server that notes the headers of every request."""
    if scheme in HTTP:

        class Listening(HttpTriton):
            def do_POST(self) -> None:
                seen.append({name.lower(): value for name, value in self.headers.items()})
                super().do_POST()

        return http_server(Listening)

    class ListeningServicer(GrpcTriton):
        def ModelInfer(self, request: Any, context: Any) -> Any:
            seen.append(dict(context.invocation_metadata()))
            return super().ModelInfer(request, context)

    return grpc_server(servicer=ListeningServicer())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_headers_and_token(scheme: str) -> None:
    seen: Seen = []
    options: dict[str, Any] = {"headers": {"X-Team": "red"}, "bearer_token": "s3cret"}
    with listening_server(scheme, seen) as port, transport(scheme, port, **options) as way:
        assert works(way)
    assert (seen[0]["x-team"], seen[0]["authorization"]) == ("red", "Bearer s3cret")


def test_the_token_is_not_shown() -> None:
    assert "s3cret" not in repr(TransportOptions(bearer_token="s3cret"))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("compression", ["gzip", "deflate"])
def test_compression(scheme: str, compression: str) -> None:
    seen: Seen = []
    with (
        listening_server(scheme, seen) as port,
        transport(scheme, port, compression=compression) as way,
    ):
        x = np.arange(30_000, dtype=np.float32)
        np.testing.assert_array_equal(way.infer(call(x=x))["x2"], 2 * x)
    if scheme in HTTP:
        assert seen[0]["content-encoding"] == seen[0]["accept-encoding"] == compression
        assert int(seen[0]["content-length"]) < x.nbytes / 2


@pytest.mark.parametrize("work", ["compress", "decompress"])
def test_compression_does_not_hold_up_an_event_loop(
    work: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    done = getattr(gzip, work)

    def noted(*args: Any) -> Any:
        threads.append(threading.get_ident())
        return done(*args)

    monkeypatch.setattr(gzip, work, noted)
    with http_server() as port, transport("aio+http", port, compression="gzip") as way:
        assert works(way)
    # Once here and once in the server, which has its own threads.
    assert len(threads) == 2 and threading.get_ident() not in threads


@pytest.mark.parametrize("scheme", HTTP)
def test_compressing_counts_in_the_time_of_a_call(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress, pauses = gzip.compress, [0.3]

    def slow(*args: Any) -> bytes:
        time.sleep(pauses.pop() if pauses else 0)  # the client's, not the server's
        return compress(*args)

    monkeypatch.setattr(gzip, "compress", slow)
    with (
        http_server() as port,
        transport(scheme, port, compression="gzip", timeout_s=0.2) as way,
        pytest.raises(ServerTimeoutError, match=r"within 0\.2 s"),
    ):
        way.infer(call())


@pytest.mark.parametrize("scheme", HTTP)
def test_without_compression_none_is_asked_for(scheme: str) -> None:
    seen: Seen = []
    with listening_server(scheme, seen) as port, transport(scheme, port) as way:
        assert works(way)
    assert seen[0]["accept-encoding"] == "identity" and "content-encoding" not in seen[0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"timeout_s": 0}, "positive number of seconds"),
        ({"timeout_s": -1}, "positive number of seconds"),
        ({"timeout_s": float("nan")}, "positive number of seconds"),
        ({"timeout_s": float("inf")}, "positive number of seconds"),
        ({"compression": "brotli"}, "one of none, gzip, deflate; got 'brotli'"),
        ({"headers": {"a b": "c"}}, "header 'a b' cannot be sent"),
        ({"headers": {"x": "two\nlines"}}, "header 'x' cannot be sent"),
        ({"bearer_token": "café"}, "header 'authorization' cannot be sent"),
        ({"ca_file": "missing.pem"}, "There is no certificate file 'missing.pem'"),
        ({"cert_file": "missing.pem"}, "There is no certificate file 'missing.pem'"),
        ({"key_file": __file__}, "cert_file is missing"),
    ],
)
def test_options_that_cannot_be_used(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        TransportOptions(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"attempts": 0},
        {"backoff_s": -1},
        {"backoff_s": 3, "max_backoff_s": 2},
        {"jitter": 1.5},
        {"max_backoff_s": float("inf")},
    ],
)
def test_retries_that_cannot_be_used(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=r"attempts|backoff_s"):
        Retries(**wrong)


@dataclass(frozen=True)
class Certificates:
    """Of a server and of a client, each its own authority: (certificate file, key file)."""

    server: tuple[str, str]
    client: tuple[str, str]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    if shutil.which("openssl") is None:
        pytest.skip("makes its certificates with openssl")
    folder = tmp_path_factory.mktemp("certificates")
    return Certificates(_certificate(folder, "server"), _certificate(folder, "client"))


def _certificate(folder: Path, name: str) -> tuple[str, str]:
    cert, key = folder / f"{name}.pem", folder / f"{name}-key.pem"
    command = (
        f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost "
        f"-addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout {key} -out {cert}"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    return str(cert), str(key)


def tls_server(scheme: str, certificates: Certificates, wants_client: bool = False) -> Any:
    cert, key = certificates.server
    if scheme.endswith("https"):
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(cert, key)
        if wants_client:
            tls.verify_mode = ssl.CERT_REQUIRED
            tls.load_verify_locations(certificates.client[0])
        return http_server(tls=tls)
    credentials = grpc.ssl_server_credentials(
        [(Path(key).read_bytes(), Path(cert).read_bytes())],
        root_certificates=Path(certificates.client[0]).read_bytes() if wants_client else None,
        require_client_auth=wants_client,
    )
    return grpc_server(tls=credentials)


TLS = ("https", "grpcs", "aio+https", "aio+grpcs")


@pytest.mark.parametrize("scheme", TLS)
def test_tls(scheme: str, certificates: Certificates) -> None:
    with tls_server(scheme, certificates) as port:
        url = f"{scheme}://localhost:{port}"
        with open_way(url, timeout_s=5, ca_file=certificates.server[0]) as way:
            assert works(way) and works(way)
        with (
            open_way(url, timeout_s=5, retries=ONCE) as way,
            pytest.raises(ServerUnavailableError, match=r"CERTIFICATE_VERIFY_FAILED|No Triton"),
        ):
            way.infer(call())


@pytest.mark.parametrize("scheme", TLS)
def test_a_server_that_asks_for_a_certificate(scheme: str, certificates: Certificates) -> None:
    cert, key = certificates.client
    trusting: dict[str, Any] = {
        "ca_file": certificates.server[0],
        "timeout_s": 5,
        "retries": ONCE,
    }
    with tls_server(scheme, certificates, wants_client=True) as port:
        url = f"{scheme}://localhost:{port}"
        with open_way(url, cert_file=cert, key_file=key, **trusting) as way:
            assert works(way)
        with open_way(url, **trusting) as way, pytest.raises(ServerUnavailableError):
            way.infer(call())


@pytest.mark.parametrize("scheme", ["https", "aio+https"])
def test_a_certificate_that_is_refused_is_not_tried_again(
    scheme: str, certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "triton_sam")
    with (
        tls_server(scheme, certificates) as port,
        open_way(f"{scheme}://localhost:{port}", timeout_s=5) as way,
        pytest.raises(ServerUnavailableError, match="CERTIFICATE_VERIFY_FAILED"),
    ):
        way.infer(call())
    assert caplog.messages == []


@pytest.mark.parametrize("scheme", ["https", "aio+https"])
def test_https_to_a_plain_port(scheme: str) -> None:
    with (
        http_server() as port,
        transport(scheme, port, timeout_s=2) as way,
        pytest.raises(ServerUnavailableError),
    ):
        way.infer(call())


@pytest.mark.parametrize("scheme", ["https", "grpcs"])
def test_files_that_hold_no_certificates(
    scheme: str, certificates: Certificates, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.pem"
    bad.write_text("nothing")
    url, (cert, _) = f"{scheme}://host", certificates.client
    for options, message in [
        (TransportOptions(ca_file=str(bad)), "bad.pem' holds no PEM certificates"),
        (TransportOptions(cert_file=str(bad)), "no PEM certificate and unencrypted key"),
        (TransportOptions(cert_file=cert), "no PEM certificate and unencrypted key"),
        (TransportOptions(cert_file=cert, key_file=certificates.server[1]), "belong together"),
    ]:
        with pytest.raises(InvalidInputError, match=message):
            open_transport(url, options)
    gone = TransportOptions(ca_file=str(bad))
    bad.unlink()
    with pytest.raises(
        InvalidInputError, match=r"bad\.pem' holds no PEM certificates: .*No such file"
    ):
        open_transport(url, gone)
