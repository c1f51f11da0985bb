"""Foreign errors become ours here and nowhere else."""

from __future__ import annotations

import asyncio
import http.client
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tritonclient.utils import InferenceServerException

from ..errors import (
    InferenceError,
    ModelNotReadyError,
    SamError,
    ServerError,
    ServerTimeoutError,
    ServerUnavailableError,
)
from ..flow import Deadline
from .endpoint import Endpoint

_UNAVAILABLE = ("StatusCode.UNAVAILABLE", "502", "503", "504")
_UNLOADED = ("has no available versions", "is not at ready state")
# What a client cancels raises no error of the server's: there it is the deadline, noticed first.
_CANCELLED = "StatusCode.CANCELLED"
_LATE = ("StatusCode.DEADLINE_EXCEEDED", _CANCELLED)
_INVALID = ("StatusCode.INVALID_ARGUMENT", "400")
# A server notices a deadline at most so much sooner than its client.
_EARLY_S = 0.5
# 502 and 504 are a proxy's: the server behind it may have begun.
_NOT_BEGUN = ("StatusCode.UNAVAILABLE", "503")


class UnsentError(Exception):
    """The connection failed, for its ``__cause__``, before the server had the whole request."""


@contextmanager
def foreign_errors(
    endpoint: Endpoint, timeout_s: float, model: str | None = None
) -> Iterator[None]:
    """Turn whatever a client library or the network raises into a :class:`ServerError`."""
    try:
        yield
    except SamError:
        raise
    except Exception as exc:
        foreign = _unwrapped(exc)
        raise _translated(foreign, endpoint, timeout_s, model) from foreign


def may_be_repeated(exc: BaseException, idempotent: bool) -> bool:
    """Whether the request that failed so can be sent again with nothing running twice.

    ``idempotent``: it only looks something up, so that twice does no harm.
    """
    foreign = _unwrapped(exc)
    if isinstance(foreign, InferenceServerException):
        return str(foreign.status()) in _NOT_BEGUN or _is_unloaded(foreign)
    return _is_lost(foreign) and (idempotent or isinstance(exc, UnsentError))


def given_up(exc: Exception, deadline: Deadline) -> Exception:
    """``exc``, or an unavailable server where it cancelled a call that had time left.

    gRPC says the same of a call that is late and of one that the server ends for reasons of its
    own; the first may be late for good, the second can be asked for again.
    """
    if (
        isinstance(exc, InferenceServerException)
        and str(exc.status()) == _CANCELLED
        and not deadline.is_within(_EARLY_S)
    ):
        why = f"it gave the call up ({exc.message()})"
        exc = InferenceServerException(why, "StatusCode.UNAVAILABLE")
    return exc


def _unwrapped(exc: BaseException) -> BaseException:
    return exc.__cause__ or exc if isinstance(exc, UnsentError) else exc


def _translated(
    exc: BaseException, endpoint: Endpoint, timeout_s: float, model: str | None
) -> ServerError:
    if isinstance(exc, InferenceServerException):
        return _translated_answer(exc, endpoint, timeout_s, model)
    if _is_timeout(exc):
        return _timeout(endpoint, timeout_s)
    if _is_connection_error(exc):
        return _unavailable(endpoint, str(exc) or type(exc).__name__)
    return InferenceError(f"The answer of {endpoint.address} cannot be read: {exc}")


def _translated_answer(
    exc: InferenceServerException, endpoint: Endpoint, timeout_s: float, model: str | None
) -> ServerError:
    status, message = str(exc.status()), str(exc.message())
    if status in _LATE:
        return _timeout(endpoint, timeout_s)
    if _is_unknown_model(exc):
        return ModelNotReadyError(f"The server at {endpoint.address} does not serve {model!r}.")
    if status in _UNAVAILABLE:
        return _unavailable(endpoint, message)
    where = f"The model {model!r}" if model else "The server"
    return InferenceError(
        f"{where} at {endpoint.address} answered with an error: {message}",
        message,
        status in _INVALID,
    )


def _is_unknown_model(exc: InferenceServerException) -> bool:
    return str(exc.message()).startswith("Request for unknown model")


def _is_unloaded(exc: InferenceServerException) -> bool:
    """A model that the server knows and has not loaded now: it stops, and then starts again."""
    message = str(exc.message())
    return _is_unknown_model(exc) and message.endswith(_UNLOADED)


def _is_timeout(exc: BaseException) -> bool:
    return isinstance(exc, (TimeoutError, asyncio.TimeoutError))  # two classes in Python 3.10


def _is_connection_error(exc: BaseException) -> bool:
    aiohttp = sys.modules.get("aiohttp")  # not loaded unless it is in use
    kinds = (OSError, http.client.HTTPException, *([aiohttp.ClientError] if aiohttp else []))
    return isinstance(exc, kinds)


def _is_lost(exc: BaseException) -> bool:
    # A certificate that is refused once is refused again.
    refused = isinstance(exc, ssl.SSLError) or isinstance(exc.__cause__, ssl.SSLError)
    return _is_connection_error(exc) and not _is_timeout(exc) and not refused


def _timeout(endpoint: Endpoint, timeout_s: float) -> ServerTimeoutError:
    # Of a call that takes several exchanges this is what was left for the last one.
    return ServerTimeoutError(
        f"{endpoint.address} gave no answer within {round(timeout_s, 3):g} s."
    )


def _unavailable(endpoint: Endpoint, why: str) -> ServerUnavailableError:
    return ServerUnavailableError(
        f"No Triton server at {endpoint.address}: {why}. "
        "Start one with `triton-sam serve` or `docker compose up`."
    )
