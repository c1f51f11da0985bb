"""Sessions of requests that are cancelled, over a server that is a function."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest
from fakes import GatedTransport, photo, run, turns

from triton_sam import (
    ClientClosedError,
    ImageNotSetError,
    InferenceError,
    PromptError,
    RequestCancelledError,
    SessionStatus,
    SpeculativeSAM2Client,
    queue_multiple_requests,
    wait_for_latest_result,
)
from triton_sam.specs import FAMILIES, Family

COORDS = [[[10, 10]], [[20, 20]], [[30, 30]], [[40, 40]]]
LABELS = [[1]] * 4


@asynccontextmanager
async def opened(
    name: str = "sam2",
) -> AsyncIterator[tuple[SpeculativeSAM2Client, GatedTransport]]:
    server = GatedTransport(FAMILIES[name])
    async with SpeculativeSAM2Client(model_type=name, transport=server) as client:
        await client.set_image(photo(100, 100))
        yield client, server


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_newest_result(family: Family) -> None:
    async def test() -> None:
        async with opened(family.name) as (client, server):
            tasks = await queue_multiple_requests(client, COORDS, LABELS, "s")
            await turns()
            assert len(tasks) == len(server.started) == 4
            server.let(5)
            masks, scores = await wait_for_latest_result(tasks, client, "s")
            expected = await client.predict(COORDS[-1], LABELS[-1])
            np.testing.assert_array_equal(masks, expected[0])
            np.testing.assert_array_equal(scores, expected[1])
            assert client.get_session_status("s") == SessionStatus(
                "s", queued=4, sent=4, executed=4, completed=4
            )

    run(test)


def test_cancelled_ones_are_passed_over() -> None:
    async def test() -> None:
        async with opened() as (client, server):
            tasks = queue_multiple_requests(client, COORDS, LABELS, "s")
            await turns()
            for task in (tasks[1], tasks[2]):
                task.cancel()
            server.let(2)
            masks, _ = await wait_for_latest_result(tasks, client, "s")
            np.testing.assert_array_equal(masks, (await tasks[3])[0])
            tasks = queue_multiple_requests(client, COORDS, LABELS, "s")
            await turns()
            for task in tasks[2:]:
                task.cancel()
            server.let(2)
            masks, _ = await wait_for_latest_result(tasks, client, "s")
            np.testing.assert_array_equal(masks, (await tasks[1])[0])
            status = client.get_session_status("s")
            assert (status.queued, status.sent, status.dropped) == (8, 8, 4)
            assert (status.completed, status.pending) == (4, 0)

    run(test)


def test_older_ones_are_given_up_for_a_newer_result() -> None:
    async def test() -> None:
        async with opened() as (client, server):
            tasks = queue_multiple_requests(client, COORDS, LABELS, "s")
            await turns()
            server.let()
            # The newest answer comes first, as it may from another instance of the model.
            newest, *older = tasks
            masks, _ = await wait_for_latest_result([*older, newest], client, "s")
            np.testing.assert_array_equal(masks, newest.result()[0])
            await turns()
            assert all(task.cancelled() for task in older) and len(server.cancelled) == 3
            assert client.get_session_status("s") == SessionStatus(
                "s", queued=4, sent=4, executed=1, dropped=3, completed=1
            )

    run(test)


def test_cancelling_before_anything_is_sent() -> None:
    async def test() -> None:
        async with opened() as (client, server):
            tasks = queue_multiple_requests(client, COORDS, LABELS, "s")
            assert client.cancel_session_requests("s") == 4
            assert client.get_session_status("s") == SessionStatus(
                "s", queued=4, cancelled_before_execution=4
            )
            with pytest.raises(RequestCancelledError, match="All 4 requests of the session 's'"):
                await wait_for_latest_result(tasks, client, "s")
            assert server.started == []
            assert client.get_session_status("s").cancelled_before_execution == 4

    run(test)


def test_cancelling_what_was_sent_and_keeping_the_newest() -> None:
    async def test() -> None:
        async with opened() as (client, server):
            tasks = queue_multiple_requests(client, COORDS, LABELS, "s")
            await turns()
            assert client.cancel_session_requests("s", keep_latest=True) == 3
            assert client.cancel_session_requests("s", keep_latest=True) == 0
            server.let()
            masks, _ = await wait_for_latest_result(tasks, client, "s")
            np.testing.assert_array_equal(masks, tasks[3].result()[0])
            assert len(server.cancelled) == 3
            assert client.get_session_status("s") == SessionStatus(
                "s", queued=4, sent=4, executed=1, dropped=3, completed=1
            )
            assert client.cancel_session_requests("s") == 0

    run(test)


def test_what_has_its_answer_is_not_cancelled_any_more() -> None:
    async def test() -> None:
        async with opened() as (client, server):
            tasks = queue_multiple_requests(client, COORDS[:1], LABELS[:1], "s")
            await turns()
            server.let()
            while not tasks[0].done():
                await asyncio.sleep(0)
            # Done, and nobody has been told yet.
            assert client.get_session_status("s").pending == 1
            assert client.cancel_session_requests("s") == 0
            assert (await tasks[0])[1].tolist() == [[0.5]]
            assert client.get_session_status("s") == SessionStatus(
                "s", queued=1, sent=1, executed=1, completed=1
            )

    run(test)


def test_sessions_are_isolated() -> None:
    async def test() -> None:
        async with opened() as (client, server):
            mine = queue_multiple_requests(client, COORDS, LABELS, "mine")
            other = queue_multiple_requests(client, COORDS[:2], LABELS[:2], "other")
            await turns()
            assert client.cleanup_session("mine").dropped == 4
            assert client.get_session_status("mine") == SessionStatus("mine")
            server.let(2)
            await wait_for_latest_result(other, client, "other")
            assert client.get_session_status("other").completed == 2
            assert all(task.cancelled() for task in mine)
            assert client.cancel_session_requests("never seen") == 0
            assert client.cleanup_session("never seen") == SessionStatus("never seen")

    run(test)


def test_failures_are_raised_when_there_is_nothing_else() -> None:
    async def test() -> None:
        async with opened() as (client, server):
            server.failing = InferenceError("out of memory")
            server.let(2)
            tasks = queue_multiple_requests(client, COORDS[:2], LABELS[:2], "s")
            with pytest.raises(InferenceError, match="out of memory"):
                await wait_for_latest_result(tasks, client, "s")
            assert client.get_session_status("s").failed == 2
            # A wrong prompt among right ones.
            server.failing = None
            server.let(1)
            tasks = queue_multiple_requests(client, [[[1, 1]], [[999, 1]]], [[1], [1]], "s")
            masks, _ = await wait_for_latest_result(tasks, client, "s")
            np.testing.assert_array_equal(masks, tasks[0].result()[0])
            with pytest.raises(PromptError, match="outside"):
                tasks[1].result()

    run(test)


def test_requests_keep_the_image_that_was_set() -> None:
    async def test() -> None:
        async with opened() as (client, server):
            before = client.embedding
            tasks = queue_multiple_requests(client, COORDS[:1], LABELS[:1], "s")
            await client.set_image(photo(50, 60, seed=1))
            server.let()
            await wait_for_latest_result(tasks, client, "s")
            sent = server.fake.calls[-1].inputs["image_embeddings"]
            np.testing.assert_array_equal(sent, before.tensors["image_embeddings"])

    run(test)


def test_what_cannot_be_queued() -> None:
    async def test() -> None:
        server = GatedTransport(FAMILIES["sam2"])
        client = SpeculativeSAM2Client(transport=server)
        with pytest.raises(ImageNotSetError):
            queue_multiple_requests(client, COORDS, LABELS, "s")
        await client.set_image(photo())
        with pytest.raises(PromptError, match="got 4 and 2"):
            queue_multiple_requests(client, COORDS, LABELS[:2], "s")
        await client.close()
        with pytest.raises(ClientClosedError):
            queue_multiple_requests(client, COORDS, LABELS, "s")

    run(test)


def test_closing_cancels_every_session() -> None:
    async def test() -> None:
        async with opened() as (client, server):
            tasks = queue_multiple_requests(client, COORDS, LABELS, "s")
            await turns()
            await client.close()
            await asyncio.wait(tasks)
            assert all(task.cancelled() for task in tasks) and len(server.cancelled) == 4

    run(test)
