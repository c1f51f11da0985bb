"""Requests that may be superseded: sessions whose work is cancelled, and live hovering.

>>> from triton_sam import SpeculativeSAM2Client, queue_multiple_requests, wait_for_latest_result
>>> async def main():  # doctest: +SKIP
...     async with SpeculativeSAM2Client("grpc://localhost:8001") as client:
...         await client.set_image("photo.jpg")
...         tasks = await queue_multiple_requests(
...             client, [[[10, 20]], [[12, 21]], [[15, 23]]], [[1], [1], [1]], "mouse"
...         )
...         masks, iou = await wait_for_latest_result(tasks, client, "mouse")

Cancelling over gRPC reaches the server: a request that waits in its queue is dropped there. Over
HTTP the same calls work, and cancelling is the client's matter only: the server carries out what it
was sent.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Generator, Sequence
from functools import partial
from typing import Any, TypeAlias

from numpy.typing import ArrayLike

from .async_client import AsyncSAM2TritonClient
from .core import Decoded, Masks
from .dispatch import Dispatcher
from .embedding import Embedding
from .errors import PromptError, RequestCancelledError
from .hover import Hover
from .images import ImageSource
from .prompts import Prompt
from .sessions import SessionRequest, SessionStatus

MasksTask: TypeAlias = "asyncio.Task[Masks]"


class RequestList(list["MasksTask"]):
    """Tasks in the order in which they were asked for; awaiting it lets them be sent."""

    def __await__(self) -> Generator[Any, None, RequestList]:
        yield from asyncio.sleep(0).__await__()
        return self


class SpeculativeSAM2Client(AsyncSAM2TritonClient):
    """:class:`AsyncSAM2TritonClient` with sessions: requests that may be cancelled or superseded.

    Works with every ``model_type``. A session is a name of your choice, for one user, one tab or
    one pointer; it exists from its first request until :meth:`cleanup_session`. Sessions know
    nothing of each other. :meth:`cancel_session_requests`, :meth:`get_session_status`,
    :meth:`cleanup_session` and a hover's ``move`` may be called from any thread; for programs
    without an event loop there is :class:`~triton_sam.background.BackgroundSAM2Client`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._dispatcher = Dispatcher(self._core, self._transport)
        self._names = (f"hover-{number}" for number in itertools.count(1))

    def hover(
        self,
        image: ImageSource | Embedding | None = None,
        session_id: str | None = None,
        *,
        multimask_output: bool = False,
        timeout_s: float | None = None,
    ) -> Hover:
        """A session in which each position of the pointer replaces the one before.

        ``image``: to be encoded, an embedding, or nothing for the image that is set.
        ``session_id``: without one the session is forgotten when the hover ends.
        ``multimask_output``: three masks at each position instead of one. ``timeout_s``: for each
        request. How it is used: :class:`~triton_sam.hover.Hover`.
        """
        return Hover(
            self._dispatcher,
            partial(self._embedding_of, image),
            session_id or next(self._names),
            keep=session_id is not None,
            multimask_output=multimask_output,
            timeout_s=timeout_s,
        )

    def queue_requests(
        self,
        coords_list: Sequence[ArrayLike],
        labels_list: Sequence[ArrayLike],
        session_id: str,
        *,
        embedding: Embedding | None = None,
        timeout_s: float | None = None,
    ) -> RequestList:
        """Send several requests at once, one for each entry of the two lists, newest last.

        ``coords_list`` and ``labels_list``: what ``predict`` takes as ``point_coords`` and
        ``point_labels``. Returns tasks; each gives what ``predict`` returns. Nothing limits how
        many wait in the server's queue: for a pointer that moves there is :meth:`hover`.

        Raises :class:`PromptError` when the lists differ in length; a wrong prompt is raised by
        its task.
        """
        if len(coords_list) != len(labels_list):
            raise PromptError(
                "coords_list and labels_list have one entry for each request; got "
                f"{len(coords_list)} and {len(labels_list)}."
            )
        self._dispatcher.enter()
        embedding = self._core.chosen(embedding)
        session = self._dispatcher.session(session_id)
        return RequestList(
            self._dispatcher.start(
                SessionRequest(session),
                partial(Prompt.create, coords, labels),
                embedding,
                Decoded.low_res,
                timeout_s,
            )
            for coords, labels in zip(coords_list, labels_list, strict=True)
        )

    def cancel_session_requests(self, session_id: str, *, keep_latest: bool = False) -> int:
        """Cancel what waits or runs in a session; the number of requests that this cancelled.

        ``keep_latest``: leave the newest one alone. May be called from any thread.
        """
        return self._dispatcher.ask(
            lambda: self._dispatcher.cancel(session_id, keep_latest=keep_latest)
        )

    def get_session_status(self, session_id: str) -> SessionStatus:
        """What became of the requests of a session; all zero for one that does not exist."""
        return self._dispatcher.status(session_id)

    def cleanup_session(self, session_id: str) -> SessionStatus:
        """Cancel what waits or runs and forget the session; returns what became of it all."""
        return self._dispatcher.ask(lambda: self._dispatcher.forget(session_id))

    async def close(self) -> None:
        """Cancel what the sessions wait for, and give the connections and the image back."""
        self._dispatcher.cancel_all()
        await super().close()

    async def _embedding_of(self, image: ImageSource | Embedding | None) -> Embedding:
        if image is None or isinstance(image, Embedding):
            return self._core.chosen(image)
        return await self.encode(image)


def queue_multiple_requests(
    client: SpeculativeSAM2Client,
    coords_list: Sequence[ArrayLike],
    labels_list: Sequence[ArrayLike],
    session_id: str,
    *,
    embedding: Embedding | None = None,
) -> RequestList:
    """As :meth:`SpeculativeSAM2Client.queue_requests`; awaited, it lets them be sent."""
    return client.queue_requests(coords_list, labels_list, session_id, embedding=embedding)


async def wait_for_latest_result(
    tasks: Sequence[MasksTask], client: SpeculativeSAM2Client, session_id: str
) -> Masks:
    """The newest (masks, iou) of ``tasks``, as ``predict`` returns them.

    Requests that were cancelled or have failed are passed over in favour of the newest that gave
    a result. Older ones that are still under way then are cancelled: nobody waits for them.
    Waiting can be cancelled without cancelling the requests.

    Raises the newest one's error when none gave a result, and :class:`RequestCancelledError` when
    all were cancelled.
    """
    errors: list[BaseException] = []
    for index, task in reversed(list(enumerate(tasks))):
        await asyncio.wait([task])
        if task.cancelled():
            continue
        error = task.exception()
        if error is None:
            for older in tasks[:index]:
                older.cancel()
            return task.result()
        errors.append(error)
    if errors:
        raise errors[0]
    status = client.get_session_status(session_id)
    raise RequestCancelledError(
        f"All {len(tasks)} requests of the session {session_id!r} were cancelled, so there is no "
        f"latest result; its status: {status}."
    )
