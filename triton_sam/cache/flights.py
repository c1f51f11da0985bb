"""Single flight: of several callers that want the same thing, one does the work."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Hashable
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from ..errors import ClientClosedError, ServerTimeoutError

if TYPE_CHECKING:
    from collections.abc import Iterator

_T = TypeVar("_T")


class _AbandonedError(Exception):
    """The caller that did the work stopped, for a reason that is only its own."""


@dataclass(eq=False)
class _Flight(Generic[_T]):
    """Work in progress: the thread of the caller that does it, how many others wait for it."""

    future: Future[_T] = field(default_factory=Future)
    results: list[_T] = field(default_factory=list)
    thread: int = field(default_factory=threading.get_ident)
    waiting: int = 0

    def __post_init__(self) -> None:
        # A waiter that is cancelled must not cancel what the others wait for.
        self.future.set_running_or_notify_cancel()


class Flights(Generic[_T]):
    """Work under way, by key. Threads and tasks of any event loop wait for one another."""

    def __init__(self) -> None:
        self._flights: dict[Hashable, _Flight[_T]] = {}
        self._lock = threading.Lock()
        self._shared = 0

    @property
    def shared(self) -> int:
        """How many callers were given what another one worked out."""
        return self._shared

    def under_way(self) -> list[_Flight[_T]]:
        """The work in progress."""
        with self._lock:
            return list(self._flights.values())

    def run(self, key: Hashable, work: Callable[[], _T], timeout_s: float | None = None) -> _T:
        """The result of ``work()``, or of the same work that another caller has begun.

        Its error is everybody's. When the one who works is interrupted, cancelled, closed or at
        the end of its own ``timeout_s``, the next one takes over. Raises
        :class:`ServerTimeoutError` after ``timeout_s`` seconds of waiting for another.
        """
        end = _end(timeout_s)
        while True:
            flight, leads = self._join(key)
            if leads:
                with self._leading(key, flight, timeout_s):
                    flight.results.append(work())
                return flight.results[0]
            if flight.thread == threading.get_ident():
                return work()  # a task of this very thread leads; waiting here would stop it
            if not wait([flight.future], timeout=_left(end)).done:
                raise _too_long(timeout_s)
            try:
                return self._share(flight.future.result())
            except _AbandonedError:
                continue

    async def run_async(
        self, key: Hashable, work: Callable[[], Awaitable[_T]], timeout_s: float | None = None
    ) -> _T:
        """As :meth:`run`, for work that is awaited."""
        end = _end(timeout_s)
        while True:
            flight, leads = self._join(key)
            if leads:
                with self._leading(key, flight, timeout_s):
                    flight.results.append(await work())
                return flight.results[0]
            landed = asyncio.wrap_future(flight.future)
            try:
                done, _ = await asyncio.wait([landed], timeout=_left(end))
            finally:
                landed.cancel()  # for nobody looks at it any more, unless it is done
            if not done:
                raise _too_long(timeout_s)
            try:
                return self._share(landed.result())
            except _AbandonedError:
                continue

    def _join(self, key: Hashable) -> tuple[_Flight[_T], bool]:
        with self._lock:
            leads = key not in self._flights
            flight = self._flights.setdefault(key, _Flight())
            flight.waiting += not leads
            return flight, leads

    @contextmanager
    def _leading(
        self, key: Hashable, flight: _Flight[_T], timeout_s: float | None
    ) -> Iterator[None]:
        """Whatever happens inside, the flight ends and its waiters are told."""
        error: BaseException | None = None
        try:
            yield
        except ClientClosedError:
            error = _AbandonedError()
            raise
        except ServerTimeoutError as exc:
            error = exc if timeout_s is None else _AbandonedError()
            raise
        except Exception as exc:
            error = exc
            raise
        except BaseException:  # interrupted, or a cancelled task
            error = _AbandonedError()
            raise
        finally:
            with self._lock:
                del self._flights[key]
            if error is not None:
                flight.future.set_exception(error)
            else:
                flight.future.set_result(flight.results[0])

    def _share(self, result: _T) -> _T:
        with self._lock:
            self._shared += 1
        return result


def _end(timeout_s: float | None) -> float | None:
    return None if timeout_s is None else time.monotonic() + timeout_s


def _left(end: float | None) -> float | None:
    return None if end is None else max(0.0, end - time.monotonic())


def _too_long(timeout_s: float | None) -> ServerTimeoutError:
    return ServerTimeoutError(
        f"No embedding within {timeout_s:g} s: another call still encodes the same image."
    )
