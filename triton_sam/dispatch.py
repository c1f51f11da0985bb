"""Carries the requests of sessions out, and lets other threads reach the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from .core import ClientCore, Decoded, MakePrompt
from .embedding import Embedding
from .flow import run_async
from .predictor.jobs import Priority
from .protocol import Arrays, Call, Served
from .sessions import Session, SessionRequest, SessionStatus
from .transport import AsyncTransport
from .transport.requests import Memory

T = TypeVar("T")


class Dispatcher:
    """The sessions of one client, in the event loop that used it first.

    ``cancels_on_server``: whether cancelling takes a request out of the server's queue.
    """

    def __init__(self, core: ClientCore, transport: AsyncTransport) -> None:
        self.core = core
        self.cancels_on_server = bool(getattr(transport, "cancels_on_server", False))
        self._transport = transport
        self._sessions: dict[str, Session] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: int | None = None

    def enter(self) -> None:
        """Note that the running event loop is the one of this client."""
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()

    def session(self, session_id: str) -> Session:
        """The session of that name, made if need be."""
        return self._sessions.setdefault(session_id, Session(session_id))

    def start(
        self,
        request: SessionRequest,
        make_prompt: MakePrompt,
        embedding: Embedding,
        read: Callable[[Decoded], T],
        timeout_s: float | None = None,
        priority: Priority = Priority.CLICK,
    ) -> asyncio.Task[T]:
        """Send a request; the task gives what ``read`` makes of the answer."""

        async def carried_out() -> T:
            flow = self.core.decode(make_prompt, embedding, timeout_s, priority)
            decoded = await run_async(flow, _NotingTransport(self._transport, request))
            request.mark_executed()
            return read(decoded)

        task = asyncio.create_task(carried_out())
        request.start(task)
        return task

    def status(self, session_id: str) -> SessionStatus:
        session = self._sessions.get(session_id)
        return session.status() if session else SessionStatus(session_id)

    def cancel(self, session_id: str, *, keep_latest: bool = False) -> int:
        session = self._sessions.get(session_id)
        return session.cancel(keep_latest=keep_latest) if session else 0

    def forget(self, session_id: str) -> SessionStatus:
        self.cancel(session_id)
        status = self.status(session_id)
        self._sessions.pop(session_id, None)
        return status

    def cancel_all(self) -> None:
        for session in self._sessions.values():
            session.cancel()

    def post(self, call: Callable[[], object]) -> None:
        """Have ``call`` made in the event loop: at once, or from another thread in its turn."""
        if self._loop is None or threading.get_ident() == self._thread:
            call()
        else:
            self._loop.call_soon_threadsafe(call)

    def ask(self, call: Callable[[], T]) -> T:
        """As :meth:`post`, and wait for what comes of it."""
        future: Future[T] = Future()

        def answer() -> None:
            try:
                future.set_result(call())
            except BaseException as exc:
                future.set_exception(exc)

        self.post(answer)
        return future.result()


class _NotingTransport:
    """A transport that notes when the inference of one request is sent."""

    def __init__(self, transport: AsyncTransport, request: SessionRequest) -> None:
        self._transport = transport
        self._request = request

    async def infer(self, call: Call, timeout_s: float | None = None) -> Arrays:
        self._request.mark_sent()
        return await self._transport.infer(call, timeout_s)

    async def served(self, model: str, timeout_s: float | None = None) -> Served:
        return await self._transport.served(model, timeout_s)

    async def check_ready(self, models: Sequence[str], timeout_s: float | None = None) -> None:
        await self._transport.check_ready(models, timeout_s)

    async def memory(self, request: Memory, timeout_s: float | None = None) -> Any:
        transport: Any = self._transport  # not every transport has it
        return await transport.memory(request, timeout_s)

    async def close(self) -> None:
        await self._transport.close()
