"""What all transports have in common: retries, deadlines, errors, and who is ready."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

from ..errors import ClientClosedError, InvalidInputError, ModelNotReadyError, ServerError
from ..flow import Deadline, Exchange, Flow, Pause, run, run_async
from ..protocol import Arrays, Call, Served
from .endpoint import Endpoint
from .failures import foreign_errors, given_up, may_be_repeated
from .options import TransportOptions
from .requests import Describe, Infer, IsReady, ListReady, Memory, Request

logger = logging.getLogger(__name__)


class Transport(Protocol):
    """What a client needs of the way to a server. Safe to use from several threads.

    ``embedding="shared-memory"`` also needs :meth:`TritonTransport.memory`.
    """

    def infer(self, call: Call, timeout_s: float | None = None) -> Arrays:
        """The requested outputs by name. Raises a :class:`ServerError`."""

    def served(self, model: str, timeout_s: float | None = None) -> Served:
        """What ``model`` declares. Raises a :class:`ServerError`."""

    def check_ready(self, models: Sequence[str], timeout_s: float | None = None) -> None:
        """Raise the :class:`ServerError` that says why the server or a model is not ready."""

    def close(self) -> None:
        """Give the connections back."""


class AsyncTransport(Protocol):
    """What an async client needs of the way to a server. Belongs to one event loop."""

    async def infer(self, call: Call, timeout_s: float | None = None) -> Arrays:
        """As :meth:`Transport.infer`. Over gRPC cancelling it reaches the server."""

    async def served(self, model: str, timeout_s: float | None = None) -> Served:
        """As :meth:`Transport.served`."""

    async def check_ready(self, models: Sequence[str], timeout_s: float | None = None) -> None:
        """As :meth:`Transport.check_ready`."""

    async def close(self) -> None:
        """Give the connections back."""


class Exchanges:
    """What is asked of a server, in which order and how often; no I/O.

    The other side of these flows is a function from a request and its timeout in seconds to the
    answer. It may raise anything.
    """

    def __init__(self, endpoint: Endpoint, options: TransportOptions) -> None:
        self.endpoint = endpoint
        self.options = options
        self.closed = False

    def infer(self, call: Call, timeout_s: float | None) -> Flow[Arrays]:
        return self._naming_models(timeout_s, partial(self._tried, Infer(call)))

    def served(self, model: str, timeout_s: float | None) -> Flow[Served]:
        return self._naming_models(timeout_s, partial(self._tried, Describe(model)))

    def memory(self, request: Memory, timeout_s: float | None) -> Flow[Any]:
        timeout_s = self.options.timeout_s if timeout_s is None else timeout_s
        deadline = Deadline(timeout_s)
        with foreign_errors(self.endpoint, timeout_s):
            return (yield from self._asked(request, deadline))

    def check_ready(self, models: Sequence[str], timeout_s: float | None) -> Flow[None]:
        """One look at each model, without retries: who asks will ask again."""
        return self._naming_models(timeout_s, partial(self._ready, models))

    def _ready(self, models: Sequence[str], timeout_s: float, deadline: Deadline) -> Flow[None]:
        for model in models:
            with foreign_errors(self.endpoint, timeout_s, model):
                if not (yield from self._asked(IsReady(model), deadline)):
                    raise ModelNotReadyError(
                        f"The model {model!r} at {self.endpoint.address} is not ready."
                    )

    def _tried(self, request: Infer | Describe, timeout_s: float, deadline: Deadline) -> Flow[Any]:
        pauses = self.options.retries.pauses()
        with foreign_errors(self.endpoint, timeout_s, request.model):
            while True:
                try:
                    return (yield from self._asked(request, deadline))
                except Exception as exc:
                    pause = next(pauses, None)
                    if (
                        pause is None
                        or pause >= (deadline.left() or 0)
                        or not may_be_repeated(exc, idempotent=not isinstance(request, Infer))
                    ):
                        raise
                    logger.info("%s: %s; again in %.2f s", self.endpoint.address, exc, pause)
                yield Pause(pause)

    def _asked(self, request: Request, deadline: Deadline) -> Flow[Any]:
        left = deadline.left()
        self._refuse_closed()
        try:
            return (yield Exchange(lambda send: send(request, left)))
        except Exception as exc:
            # Closing ends what is under way, each library with an error of its own.
            self._refuse_closed()
            raise given_up(exc, deadline) from exc.__cause__

    def _naming_models(
        self, timeout_s: float | None, flow: Callable[[float, Deadline], Flow[Any]]
    ) -> Flow[Any]:
        """Add what the server serves to an error about a model that it does not serve."""
        timeout_s = self.options.timeout_s if timeout_s is None else timeout_s
        deadline = Deadline(timeout_s)
        try:
            return (yield from flow(timeout_s, deadline))
        except ModelNotReadyError as exc:
            served = yield from self._what_it_serves(timeout_s, deadline)
            raise ModelNotReadyError(f"{exc}{served}") from exc.__cause__

    def _what_it_serves(self, timeout_s: float, deadline: Deadline) -> Flow[str]:
        # A help for the reader only, in the time that is left; servers may refuse to list them.
        with suppress(ServerError), foreign_errors(self.endpoint, timeout_s):
            models = yield from self._asked(ListReady(), deadline)
            return f" It serves: {', '.join(models) or 'nothing'}."
        return ""

    def _refuse_closed(self) -> None:
        if self.closed:
            raise ClientClosedError("This client is closed; make a new one.")


class TritonTransport(ABC):
    """A way to a server for sync code: a subclass moves one request there and back."""

    def __init__(self, endpoint: Endpoint, options: TransportOptions) -> None:
        self._exchanges = Exchanges(endpoint, options)

    def infer(self, call: Call, timeout_s: float | None = None) -> Arrays:
        return run(self._exchanges.infer(call, timeout_s), self._send)

    def served(self, model: str, timeout_s: float | None = None) -> Served:
        return run(self._exchanges.served(model, timeout_s), self._send)

    def check_ready(self, models: Sequence[str], timeout_s: float | None = None) -> None:
        run(self._exchanges.check_ready(models, timeout_s), self._send)

    def memory(self, request: Memory, timeout_s: float | None = None) -> Any:
        """Lend the server memory, or take it back. Raises a :class:`ServerError`."""
        return run(self._exchanges.memory(request, timeout_s), self._send)

    def close(self) -> None:
        self._exchanges.closed = True
        self._disconnect()

    @abstractmethod
    def _send(self, request: Request, timeout_s: float) -> Any:
        """The answer to one request. Raises anything."""

    @abstractmethod
    def _disconnect(self) -> None:
        """Give the connections back."""


class AsyncTritonTransport(ABC):
    """A way to a server for async code: a subclass moves one request there and back.

    ``cancels_on_server``: whether cancelling a call takes it out of the server's queue.
    """

    cancels_on_server = False

    def __init__(self, endpoint: Endpoint, options: TransportOptions) -> None:
        self._exchanges = Exchanges(endpoint, options)
        self._loop: asyncio.AbstractEventLoop | None = None

    async def infer(self, call: Call, timeout_s: float | None = None) -> Arrays:
        return await run_async(self._exchanges.infer(call, timeout_s), self._sender())

    async def served(self, model: str, timeout_s: float | None = None) -> Served:
        return await run_async(self._exchanges.served(model, timeout_s), self._sender())

    async def check_ready(self, models: Sequence[str], timeout_s: float | None = None) -> None:
        await run_async(self._exchanges.check_ready(models, timeout_s), self._sender())

    async def memory(self, request: Memory, timeout_s: float | None = None) -> Any:
        """As :meth:`TritonTransport.memory`."""
        return await run_async(self._exchanges.memory(request, timeout_s), self._sender())

    async def close(self) -> None:
        self._exchanges.closed = True
        await self._disconnect()

    def _sender(self) -> Callable[[Request, float], Awaitable[Any]]:
        # Connections belong to the loop that made them; in another one they would hang.
        loop = asyncio.get_running_loop()
        if self._loop not in (None, loop):
            raise InvalidInputError(
                "This client belongs to another event loop: make one client in each loop, "
                "inside the function that asyncio.run is given."
            )
        self._loop = loop
        return self._send

    @abstractmethod
    async def _send(self, request: Request, timeout_s: float) -> Any:
        """The answer to one request. Raises anything."""

    @abstractmethod
    async def _disconnect(self) -> None:
        """Give the connections back."""
