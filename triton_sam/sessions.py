"""Sessions: what became of each request of one user, one tab or one pointer."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SessionStatus:
    """How many requests of a session came to what.

    ``queued``: taken into the session. ``sent``: of these, given to the server.
    ``cancelled_before_execution``: cancelled or replaced by a newer one before they were sent, so
    that the server never saw them. ``dropped``: cancelled after they were sent. Over gRPC the
    server drops those that still wait in its queue (its metrics count them as ``CANCELED``), and
    what it already runs it finishes for nobody; over HTTP it carries all of them out.
    ``executed``: the server's answer came. ``completed``: it was passed on. ``failed``: they ended
    with an error.

    Each request that is not ``pending`` is in exactly one of ``cancelled_before_execution``,
    ``dropped``, ``completed`` and ``failed``.
    """

    session_id: str
    queued: int = 0
    sent: int = 0
    cancelled_before_execution: int = 0
    executed: int = 0
    dropped: int = 0
    completed: int = 0
    failed: int = 0

    @property
    def pending(self) -> int:
        """Requests that wait or run."""
        ended = self.cancelled_before_execution + self.dropped + self.completed + self.failed
        return self.queued - ended


class SessionRequest:
    """One request of a session; counts what becomes of it, once."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._sent = False
        self._settled = False
        self.task: asyncio.Task[Any] | None = None
        session.requests[self] = None
        session.count("queued")

    @property
    def pending(self) -> bool:
        """Whether it waits or runs."""
        return not self._settled

    def mark_sent(self) -> None:
        if not self._sent:
            self._sent = True
            self._session.count("sent")

    def mark_executed(self) -> None:
        self._session.count("executed")

    def start(self, task: asyncio.Task[Any]) -> None:
        """``task`` carries it out."""
        self.task = task
        task.add_done_callback(self._done)

    def cancel(self) -> bool:
        """Whether it was still to be cancelled. Takes effect when the event loop goes on."""
        if self.task is not None and self.task.done():
            self._done(self.task)  # its answer came in this very turn of the event loop
        if self._settled:
            return False
        self._settle("dropped" if self._sent else "cancelled_before_execution")
        if self.task is not None:
            self.task.cancel()
        return True

    def _done(self, task: asyncio.Task[Any]) -> None:
        if task.cancelled():
            self._settle("dropped" if self._sent else "cancelled_before_execution")
        else:
            self._settle("completed" if task.exception() is None else "failed")

    def _settle(self, outcome: str) -> None:
        if not self._settled:
            self._settled = True
            self._session.requests.pop(self, None)
            self._session.count(outcome)


class Session:
    """The requests of one session that wait or run, and the count of all."""

    def __init__(self, session_id: str) -> None:
        self.session_id = session_id
        self.requests: dict[SessionRequest, None] = {}  # in the order in which they came
        self.hovering = False
        self._counts: Counter[str] = Counter()

    def count(self, what: str) -> None:
        self._counts[what] += 1

    def cancel(self, *, keep_latest: bool = False) -> int:
        """Cancel what waits or runs, but for the newest if so wanted; how many those were."""
        requests = list(self.requests)
        return sum(request.cancel() for request in requests[: -1 if keep_latest else None])

    def status(self) -> SessionStatus:
        return SessionStatus(self.session_id, **self._counts)
