"""What is tried again, what is not, and for how long."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import pytest
from fake_triton import GrpcTriton, HttpTriton, free_port, grpc_server, http_server
from ways import HTTP, ONCE, SCHEMES, call, f32, server, transport, works

from triton_sam.errors import ServerTimeoutError, ServerUnavailableError
from triton_sam.transport import Retries

QUICK = Retries(attempts=3, backoff_s=0.01, max_backoff_s=0.02)
QUEUE = "Exceeds maximum queue size"
STOPPING = "Request for unknown model: 'double' has no available versions"
PATIENT = Retries(attempts=50, backoff_s=0.05, max_backoff_s=0.2)


def test_pauses_double_up_to_a_limit() -> None:
    exact = Retries(attempts=6, backoff_s=0.5, max_backoff_s=3, jitter=0)
    assert list(exact.pauses()) == [0.5, 1, 2, 3, 3]
    assert list(Retries(attempts=1).pauses()) == []
    patient = Retries(attempts=2000, backoff_s=0.5, max_backoff_s=0.5, jitter=0)
    assert list(patient.pauses()) == [0.5] * 1999
    one = Retries(backoff_s=1, max_backoff_s=1, jitter=0.25)
    drawn = [next(one.pauses()) for _ in range(500)]
    assert 0.75 <= min(drawn) < 0.78 and 0.97 < max(drawn) <= 1


def refusing_server(
    scheme: str,
    times: int,
    asked: list[float],
    why: str = QUEUE,
    code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE,
) -> Any:
    """Says that it is unavailable to the first ``times`` inferences."""
    if scheme in HTTP:

        class Refusing(HttpTriton):
            def do_POST(self) -> None:
                if len(asked) >= times or not self.path.endswith("infer"):
                    return super().do_POST()
                asked.append(time.monotonic())
                self.rfile.read(int(self.headers["Content-Length"]))
                return self.fail(503 if why == QUEUE else 404, why)

        return http_server(Refusing)

    class RefusingServicer(GrpcTriton):
        def ModelInfer(self, request: Any, context: Any) -> Any:
            if len(asked) < times:
                asked.append(time.monotonic())
                context.abort(grpc.StatusCode.NOT_FOUND if why == STOPPING else code, why)
            return super().ModelInfer(request, context)

    return grpc_server(servicer=RefusingServicer())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("why", [QUEUE, STOPPING])
def test_an_unavailable_server_is_asked_again(scheme: str, why: str) -> None:
    asked: list[float] = []
    retries = Retries(attempts=3, backoff_s=0.1, max_backoff_s=0.1, jitter=0.1)
    with (
        refusing_server(scheme, 2, asked, why) as port,
        transport(scheme, port, retries=retries) as way,
    ):
        assert works(way)
    assert len(asked) == 2 and 0.09 <= asked[1] - asked[0] < 5


@pytest.mark.parametrize("scheme", SCHEMES)
def test_only_so_often(scheme: str) -> None:
    asked: list[float] = []
    with (
        refusing_server(scheme, 99, asked) as port,
        transport(scheme, port, retries=QUICK) as way,
        pytest.raises(ServerUnavailableError, match="Exceeds maximum queue size"),
    ):
        way.infer(call())
    assert len(asked) == 3


@pytest.mark.parametrize("scheme", SCHEMES)
def test_attempts_stay_within_the_timeout(scheme: str) -> None:
    endless = Retries(attempts=10_000, backoff_s=0.05, max_backoff_s=0.05)
    with transport(scheme, free_port(), timeout_s=0.5, retries=endless) as way:
        started = time.monotonic()
        with pytest.raises((ServerUnavailableError, ServerTimeoutError)):
            way.infer(call())
        assert 0.3 < time.monotonic() - started < 10


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_server_that_comes_up_late(scheme: str) -> None:
    port, done = free_port(), threading.Event()

    def come_up() -> None:
        time.sleep(0.4)
        with server(scheme, port):
            done.wait(10)

    late = threading.Thread(target=come_up)
    late.start()
    try:
        with transport(scheme, port, retries=PATIENT) as way:
            assert works(way)
    finally:
        done.set()
        late.join()


@contextmanager
def cutting_server(asked: list[str]) -> Iterator[int]:
    """Takes a whole inference, begins with it and hangs up, as a server that is killed does."""

    class Cutting(HttpTriton):
        def do_GET(self) -> None:
            asked.append("metadata")
            if asked.count("metadata") == 1:
                self.cut()
            else:
                super().do_GET()

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append("inference")
            self.cut()

        def cut(self) -> None:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    with http_server(Cutting) as port:
        yield port


@pytest.mark.parametrize("scheme", HTTP)
def test_an_inference_that_may_still_run_is_not_sent_again(scheme: str) -> None:
    asked: list[str] = []
    with cutting_server(asked) as port, transport(scheme, port, retries=QUICK) as way:
        with pytest.raises(ServerUnavailableError):
            way.infer(call())
        assert asked == ["inference"]
        # Looking something up does no harm.
        assert way.served("double").outputs == {"x2"}
        assert asked == ["inference", "metadata", "metadata"]


@pytest.mark.parametrize("scheme", ["grpc", "aio+grpc"])
def test_grpc_sends_again_what_a_broken_connection_has_cancelled(scheme: str) -> None:
    port, begun, cancelled = free_port(), threading.Event(), threading.Event()

    class Hanging(GrpcTriton):
        def ModelInfer(self, request: Any, context: Any) -> Any:
            context.add_callback(cancelled.set)
            begun.set()
            cancelled.wait(10)
            return super().ModelInfer(request, context)

    answers: list[Any] = []

    def ask() -> None:
        with transport(scheme, port, retries=PATIENT) as way:
            answers.append(way.infer(call(x=f32([4])))["x2"])

    asking = threading.Thread(target=ask)
    with grpc_server(port, Hanging()):
        asking.start()
        assert begun.wait(10)
    assert cancelled.is_set()
    with grpc_server(port):
        asking.join(10)
    np.testing.assert_array_equal(answers, [[8]])


@pytest.mark.parametrize("scheme", ["grpc", "aio+grpc"])
def test_grpc_sends_again_what_the_server_cancelled_early(scheme: str) -> None:
    asked: list[float] = []
    cancelled = grpc.StatusCode.CANCELLED
    with refusing_server(scheme, 3, asked, "changed my mind", cancelled) as port:
        with transport(scheme, port, retries=QUICK, timeout_s=60) as way:
            with pytest.raises(ServerUnavailableError, match=r"up \(changed my mind\)"):
                way.infer(call(x=f32([4])))
            assert len(asked) == 3 and works(way)
        del asked[:]
        with transport(scheme, port, retries=QUICK, timeout_s=0.4) as way:
            # So near its deadline it is the deadline.
            with pytest.raises(ServerTimeoutError, match=r"no answer within 0\.4 s"):
                way.infer(call(x=f32([4])))
            assert len(asked) == 1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_looking_whether_it_is_ready_is_not_repeated(scheme: str) -> None:
    retries = Retries(attempts=99, backoff_s=30, max_backoff_s=30)
    with transport(scheme, free_port(), retries=retries) as way:
        started = time.monotonic()
        with pytest.raises(ServerUnavailableError):
            way.check_ready(["double"])
        assert time.monotonic() - started < 10


@pytest.mark.parametrize("scheme", SCHEMES)
def test_works_again_after_a_restart(scheme: str) -> None:
    port = free_port()
    with transport(scheme, port, retries=ONCE) as way:
        with server(scheme, port):
            assert works(way)
        with pytest.raises(ServerUnavailableError):
            way.infer(call())
    with transport(scheme, port, retries=PATIENT) as way:
        for _ in range(2):
            with server(scheme, port):
                assert works(way)
