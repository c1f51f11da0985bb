#!/usr/bin/env python3
"""Soak the client: many sessions, cancelled calls, short timeouts, new images, server restarts.

Every call has to come back as a right answer, a cancellation that was asked for, a timeout, or,
while the server restarts, an unavailable server. Starts an embedded server on --repository, or on
the demo model. Prints JSON; the exit status is 1 when something was lost, wrong or left behind.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import json
import os
import random
import socket
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from triton_sam import (
    Embedding,
    ModelNotReadyError,
    RequestCancelledError,
    Retries,
    ServerError,
    ServerTimeoutError,
    ServerUnavailableError,
    SpeculativeSAM2Client,
    TransportOptions,
    queue_multiple_requests,
    wait_for_latest_result,
)
from triton_sam.core import Masks
from triton_sam.demo import demo_repository
from triton_sam.server import EmbeddedServer

_IMAGES = 3
_POINTS = 6
_SIZE = 200
# Nobody answers while the server restarts: for five seconds, or many more on a busy machine. How
# long a call waits for it is the deadline's to say; no number of attempts ends it before.
_DEADLINE_S = 120
_PATIENT = Retries(attempts=10 * _DEADLINE_S, backoff_s=0.2, max_backoff_s=1.0)


@dataclass
class Figures:
    """What came of the calls. ``lost``: neither answered, nor failed, nor cancelled.

    ``unexpected``: errors that nothing explains. Memory in MB: of this process after a tenth of
    the calls, or 500 if there are so many, and after all of them, while nothing is under way;
    what the C library keeps for itself is given back first.
    """

    calls: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    restarts: int = 0
    wrong: int = 0
    unexpected: list[str] = field(default_factory=list)
    left_tasks: int = 0
    left_threads: int = 0
    memory_early_mb: float = 0.0
    memory_end_mb: float = 0.0

    @property
    def lost(self) -> int:
        return self.calls - sum(self.outcomes.values())

    @property
    def growth_mb(self) -> float:
        return self.memory_end_mb - self.memory_early_mb

    @property
    def clean(self) -> bool:
        left = self.left_tasks + self.left_threads
        return not (self.lost or self.wrong or self.unexpected or left) and self.growth_mb < 50


class Soak:
    """Sessions that call one client, and a server that restarts under them."""

    def __init__(self, server: EmbeddedServer, calls: int, sessions: int, restarts: int) -> None:
        self.figures = Figures()
        self._server = server
        self._calls = calls
        self._sessions = sessions
        self._restart_at = [calls * (n + 1) // (restarts + 1) for n in range(restarts)]
        self._down = False
        self._images = [_noise(seed) for seed in range(_IMAGES)]
        points = np.random.default_rng(0).uniform(10, _SIZE - 10, (_POINTS, 1, 2))
        self._points = [point.tolist() for point in points]
        self._expected: dict[tuple[str, int], Masks] = {}

    async def run(self) -> Figures:
        """Carry all calls out and count."""
        options = TransportOptions(timeout_s=_DEADLINE_S, retries=_PATIENT)
        async with SpeculativeSAM2Client(self._server.url, options=options) as client:
            embeddings = [await client.encode(image) for image in self._images]
            for embedding in embeddings:
                for index, point in enumerate(self._points):
                    answer = await client.predict(point, [1], embedding=embedding)
                    self._expected[embedding.digest, index] = answer
            threads = set(threading.enumerate())  # gRPC keeps one of its own
            restarting = asyncio.create_task(self._restart())
            # It takes some hundred calls until buffers and threads are as large as they get.
            warm = max(self._calls // 10, min(500, self._calls // 2))
            for calls in (warm, self._calls):
                sessions = (self._session(client, n, calls) for n in range(self._sessions))
                await _unless_fails(restarting, asyncio.gather(*sessions))
                self.figures.memory_early_mb = self.figures.memory_end_mb
                self.figures.memory_end_mb = _memory_mb()
            await restarting
        await asyncio.get_running_loop().shutdown_default_executor()
        self.figures.left_tasks = len(asyncio.all_tasks()) - 1
        self.figures.left_threads = len(set(threading.enumerate()) - threads)
        return self.figures

    async def _session(self, client: SpeculativeSAM2Client, number: int, calls: int) -> None:
        rng = random.Random(f"{number} {calls}")
        embedding = await client.encode(rng.choice(self._images))
        actions = (self._call, self._cancelled_call, self._hurried_call, self._burst)
        while self.figures.calls < calls:
            if rng.random() < 0.02:
                embedding = await self._change_image(client, rng, embedding)
            action = rng.choices(actions, (6, 2, 1, 1))[0]
            await action(client, rng, embedding, f"session-{number}")

    async def _change_image(
        self, client: SpeculativeSAM2Client, rng: random.Random, old: Embedding
    ) -> Embedding:
        self.figures.calls += 1
        try:
            embedding = await client.encode(rng.choice(self._images))
        except ServerError as exc:
            self._failed(exc)
            return old
        self.figures.outcomes["encoded"] += 1
        return embedding

    async def _call(
        self,
        client: SpeculativeSAM2Client,
        rng: random.Random,
        embedding: Embedding,
        session_id: str,
        timeout_s: float | None = None,
    ) -> None:
        index = rng.randrange(_POINTS)
        self.figures.calls += 1
        try:
            answer = await client.predict(
                self._points[index], [1], embedding=embedding, timeout_s=timeout_s
            )
        except asyncio.CancelledError:
            self.figures.outcomes["cancelled"] += 1
            raise
        except ServerError as exc:
            self._failed(exc, hurried=timeout_s is not None)
        else:
            self._answered(embedding, index, answer)

    async def _hurried_call(
        self,
        client: SpeculativeSAM2Client,
        rng: random.Random,
        embedding: Embedding,
        session_id: str,
    ) -> None:
        await self._call(client, rng, embedding, session_id, rng.uniform(0.001, 0.1))

    async def _cancelled_call(
        self,
        client: SpeculativeSAM2Client,
        rng: random.Random,
        embedding: Embedding,
        session_id: str,
    ) -> None:
        task = asyncio.create_task(self._call(client, rng, embedding, session_id))
        await asyncio.sleep(rng.uniform(0, 0.1))
        task.cancel()
        await asyncio.wait([task])

    async def _burst(
        self,
        client: SpeculativeSAM2Client,
        rng: random.Random,
        embedding: Embedding,
        session_id: str,
    ) -> None:
        """Three requests at once, of which all but the newest may be cancelled."""
        indices = [rng.randrange(_POINTS) for _ in range(3)]
        self.figures.calls += 3
        tasks = queue_multiple_requests(
            client,
            [self._points[index] for index in indices],
            [[1]] * 3,
            session_id,
            embedding=embedding,
        )
        await asyncio.sleep(rng.uniform(0, 0.1))
        client.cancel_session_requests(session_id, keep_latest=rng.random() < 0.7)
        with suppress(RequestCancelledError, ServerError):  # each task is looked at below
            await wait_for_latest_result(tasks, client, session_id)
        await asyncio.wait(tasks)
        for index, task in zip(indices, tasks, strict=True):
            if task.cancelled():
                self.figures.outcomes["cancelled"] += 1
            elif (exc := task.exception()) is not None:
                self._failed(exc)
            else:
                self._answered(embedding, index, task.result())

    def _answered(self, embedding: Embedding, index: int, answer: Masks) -> None:
        self.figures.outcomes["answered"] += 1
        expected = self._expected[embedding.digest, index]
        if not all(map(_same, answer, expected)):
            self.figures.wrong += 1

    def _failed(self, exc: BaseException, hurried: bool = False) -> None:
        if isinstance(exc, ServerTimeoutError) and hurried:
            self.figures.outcomes["timed out"] += 1
        elif isinstance(exc, ServerUnavailableError) and (hurried or self._down):
            self.figures.outcomes["unavailable"] += 1
        elif isinstance(exc, ModelNotReadyError) and self._down:
            # A server that stops unloads its models before it closes its ports.
            self.figures.outcomes["unavailable"] += 1
        else:
            self.figures.outcomes["unexpected"] += 1
            when = f"after {self.figures.restarts} restarts" + (", in one more" * self._down)
            self.figures.unexpected.append(f"{type(exc).__name__}, {when}: {exc}"[:300])

    async def _restart(self) -> None:
        for at in self._restart_at:
            while self.figures.calls < at:
                await asyncio.sleep(0.05)
            self._down = True
            await asyncio.to_thread(self._server.stop)
            await asyncio.to_thread(self._server.start)
            self.figures.restarts += 1
            await asyncio.sleep(2)  # what failed meanwhile says so within this time
            self._down = False


async def _unless_fails(beside: asyncio.Task[None], work: asyncio.Future[Any]) -> None:
    """Await ``work``, unless ``beside`` fails first: then that is what went wrong."""
    ends: set[asyncio.Future[Any]] = {beside, work}
    done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    if beside in done and beside.exception() is not None:
        work.cancel()
        with suppress(asyncio.CancelledError):
            await work
        beside.result()
    await work


def soak(repository: Path, calls: int, sessions: int = 8, restarts: int = 2) -> Figures:
    """Run it on an embedded server that keeps its addresses over restarts."""
    http, grpc, metrics = free_ports(3)
    with EmbeddedServer(
        repository, http_port=http, grpc_port=grpc, metrics_port=metrics, quiet=True
    ) as server:
        return asyncio.run(Soak(server, calls, sessions, restarts).run())


def _noise(seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (_SIZE, _SIZE, 3), dtype=np.uint8)


def _same(answer: NDArray[np.float32], expected: NDArray[np.float32]) -> bool:
    return bool(np.allclose(answer, expected, atol=1e-3 * float(np.abs(expected).max())))


def _memory_mb() -> float:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, soak and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--restarts", type=int, default=2)
    parser.add_argument("--repository", type=Path, help="what the embedded server serves")
    args = parser.parse_args(arguments)
    repository = args.repository or demo_repository()
    figures = soak(repository, args.calls, args.sessions, args.restarts)
    result = {**vars(figures), "lost": figures.lost, "growth_mb": round(figures.growth_mb, 1)}
    print(json.dumps(result, indent=2))
    return 0 if figures.clean else 1


if __name__ == "__main__":
    sys.exit(main())
