"""A transport that notes how long each call took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..protocol import Arrays, Call, Served
from ..transport import Transport
from ..transport.requests import Memory


@dataclass(frozen=True)
class Exchange:
    """One call: the model that was called and the seconds from its call to its answer."""

    model: str
    seconds: float


class TimedTransport:
    """Another transport, and the exchanges that went over it since :meth:`take`."""

    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self._exchanges: list[Exchange] = []

    def infer(self, call: Call, timeout_s: float | None = None) -> Arrays:
        """As the transport beneath."""
        started = time.perf_counter()
        try:
            return self._inner.infer(call, timeout_s)
        finally:
            self._exchanges.append(Exchange(call.model, time.perf_counter() - started))

    def take(self) -> list[Exchange]:
        """The exchanges since the last time they were taken."""
        taken, self._exchanges = self._exchanges, []
        return taken

    def served(self, model: str, timeout_s: float | None = None) -> Served:
        """As the transport beneath."""
        return self._inner.served(model, timeout_s)

    def check_ready(self, models: Sequence[str], timeout_s: float | None = None) -> None:
        """As the transport beneath."""
        self._inner.check_ready(models, timeout_s)

    def memory(self, request: Memory, timeout_s: float | None = None) -> Any:
        """As the transport beneath."""
        inner: Any = self._inner  # not every transport has it
        return inner.memory(request, timeout_s)

    def close(self) -> None:
        """As the transport beneath."""
        self._inner.close()
