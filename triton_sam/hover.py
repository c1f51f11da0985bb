"""Hovering: the mask under a pointer that moves faster than masks can be computed."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .core import Decoded
from .dispatch import Dispatcher
from .embedding import Embedding
from .errors import InvalidInputError, RequestCancelledError
from .masks import Segmentation
from .predictor.jobs import Priority
from .prompts import Prompt
from .sessions import Session, SessionRequest, SessionStatus

if TYPE_CHECKING:
    from typing_extensions import Self

# Three frames of a screen without a move: the pointer rests.
_REST_S = 0.05


@dataclass(frozen=True, eq=False)
class HoverResult:
    """What was found at one position.

    ``x``, ``y``: the position in pixels of the image. ``number``: which :meth:`Hover.move` or
    :meth:`Hover.click` it was, counted from 1. ``latency_s``: from that call to the answer.
    """

    x: float
    y: float
    number: int
    latency_s: float
    decoded: Decoded

    @cached_property
    def masks(self) -> NDArray[np.float32]:
        """Logits (1, M, h, w), as ``predict`` returns them."""
        return self.decoded.low_res()[0]

    @property
    def scores(self) -> NDArray[np.float32]:
        """Scores (1, M), as ``predict`` returns them."""
        return self.decoded.prediction.scores

    @cached_property
    def segmentation(self) -> Segmentation:
        """Masks at the size of the image, made when they are first asked for."""
        return self.decoded.segmentation()


@dataclass(frozen=True, eq=False)
class _Position:
    """What was asked for, checked."""

    x: float
    y: float
    number: int
    prompt: Prompt
    asked: float

    def result(self, decoded: Decoded) -> HoverResult:
        return HoverResult(self.x, self.y, self.number, time.perf_counter() - self.asked, decoded)


class Hover:
    """A pointer over an image; made by :meth:`SpeculativeSAM2Client.hover`.

    >>> async with client.hover("photo.jpg") as hover:  # doctest: +SKIP
    ...     canvas.on_mouse_move = hover.move  # from any thread
    ...     async for found in hover:
    ...         show(found.segmentation.overlay("photo.jpg"))

    At most one request runs and one position waits; each newer position replaces the one that
    waits. So the picture follows the pointer at the pace of the server and never falls behind.
    Results come in the order of the positions, and the last position always gets its mask.
    Whoever is slow to take results gets the newest one and not those before it.

    When the pointer rests (for 50 ms, or for good after :meth:`finish`) while an older position
    runs, that one is given up and the last one sent at once: it need not stand in the server's
    queue twice. Over HTTP, where the server carries out what it was sent, this is left out; and it
    never happens twice without a result in between.

    An error of a request is raised where results are taken; after it the iteration can go on.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        get_embedding: Callable[[], Awaitable[Embedding]],
        session_id: str,
        *,
        keep: bool,
        multimask_output: bool,
        timeout_s: float | None,
    ) -> None:
        self.session_id = session_id
        self._dispatcher = dispatcher
        self._get_embedding = get_embedding
        self._keep = keep
        self._multimask_output = multimask_output
        self._timeout_s = timeout_s
        self._session = Session(session_id)
        self._embedding: Embedding | None = None
        self._numbers = itertools.count(1)
        self._waiting: tuple[_Position, SessionRequest] | None = None
        self._running: tuple[asyncio.Task[HoverResult], SessionRequest] | None = None
        self._worker: asyncio.Task[None] | None = None
        self._rest: asyncio.TimerHandle | None = None
        self._hurried = False
        self._moved = asyncio.Event()
        self._idle = asyncio.Event()
        self._news = asyncio.Event()
        self._newest: HoverResult | BaseException | None = None
        self._unread = False
        self._finishing = False
        self._ended = False

    @property
    def status(self) -> SessionStatus:
        """What became of the positions so far; also after the end."""
        return self._session.status()

    @property
    def embedding(self) -> Embedding:
        """The image that the pointer is over."""
        if self._embedding is None:
            raise InvalidInputError("The hover has not begun: use it in `async with`.")
        return self._embedding

    def move(
        self,
        x: float,
        y: float,
        label: int = 1,
        *,
        point_coords: Sequence[Any] | NDArray[Any] = (),
        point_labels: Sequence[Any] | NDArray[Any] = (),
        box: ArrayLike | None = None,
        mask_input: ArrayLike | None = None,
    ) -> int:
        """The pointer is at (x, y), in pixels of the image; the number of this position.

        ``label``: 1 for what a click there would add, 0 for what it would take away. The rest is
        what holds already: the clicks, the box and the mask of ``predict``.

        May be called from any thread; it does not wait. After the end it does nothing. Raises
        :class:`PromptError` for what ``predict`` would refuse, such as a position outside.
        """
        position = self._position(x, y, label, point_coords, point_labels, box, mask_input)
        if not self._ended:
            self._dispatcher.post(partial(self._wait, position))
        return position.number

    async def click(
        self,
        x: float,
        y: float,
        label: int = 1,
        *,
        point_coords: Sequence[Any] | NDArray[Any] = (),
        point_labels: Sequence[Any] | NDArray[Any] = (),
        box: ArrayLike | None = None,
        mask_input: ArrayLike | None = None,
    ) -> HoverResult:
        """The mask of a click that counts; takes and raises what :meth:`move` does.

        It is sent at once. The positions before it are given up: the one that waits is dropped,
        the one that runs is cancelled. Its result is returned here and not by the iteration.

        Raises :class:`RequestCancelledError` too, when its session is cancelled meanwhile.
        """
        position = self._position(x, y, label, point_coords, point_labels, box, mask_input)
        self._supersede()
        task = self._start(position, SessionRequest(self._session), Priority.CLICK)
        try:
            await asyncio.wait([task])
        finally:
            task.cancel()  # when who waits was cancelled; it is done otherwise
        if task.cancelled():
            # Not as CancelledError, which would say that the caller's own task is cancelled.
            raise RequestCancelledError(
                f"The click at ({x:g}, {y:g}) was cancelled with its session {self.session_id!r}."
            )
        return task.result()

    async def settled(self) -> HoverResult:
        """Wait until nothing waits or runs; the result of the last position carried out.

        Raises the error that it ended with, and :class:`RequestCancelledError` when there is no
        result because nothing was asked or a click took its place.
        """
        await self._idle.wait()
        return self._answer()

    def finish(self) -> None:
        """Take no more positions; the iteration ends after the last one's result.

        May be called from any thread.
        """
        if not self._ended:
            self._dispatcher.post(self._finish)

    async def close(self) -> None:
        """End at once: what waits or runs is cancelled. Closing again does nothing."""
        if self._worker is None or self._ended:
            return
        running = self._supersede()
        self._worker.cancel()
        await asyncio.wait([self._worker, *([running] if running else [])])
        self._end()

    def __aiter__(self) -> AsyncIterator[HoverResult]:
        return self

    async def __anext__(self) -> HoverResult:
        while not self._unread:
            if self._ended:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        self._unread = False
        return self._answer()

    async def __aenter__(self) -> Self:
        self._dispatcher.enter()
        session = self._dispatcher.session(self.session_id)
        if session.hovering or self._worker is not None:
            raise InvalidInputError(
                f"The session {self.session_id!r} has a hover already; give each pointer its own "
                "session_id, or none."
            )
        session.hovering = True
        try:
            self._embedding = await self._get_embedding()
        except BaseException:
            session.hovering = False
            raise
        self._session = session
        self._worker = asyncio.create_task(self._work())
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def _answer(self) -> HoverResult:
        if isinstance(self._newest, BaseException):
            raise self._newest
        if self._newest is None:
            raise RequestCancelledError("There is no result: no position has been carried out.")
        return self._newest

    def _position(
        self,
        x: float,
        y: float,
        label: int,
        coords: Sequence[Any] | NDArray[Any],
        labels: Sequence[Any] | NDArray[Any],
        box: ArrayLike | None,
        mask_input: ArrayLike | None,
    ) -> _Position:
        prompt = Prompt.create(
            [*coords, (x, y)],
            [*labels, label],
            box,
            mask_input,
            self._multimask_output,
            original_size=self.embedding.original_size,
            layout=self._dispatcher.core.family.prompts,
        )
        return _Position(x, y, next(self._numbers), prompt, time.perf_counter())

    def _wait(self, position: _Position) -> None:
        if self._finishing or self._ended:
            return
        if self._waiting is not None:
            self._waiting[1].cancel()
        self._waiting = position, SessionRequest(self._session)
        self._idle.clear()
        self._moved.set()
        if self._rest is not None:
            self._rest.cancel()
        self._rest = asyncio.get_running_loop().call_later(_REST_S, self._rested)

    def _rested(self) -> None:
        """Give the older position up that runs, for the one that waits."""
        if (
            self._dispatcher.cancels_on_server
            and self._running is not None
            and self._waiting is not None
            and not self._hurried
        ):
            self._hurried = True
            self._running[1].cancel()

    def _start(
        self, position: _Position, request: SessionRequest, priority: Priority
    ) -> asyncio.Task[HoverResult]:
        return self._dispatcher.start(
            request,
            lambda **_: position.prompt,
            self.embedding,
            position.result,
            self._timeout_s,
            priority,
        )

    async def _work(self) -> None:
        """Carries positions out one after the other, always the newest."""
        try:
            while True:
                while self._waiting is not None:
                    (position, request), self._waiting = self._waiting, None
                    if request.pending:
                        await self._carry_out(position, request)
                self._idle.set()
                if self._finishing:
                    return
                await self._moved.wait()
                self._moved.clear()
        finally:
            self._end()

    async def _carry_out(self, position: _Position, request: SessionRequest) -> None:
        task = self._start(position, request, Priority.HOVER)
        self._running = task, request
        await asyncio.wait([task])
        self._running = None
        if not task.cancelled():
            self._hurried = False
            self._newest = task.exception() or task.result()
            self._unread = True
            self._news.set()

    def _supersede(self) -> asyncio.Task[HoverResult] | None:
        """Give up what waits and what runs; the task of the latter."""
        if self._waiting is not None:
            self._waiting[1].cancel()
            self._waiting = None
        if self._running is None:
            return None
        task, request = self._running
        request.cancel()
        return task

    def _finish(self) -> None:
        self._finishing = True
        self._moved.set()
        self._rested()

    def _end(self) -> None:
        if self._ended:
            return
        self._ended = True
        if self._rest is not None:
            self._rest.cancel()
        self._session.hovering = False
        self._idle.set()
        self._news.set()
        if not self._keep:
            self._dispatcher.forget(self.session_id)
