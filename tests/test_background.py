"""The client for programs without an event loop."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Coroutine, Iterator
from typing import Any

import numpy as np
import pytest
from fakes import AsyncFake, photo

from triton_sam import (
    BackgroundSAM2Client,
    ClientClosedError,
    HoverResult,
    InferenceError,
    InvalidInputError,
    PromptError,
)
from triton_sam.specs import FAMILIES


@pytest.fixture
def server() -> AsyncFake:
    return AsyncFake(FAMILIES["sam2"])


@pytest.fixture
def client(server: AsyncFake) -> Iterator[BackgroundSAM2Client]:
    before = threading.active_count()
    with BackgroundSAM2Client(transport=server) as client:
        yield client
    assert threading.active_count() == before


def test_blocking_calls(client: BackgroundSAM2Client) -> None:
    assert client.is_ready()
    client.wait_until_ready()
    client.set_image(photo())
    masks, scores = client.predict([[200, 150]], [1])
    found = client.segment([[200, 150]], [1], embedding=client.encode(photo()))
    np.testing.assert_array_equal(found.logits, masks)
    np.testing.assert_array_equal(found.scores, scores)
    with pytest.raises(PromptError):
        client.predict([[999, 0]], [1])


def test_a_hover_that_calls_back(client: BackgroundSAM2Client) -> None:
    found: queue.Queue[HoverResult] = queue.Queue()
    hover = client.hover(photo(100, 100), on_result=found.put, session_id="mouse")
    for x in range(50):
        hover.move(x, 10)
    while (last := found.get(timeout=10)).number < 50:
        pass
    assert (last.x, last.y) == (49, 10)
    clicked = hover.click(30, 40).result(timeout=10)
    assert (clicked.x, clicked.number) == (30, 51)
    assert client.get_session_status("mouse").queued == 51
    assert client.cancel_session_requests("mouse") == 0
    hover.close()
    assert hover.status.pending == 0
    assert client.cleanup_session("mouse").queued == 51
    hover.move(1, 1)  # a late event of the mouse
    assert found.empty()


def test_errors_of_a_hover(client: BackgroundSAM2Client, server: AsyncFake) -> None:
    found: queue.Queue[HoverResult] = queue.Queue()
    errors: queue.Queue[Exception] = queue.Queue()
    hover = client.hover(photo(100, 100), found.put, errors.put)
    server.failing = InferenceError("out of memory")
    hover.move(1, 1)
    assert errors.get(timeout=10) is server.failing
    server.failing = None
    hover.move(2, 2)
    assert found.get(timeout=10).x == 2


def test_errors_that_nobody_takes_are_logged(
    client: BackgroundSAM2Client, server: AsyncFake, caplog: pytest.LogCaptureFixture
) -> None:
    hover = client.hover(photo(100, 100), lambda found: None)
    server.failing = InferenceError("out of memory")
    hover.move(1, 1)
    for _ in range(1000):
        if caplog.messages:
            break
        time.sleep(0.01)
    assert caplog.messages == ["A hover failed: out of memory"]
    assert hover.click(2, 2).exception(timeout=10) is server.failing
    hover.close()
    assert (hover.status.failed, hover.status.pending) == (2, 0)


def test_cancelling_a_future_cancels_the_request(
    client: BackgroundSAM2Client, server: AsyncFake
) -> None:
    client.set_image(photo())
    server.hang.set()
    future = client.submit(lambda inner: inner.segment([[1, 1]], [1]))
    assert server.hanging.wait(10)
    assert future.cancel()
    assert server.cancelled.wait(10)


def test_waiting_in_its_own_thread_is_refused(client: BackgroundSAM2Client) -> None:
    async def wait(_: object) -> None:
        client.set_image(photo())

    with pytest.raises(InvalidInputError, match="use submit"):
        client.submit(wait).result(timeout=10)


def test_closing_in_its_own_thread_is_refused(client: BackgroundSAM2Client) -> None:
    async def close(_: object) -> None:
        client.close()

    with pytest.raises(InvalidInputError, match="hand over to another thread"):
        client.submit(close).result(timeout=10)
    client.set_image(photo())  # it is still open


def test_sessions_in_its_own_thread(client: BackgroundSAM2Client) -> None:
    async def ask(_: object) -> tuple[int, int]:
        cancelled = client.cancel_session_requests("mouse")
        return cancelled, client.cleanup_session("mouse").queued

    with_a_hover = client.hover(photo(10, 10), lambda found: None, session_id="mouse")
    assert client.submit(ask).result(timeout=10) == (0, 0)
    with_a_hover.close()


def test_sessions_after_closing(server: AsyncFake) -> None:
    with BackgroundSAM2Client(transport=server) as client:
        client.hover(photo(10, 10), lambda found: None, session_id="mouse")
    for use in (client.cancel_session_requests, client.cleanup_session):
        with pytest.raises(ClientClosedError):
            use("mouse")
    assert client.get_session_status("mouse").queued == 0


def test_what_is_submitted_while_it_closes_ends(server: AsyncFake) -> None:
    client = BackgroundSAM2Client(transport=server)
    closing = threading.Thread(target=client.close)

    async def hang() -> None:
        await asyncio.Event().wait()

    def call(_: object) -> Coroutine[Any, Any, None]:
        closing.start()
        closing.join(0.5)
        return hang()

    future = client.submit(call)
    closing.join(10)
    assert future.cancelled()


def test_closing_with_work_under_way(server: AsyncFake) -> None:
    before = threading.active_count()
    client = BackgroundSAM2Client(transport=server)
    hover = client.hover(photo(100, 100), lambda found: None)
    server.hang.set()
    future = client.submit(lambda inner: inner.segment([[1, 1]], [1], embedding=hover.embedding))
    errors: list[object] = []

    def predict() -> None:
        with pytest.raises(ClientClosedError) as caught:
            client.predict([[1, 1]], [1], embedding=hover.embedding)
        errors.append(caught.value)

    blocked = threading.Thread(target=predict)
    blocked.start()
    hover.move(1, 1)
    while len(server.fake.asked) < 2:
        time.sleep(0.01)
    assert server.hanging.wait(10)
    client.close()
    client.close()
    blocked.join(10)
    assert len(errors) == 1
    assert threading.active_count() == before
    assert future.cancelled() or isinstance(
        future.exception(), (ClientClosedError, asyncio.CancelledError)
    )
    hover.move(2, 2)
    with pytest.raises(ClientClosedError):
        client.predict([[1, 1]], [1])
