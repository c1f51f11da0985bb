"""Hovering: latest wins, in order, with true statistics, over a server that is a function."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from fakes import GatedTransport, f32, photo, run, turns

from triton_sam import (
    Hover,
    HoverResult,
    InferenceError,
    InvalidInputError,
    PromptError,
    RequestCancelledError,
    SAM2TritonClient,
    SessionStatus,
    SpeculativeSAM2Client,
)
from triton_sam.specs import FAMILIES, Family

Server = GatedTransport
FRAME = FAMILIES["sam2"].image.size


@asynccontextmanager
async def hovering(
    name: str = "sam2", cancels_on_server: bool = False, **options: Any
) -> AsyncIterator[tuple[SpeculativeSAM2Client, Server, Hover]]:
    """A hover over an image of 100x100 pixels."""
    server = GatedTransport(FAMILIES[name], cancels_on_server)
    async with (
        SpeculativeSAM2Client(model_type=name, transport=server) as client,
        client.hover(photo(100, 100), "mouse", **options) as hover,
    ):
        yield client, server, hover


def xs(server: Server) -> list[int]:
    """The columns that were sent, in pixels of the image."""
    return [round(x * 100 / server.family.image.size) for x, _ in server.started]


def test_one_runs_and_the_newest_waits() -> None:
    async def test() -> None:
        async with hovering() as (_, server, hover):
            for x in range(10):
                hover.move(x, 50)
                await turns()
            assert xs(server) == [0]
            server.let()
            first = await anext(hover)
            assert (first.x, first.y, first.number) == (0, 50, 1)
            await turns()
            assert xs(server) == [0, 9]
            assert hover.status == SessionStatus(
                "mouse", queued=10, sent=2, cancelled_before_execution=8, executed=1, completed=1
            )
            assert hover.status.pending == 1
            server.let()
            last = await hover.settled()
            assert (last.x, last.number) == (9, 10)
            assert server.most_at_once == 1
            assert last.latency_s > 0

    run(test)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_result_is_that_of_predict(family: Family) -> None:
    async def test() -> None:
        async with hovering(family.name) as (client, server, hover):
            server.let(2)
            hover.move(40, 60)
            found = await anext(hover)
            masks, scores = await client.predict([[40, 60]], [1], embedding=hover.embedding)
            np.testing.assert_array_equal(found.masks, masks)
            np.testing.assert_array_equal(found.scores, scores)
            assert found.segmentation.masks.shape == (1, 1, 100, 100)
            x1, y1, x2, y2 = found.segmentation.bbox[0, 0]
            assert abs((x1 + x2) / 2 - 40) < 1.5 and abs((y1 + y2) / 2 - 60) < 1.5

    run(test)


def test_a_hover_among_what_was_committed() -> None:
    async def test() -> None:
        async with hovering(multimask_output=True) as (_, server, hover):
            server.let()
            hover.move(40, 60, 0, point_coords=[[10, 20]], point_labels=[1], box=[5, 5, 90, 90])
            found = await anext(hover)
            assert found.scores.shape == (1, 3)
            sent = server.fake.calls[-1].inputs
            scale = FRAME / 100
            expected = f32([[5, 5], [90, 90], [10, 20], [40, 60]]) * f32(scale)
            np.testing.assert_allclose(f32(sent["point_coords"])[0], expected)
            np.testing.assert_array_equal(sent["point_labels"], [[2, 3, 1, 0]])

    run(test)


def test_iterating_to_the_last_position() -> None:
    async def test() -> None:
        async with hovering() as (_, server, hover):
            server.let(1000)
            found: list[HoverResult] = []

            async def take() -> None:
                async for result in hover:
                    found.append(result)

            taking = asyncio.create_task(take())
            for number in range(100):
                hover.move(number, 7)
                if number % 3 == 0:
                    await turns(5)
            hover.finish()
            hover.move(50, 50)  # too late
            await taking
            numbers = [result.number for result in found]
            assert numbers == sorted(set(numbers)) and numbers[-1] == 100
            assert (found[-1].x, found[-1].y) == (99, 7)
            status = hover.status
            assert status.queued == 100 and status.pending == 0
            assert status.sent == status.executed == status.completed == len(server.started)

    run(test)


def test_a_slow_taker_gets_the_newest() -> None:
    async def test() -> None:
        async with hovering() as (_, server, hover):
            server.let(3)
            for x in (1, 2, 3):
                hover.move(x, 0)
                await hover.settled()
            assert (await anext(hover)).x == 3
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(anext(hover), 0.05)

    run(test)


def test_a_click_is_behind_the_running_hover_only() -> None:
    async def test() -> None:
        async with hovering() as (_, server, hover):
            hover.move(1, 1)
            await turns()
            hover.move(2, 2)
            clicking = asyncio.create_task(hover.click(30, 30))
            await turns()
            # Sent at once; the running hover was cancelled, the waiting one never sent.
            assert xs(server) == [1, 30]
            assert len(server.cancelled) == 1
            hover.move(4, 4)
            await turns()
            assert xs(server) == [1, 30, 4]
            server.let(2)
            clicked = await clicking
            assert (clicked.x, clicked.number) == (30, 3)
            assert (await anext(hover)).x == 4
            assert hover.status == SessionStatus(
                "mouse",
                queued=4,
                sent=3,
                cancelled_before_execution=1,
                executed=2,
                dropped=1,
                completed=2,
            )

    run(test)


def test_a_pointer_that_rests_does_not_queue_twice() -> None:
    async def test() -> None:
        async with hovering(cancels_on_server=True) as (_, server, hover):
            for x in (1, 2, 3):
                hover.move(x, x)
                await turns()
            assert xs(server) == [1]
            await asyncio.sleep(0.15)
            assert xs(server) == [1, 3] and server.at_once == 1
            # Not again before there is a result: a pointer that moves on slowly sees masks too.
            hover.move(4, 4)
            await asyncio.sleep(0.15)
            assert xs(server) == [1, 3]
            server.let()
            assert (await anext(hover)).x == 3
            await turns()
            hover.move(5, 5)
            await asyncio.sleep(0.15)
            assert xs(server) == [1, 3, 4, 5]
            server.let()
            assert (await hover.settled()).x == 5
            status = hover.status
            assert (status.queued, status.sent, status.dropped) == (5, 4, 2)
            assert (status.cancelled_before_execution, status.completed) == (1, 2)

    run(test)


def test_finishing_sends_the_last_position_at_once() -> None:
    async def test() -> None:
        async with hovering(cancels_on_server=True) as (_, server, hover):
            hover.move(1, 1)
            await turns()
            hover.move(2, 2)
            hover.finish()
            await turns()
            assert xs(server) == [1, 2] and server.at_once == 1
            server.let()
            assert [found.x async for found in hover] == [2]

    run(test)


def test_over_http_a_rest_changes_nothing() -> None:
    async def test() -> None:
        async with hovering() as (_, server, hover):
            hover.move(1, 1)
            await turns()
            hover.move(2, 2)
            await asyncio.sleep(0.15)
            hover.finish()
            await turns()
            assert xs(server) == [1]
            server.let(2)
            assert (await hover.settled()).x == 2

    run(test)


def test_an_error_does_not_end_the_hover() -> None:
    async def test() -> None:
        async with hovering() as (_, server, hover):
            server.let(3)
            server.failing = InferenceError("out of memory")
            hover.move(1, 1)
            with pytest.raises(InferenceError, match="out of memory"):
                await anext(hover)
            with pytest.raises(InferenceError, match="out of memory"):
                await hover.settled()
            server.failing = None
            hover.move(2, 2)
            assert (await anext(hover)).x == 2
            assert (hover.status.failed, hover.status.completed) == (1, 1)

    run(test)


def test_positions_are_checked_where_they_are_given() -> None:
    async def test() -> None:
        async with hovering() as (_, server, hover):
            for wrong in ((101, 5), (5, -1), (float("nan"), 5)):
                with pytest.raises(PromptError):
                    hover.move(*wrong)
                with pytest.raises(PromptError):
                    await hover.click(*wrong)
            await turns()
            assert server.started == [] and hover.status.queued == 0

    run(test)


def test_closing_cancels_what_runs() -> None:
    async def test() -> None:
        async with hovering() as (_, server, hover):
            hover.move(1, 1)
            await turns()
            hover.move(2, 2)
            await hover.close()
            await hover.close()
            assert len(server.cancelled) == 1 and server.at_once == 0
            assert [found async for found in hover] == []
            with pytest.raises(RequestCancelledError):
                await hover.settled()
            hover.move(3, 3)
            await turns()
            assert hover.status == SessionStatus(
                "mouse", queued=2, sent=1, cancelled_before_execution=1, dropped=1
            )

    run(test)


def test_cancelling_the_session_spares_the_hover() -> None:
    async def test() -> None:
        async with hovering() as (client, server, hover):
            hover.move(1, 1)
            await turns()
            hover.move(2, 2)
            assert client.cancel_session_requests("mouse") == 2
            await turns()
            assert xs(server) == [1]
            server.let()
            hover.move(3, 3)
            assert (await anext(hover)).x == 3
            status = client.get_session_status("mouse")
            assert (status.cancelled_before_execution, status.dropped) == (1, 1)

    run(test)


def test_a_click_that_is_cancelled_with_its_session_says_so() -> None:
    async def test() -> None:
        async with hovering() as (client, server, hover):
            clicking = asyncio.create_task(hover.click(30, 40))
            await turns()
            assert client.cancel_session_requests("mouse") == 1
            with pytest.raises(
                RequestCancelledError, match=r"\(30, 40\) was cancelled with .*mouse"
            ):
                await clicking
            # Who cancels the caller cancels the click.
            clicking = asyncio.create_task(hover.click(50, 60))
            await turns()
            clicking.cancel()
            await asyncio.wait([clicking])
            assert clicking.cancelled()
            await turns()
            assert xs(server) == [30, 50] and len(server.cancelled) == 2
            assert hover.status.dropped == 2 and hover.status.pending == 0

    run(test)


def test_hovers_do_not_disturb_each_other() -> None:
    async def test() -> None:
        server = GatedTransport(FAMILIES["sam2"])
        async with SpeculativeSAM2Client(transport=server) as client:
            await client.set_image(photo(100, 100))
            async with client.hover() as first, client.hover() as second:
                assert first.session_id != second.session_id
                first.move(1, 1)
                second.move(2, 2)
                await turns()
                assert xs(server) == [1, 2]
                await first.close()
                server.let()
                assert (await anext(second)).x == 2
                assert client.get_session_status(first.session_id).queued == 0  # forgotten
                assert first.status.dropped == 1

    run(test)


def test_one_hover_a_session() -> None:
    async def test() -> None:
        async with hovering() as (client, _, hover):
            with pytest.raises(InvalidInputError, match="'mouse' has a hover already"):
                await client.hover(None, "mouse").__aenter__()
            await hover.close()
            async with client.hover(hover.embedding, "mouse") as again:
                assert again.status.queued == 0
            with pytest.raises(InvalidInputError, match="has not begun"):
                client.hover(hover.embedding).move(1, 1)

    run(test)


def test_moves_from_another_thread() -> None:
    async def test() -> None:
        async with hovering() as (client, server, hover):
            server.let(1000)

            def drag() -> None:
                for x in range(100):
                    hover.move(x, x)
                hover.finish()

            mouse = threading.Thread(target=drag)
            mouse.start()
            found = [result async for result in hover]
            mouse.join()
            assert (found[-1].x, found[-1].number) == (99, 100)
            status = await asyncio.to_thread(client.get_session_status, "mouse")
            assert status.queued == 100 and status.pending == 0
            assert await asyncio.to_thread(client.cancel_session_requests, "mouse") == 0
            assert await asyncio.to_thread(client.cleanup_session, "mouse") == status
            assert client.get_session_status("mouse").queued == 0

    run(test)


def test_the_client_closes_under_a_hover() -> None:
    async def test() -> None:
        async with hovering() as (client, server, hover):
            hover.move(1, 1)
            await turns()
            await client.close()
            await turns()
            assert len(server.cancelled) == 1

    run(test)


def test_sync_client_is_untouched() -> None:
    assert not hasattr(SAM2TritonClient, "hover")
