"""The smoke test of sessions: what is superseded is cancelled, and the newest result is right."""

from __future__ import annotations

import asyncio

import numpy as np

from .demo import demo_photo
from .errors import SmokeError
from .sessions import SessionStatus
from .smoke import CLICK, ELSEWHERE, Check
from .speculative_client import (
    SpeculativeSAM2Client,
    queue_multiple_requests,
    wait_for_latest_result,
)

_REQUESTS = 20
_SESSION = "smoke"


def run(url: str | None, model_type: str, variant: str | None, timeout_s: float) -> list[Check]:
    """Ask the server at ``url``, and print what was seen.

    Raises :class:`SmokeError` naming the first check that failed.
    """
    checks = asyncio.run(_ask(url, model_type, variant, timeout_s))
    for check in checks:
        print(f"{'ok' if check.passed else 'FAILED':>12}  {check.name}: {check.found}")
    failed = [check for check in checks if not check.passed]
    if failed:
        raise SmokeError(
            f"{len(failed)} of {len(checks)} checks failed. The first: {failed[0].name}, and it "
            f"was {failed[0].found}."
        )
    return checks


async def _ask(
    url: str | None, model_type: str, variant: str | None, timeout_s: float
) -> list[Check]:
    async with SpeculativeSAM2Client(
        url, model_type, variant=variant, timeout_s=timeout_s
    ) as client:
        await client.set_image(demo_photo())
        return [
            *await _examine_latest(client),
            *await _examine_cancelling(client),
            await _examine_hover(client),
        ]


def _positions() -> list[list[list[float]]]:
    """A pointer's way from one coin to another."""
    way = np.linspace(CLICK, ELSEWHERE, _REQUESTS)
    return [[point] for point in way.tolist()]


async def _examine_latest(client: SpeculativeSAM2Client) -> list[Check]:
    positions = _positions()
    tasks = await queue_multiple_requests(client, positions, [[1]] * _REQUESTS, _SESSION)
    masks, _ = await wait_for_latest_result(tasks, client, _SESSION)
    await asyncio.wait(tasks)
    expected, _ = await client.predict(positions[-1], [1])
    apart = float(np.abs(masks - expected).max())
    # On a processor the bits are the same; some of a GPU's kernels add up in any order.
    same = apart <= 1e-4 * float(np.abs(expected).max())
    status = client.cleanup_session(_SESSION)
    return [
        Check("the latest result is the last position's", same, f"logits {apart:.1e} apart"),
        _adds_up("a superseded session", status),
    ]


async def _examine_cancelling(client: SpeculativeSAM2Client) -> list[Check]:
    tasks = await queue_multiple_requests(client, _positions(), [[1]] * _REQUESTS, _SESSION)
    await asyncio.sleep(0)
    cancelled = client.cancel_session_requests(_SESSION)
    await asyncio.wait(tasks)
    ended = sum(task.cancelled() for task in tasks)
    status = client.cleanup_session(_SESSION)
    return [
        Check("cancelling ends what waits", ended == cancelled > 0, f"{ended} of {_REQUESTS}"),
        _adds_up("a cancelled session", status),
    ]


async def _examine_hover(client: SpeculativeSAM2Client) -> Check:
    positions = [position[0] for position in _positions()]
    async with client.hover(session_id=_SESSION) as hover:
        for x, y in positions:
            hover.move(x, y)
            await asyncio.sleep(1 / 60)
        result = await hover.settled()
    status = client.cleanup_session(_SESSION)
    return Check(
        "hovering ends with the last position's mask",
        [result.x, result.y] == positions[-1],
        f"{status.sent} of {status.queued} positions were sent, the last took "
        f"{1e3 * result.latency_s:.0f} ms",
    )


def _adds_up(name: str, status: SessionStatus) -> Check:
    return Check(
        f"the requests of {name} are accounted for",
        status.queued == _REQUESTS and status.pending == 0 and status.failed == 0,
        f"{status.completed} completed, {status.dropped} dropped, "
        f"{status.cancelled_before_execution} never sent, {status.failed} failed",
    )
