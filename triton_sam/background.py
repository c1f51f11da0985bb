"""The speculative client for programs that run no event loop: GUIs, plug-ins, plain threads."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from .core import Masks
from .embedding import Embedding
from .errors import ClientClosedError, InvalidInputError
from .hover import Hover, HoverResult
from .images import ImageSource
from .masks import Segmentation
from .sessions import SessionStatus
from .speculative_client import SpeculativeSAM2Client

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

T = TypeVar("T")


class BackgroundSAM2Client:
    """A :class:`SpeculativeSAM2Client` in a thread of its own; every method from any thread.

    >>> client = BackgroundSAM2Client("grpc://localhost:8001")  # doctest: +SKIP
    >>> hover = client.hover("photo.jpg", on_result=lambda found: window.signal.emit(found))
    >>> canvas.on_mouse_move = hover.move

    Takes the same arguments. :meth:`submit` starts anything that the speculative client can do and
    returns a future; the other methods wait for the result.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._loop = asyncio.new_event_loop()
        try:
            self._client = SpeculativeSAM2Client(*args, **kwargs)
        except BaseException:
            self._loop.close()
            raise
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="triton-sam", daemon=True
        )
        self._closing = threading.Lock()
        # What is submitted comes before the end in the loop, or is refused.
        self._submitting = threading.RLock()
        self._closed = False
        self._thread.start()

    def submit(self, call: Callable[[SpeculativeSAM2Client], Coroutine[Any, Any, T]]) -> Future[T]:
        """Start ``call``; its future gives the result, and cancelling it cancels the request.

        >>> future = client.submit(lambda c: c.segment([[10, 20]], [1]))  # doctest: +SKIP
        """
        with self._submitting:
            if self._closed:
                raise ClientClosedError("This client is closed; make a new one.")
            return asyncio.run_coroutine_threadsafe(call(self._client), self._loop)

    def set_image(self, image: ImageSource, *, timeout_s: float | None = None) -> None:
        """As :meth:`SAM2TritonClient.set_image <triton_sam.client.SAM2TritonClient.set_image>`."""
        self._wait_for(lambda client: client.set_image(image, timeout_s=timeout_s))

    def encode(self, image: ImageSource, *, timeout_s: float | None = None) -> Embedding:
        """As :meth:`SAM2TritonClient.encode <triton_sam.client.SAM2TritonClient.encode>`."""
        return self._wait_for(lambda client: client.encode(image, timeout_s=timeout_s))

    def predict(self, *args: Any, **kwargs: Any) -> Masks:
        """As :meth:`SAM2TritonClient.predict <triton_sam.client.SAM2TritonClient.predict>`."""
        return self._wait_for(lambda client: client.predict(*args, **kwargs))

    def segment(self, *args: Any, **kwargs: Any) -> Segmentation:
        """As :meth:`SAM2TritonClient.segment <triton_sam.client.SAM2TritonClient.segment>`."""
        return self._wait_for(lambda client: client.segment(*args, **kwargs))

    def is_ready(self) -> bool:
        """Whether the server answers and serves both models."""
        return self._wait_for(lambda client: client.is_ready())

    def wait_until_ready(self, timeout_s: float = 60.0) -> None:
        """Return as soon as both models are ready, or raise :class:`ServerTimeoutError`."""
        self._wait_for(lambda client: client.wait_until_ready(timeout_s))

    def hover(
        self,
        image: ImageSource | Embedding | None,
        on_result: Callable[[HoverResult], object],
        on_error: Callable[[Exception], object] | None = None,
        *,
        session_id: str | None = None,
        multimask_output: bool = False,
        timeout_s: float | None = None,
    ) -> BackgroundHover:
        """A pointer over an image; waits until the image is encoded.

        ``on_result`` and ``on_error`` are called in the client's thread: hand over to the GUI's
        own thread there and return at once. Without ``on_error`` errors are logged. The rest as
        :meth:`SpeculativeSAM2Client.hover`.
        """

        async def begin(client: SpeculativeSAM2Client) -> BackgroundHover:
            hover = client.hover(
                image, session_id, multimask_output=multimask_output, timeout_s=timeout_s
            )
            await hover.__aenter__()
            pump = asyncio.create_task(_pump(hover, on_result, on_error or _log_error))
            return BackgroundHover(self, hover, pump)

        return self._wait_for(begin)

    def cancel_session_requests(self, session_id: str) -> int:
        """As :meth:`SpeculativeSAM2Client.cancel_session_requests`."""
        return self._ask(lambda client: client.cancel_session_requests(session_id))

    def get_session_status(self, session_id: str) -> SessionStatus:
        """As :meth:`SpeculativeSAM2Client.get_session_status`."""
        return self._client.get_session_status(session_id)

    def cleanup_session(self, session_id: str) -> SessionStatus:
        """As :meth:`SpeculativeSAM2Client.cleanup_session`."""
        return self._ask(lambda client: client.cleanup_session(session_id))

    def close(self) -> None:
        """Cancel everything, give the connections back and end the thread.

        Closing again does nothing. Not from ``on_result``: it waits for the thread that calls it.
        """
        self._refuse_own_thread()
        with self._closing:
            with self._submitting:
                if self._closed:
                    return
                self._closed = True
                ending = asyncio.run_coroutine_threadsafe(self._end(), self._loop)
            ending.result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _wait_for(self, call: Callable[[SpeculativeSAM2Client], Coroutine[Any, Any, T]]) -> T:
        self._refuse_own_thread()
        try:
            return self.submit(call).result()
        except CancelledError:
            # Nobody else has this future: closing has cancelled it.
            raise ClientClosedError("The client was closed during the call.") from None

    def _ask(self, call: Callable[[SpeculativeSAM2Client], T]) -> T:
        """What comes of something short, also in the client's own thread."""

        async def asked(client: SpeculativeSAM2Client) -> T:
            return call(client)

        if threading.current_thread() is self._thread:
            return call(self._client)
        return self._wait_for(asked)

    def _refuse_own_thread(self) -> None:
        if threading.current_thread() is self._thread:
            raise InvalidInputError(
                "This waits for the client's own thread, which called it (from on_result?): use "
                "submit(), or hand over to another thread first."
            )

    async def _end(self) -> None:
        await self._client.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._loop.shutdown_default_executor()


class BackgroundHover:
    """A :class:`~triton_sam.hover.Hover` in the thread of a background client."""

    def __init__(
        self, client: BackgroundSAM2Client, hover: Hover, pump: asyncio.Task[None]
    ) -> None:
        self._client = client
        self._hover = hover
        self._pump = pump
        self.move = hover.move
        self.finish = hover.finish
        self.embedding = hover.embedding

    @property
    def status(self) -> SessionStatus:
        """What became of the positions so far; also after the end."""
        return self._hover.status

    def click(self, *args: Any, **kwargs: Any) -> Future[HoverResult]:
        """As :meth:`Hover.click <triton_sam.hover.Hover.click>`; does not wait."""
        return self._client.submit(lambda _: self._hover.click(*args, **kwargs))

    def close(self) -> None:
        """End at once; when this returns no more results are given."""
        self._client._wait_for(lambda _: self._closed())

    async def _closed(self) -> None:
        await self._hover.close()
        await asyncio.wait([self._pump])


async def _pump(
    hover: Hover,
    on_result: Callable[[HoverResult], object],
    on_error: Callable[[Exception], object],
) -> None:
    while True:
        try:
            async for found in hover:
                on_result(found)
            return
        except Exception as exc:
            on_error(exc)


def _log_error(exc: Exception) -> None:
    logger.warning("A hover failed: %s", exc)
