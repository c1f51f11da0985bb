"""Where a request's time went on the server, from Triton's own statistics."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from typing import Any, Protocol

from ..errors import ServerError
from ..transport import Endpoint, foreign_errors

# Triton counts a request a moment after it has sent the answer.
_SETTLE_S = 0.05
_POLL_S = 0.001


@dataclass(frozen=True)
class Counters:
    """Sums since the server started, over the models of a family; ``_ns`` in nanoseconds.

    ``requests``: answered well. ``request_ns``: from a request's arrival to its answer, of which
    the other four are parts. ``executions``: runs of a model, one for each batch.
    """

    requests: int = 0
    failures: int = 0
    executions: int = 0
    request_ns: int = 0
    queue_ns: int = 0
    input_ns: int = 0
    compute_ns: int = 0
    output_ns: int = 0

    def __add__(self, other: Counters) -> Counters:
        return Counters(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: Counters) -> Counters:
        return Counters(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def seconds(self) -> dict[str, float]:
        """The five durations in seconds: request, queue, input, compute, output."""
        names = [field.name for field in fields(self) if field.name.endswith("_ns")]
        return {name.removesuffix("_ns"): getattr(self, name) / 1e9 for name in names}


class StatisticsSource(Protocol):
    """Something that can be asked for the counters of every model."""

    def read(self) -> Mapping[str, Counters]:
        """The counters by model name. Raises a :class:`ServerError`."""

    def close(self) -> None:
        """Give the connection back."""


def open_statistics(url: str, timeout_s: float = 10.0) -> StatisticsSource:
    """The statistics of the server at ``url``, over the protocol that the address names."""
    endpoint = Endpoint.parse(url)
    if endpoint.grpc:
        return GrpcStatistics(endpoint, timeout_s)
    return HttpStatistics(endpoint, timeout_s)


class HttpStatistics:
    """``GET /v2/models/stats``."""

    def __init__(self, endpoint: Endpoint, timeout_s: float) -> None:
        self._endpoint = endpoint
        self._timeout_s = timeout_s
        kind = http.client.HTTPSConnection if endpoint.secure else http.client.HTTPConnection
        self._connection = kind(endpoint.host, endpoint.port, timeout=timeout_s)

    def read(self) -> Mapping[str, Counters]:
        with foreign_errors(self._endpoint, self._timeout_s):
            return parse(json.loads(self._get()))

    def close(self) -> None:
        """Give the connection back."""
        self._connection.close()

    def _get(self) -> bytes:
        try:
            self._connection.request("GET", f"{self._endpoint.path}/v2/models/stats")
            answer = self._connection.getresponse()
            body = answer.read()
        except BaseException:
            self._connection.close()
            raise
        if answer.status != http.client.OK:
            raise ServerError(f"No statistics from {self._endpoint.address}: {answer.status}.")
        return body


class GrpcStatistics:
    """The ``ModelStatistics`` call."""

    def __init__(self, endpoint: Endpoint, timeout_s: float) -> None:
        import tritonclient.grpc

        self._endpoint = endpoint
        self._timeout_s = timeout_s
        self._client = tritonclient.grpc.InferenceServerClient(
            endpoint.address, ssl=endpoint.secure
        )

    def read(self) -> Mapping[str, Counters]:
        with foreign_errors(self._endpoint, self._timeout_s):
            answer = self._client.get_inference_statistics(
                as_json=True, client_timeout=self._timeout_s
            )
            return parse(answer)

    def close(self) -> None:
        """Give the connection back."""
        self._client.close()


def parse(answer: Mapping[str, Any]) -> dict[str, Counters]:
    """Triton's statistics by model, its versions summed. Over gRPC numbers come as text."""
    found: dict[str, Counters] = {}
    for model in answer.get("model_stats", []):
        name = model["name"]
        found[name] = found.get(name, Counters()) + _counters(model)
    return found


def _counters(model: Mapping[str, Any]) -> Counters:
    stats = model.get("inference_stats", {})

    def number(name: str, unit: str) -> int:
        return int(stats.get(name, {}).get(unit, 0))

    return Counters(
        requests=number("success", "count"),
        failures=number("fail", "count"),
        executions=int(model.get("execution_count", 0)),
        request_ns=number("success", "ns"),
        queue_ns=number("queue", "ns"),
        input_ns=number("compute_input", "ns"),
        compute_ns=number("compute_infer", "ns"),
        output_ns=number("compute_output", "ns"),
    )


class Watch:
    """The counters of one family's models between two moments.

    ``family``: the models counted are those whose names begin with it and an underscore.
    """

    def __init__(self, source: StatisticsSource, family: str) -> None:
        self._source = source
        self._prefix = f"{family}_"
        self._before = Counters()

    def start(self) -> None:
        """Remember the counters of this moment."""
        self._before = self._now()

    def stop(self, expected: int = 1) -> Counters:
        """What was added since :meth:`start`; waits a moment for ``expected`` requests."""
        deadline = time.perf_counter() + _SETTLE_S
        while True:
            added = self._now() - self._before
            if added.requests >= expected or time.perf_counter() > deadline:
                return added
            time.sleep(_POLL_S)

    def close(self) -> None:
        """Give the source's connection back."""
        self._source.close()

    def _now(self) -> Counters:
        models = self._source.read()
        mine = (value for name, value in models.items() if name.startswith(self._prefix))
        return sum(mine, Counters())
