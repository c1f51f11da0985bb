"""Swapping models on a running server: :func:`reload`.

>>> from triton_sam.admin import reload
>>> for done in reload(["sam2_encoder", "sam2_decoder"], "localhost:8000", key):  # doctest: +SKIP
...     print(done.model, done.versions, done.seconds)

Triton loads the new files beside the old model, which answers until they are ready and goes on
answering when they cannot be loaded. For that time both take memory.
"""

from __future__ import annotations

import http.client
import json
import re
import ssl
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from .errors import AdminError, InvalidInputError, ModelNotReadyError
from .server.control import ADMIN_HEADER, KEY_FILE_VARIABLE, KEY_VARIABLE
from .server.diagnosis import unwrapped
from .transport import Endpoint, foreign_errors

_LOAD_FAILED = re.compile(
    r"load failed for model '[^']*': version \d+ is at \w+ state: (.*);", re.S
)
_EXPLICIT = (
    "Start it with `triton-sam serve --model-control explicit`, or with "
    "TRITON_SAM_MODEL_CONTROL=explicit and docker compose"
)


@dataclass(frozen=True)
class Reloaded:
    """A model that was loaded: its name, the versions that are ready, and how long it took."""

    model: str
    versions: tuple[str, ...]
    seconds: float


def reload(
    models: Sequence[str], url: str, key: str | None, *, timeout_s: float = 600.0
) -> Iterator[Reloaded]:
    """Have the server at ``url`` load ``models`` anew, one after the other as they are asked for.

    A model whose files have not changed stays as it is. ``key``: what the server was started
    with. ``timeout_s``: for each model, in seconds.

    Raises :class:`AdminError` when the server refuses: it runs without model control, the key
    is missing or wrong, or the files cannot be loaded; :class:`ModelNotReadyError` when it does
    not know the model; else another :class:`ServerError`, or :class:`InvalidInputError` for an
    address that is not HTTP.
    """
    return map(_Admin(Endpoint.parse(url), key, timeout_s).reload, models)


def ready_models(url: str, key: str | None, *, timeout_s: float = 60.0) -> list[str]:
    """The models that the server at ``url`` serves now; raises what :func:`reload` does."""
    return _Admin(Endpoint.parse(url), key, timeout_s).ready()


class _Admin:
    def __init__(self, endpoint: Endpoint, key: str | None, timeout_s: float) -> None:
        if endpoint.scheme not in ("http", "https"):
            raise InvalidInputError(
                f"Models are reloaded over HTTP, and {endpoint.scheme}://{endpoint.address} is "
                "gRPC. Give the HTTP address, such as http://localhost:8000."
            )
        self._endpoint = endpoint
        self._key = key
        self._timeout_s = timeout_s

    def reload(self, model: str) -> Reloaded:
        started = time.perf_counter()
        status, message = self._post(f"repository/models/{quote(model, safe='')}/load")
        if status != http.client.OK:
            raise self._refusal(model, status, message)
        seconds = time.perf_counter() - started
        return Reloaded(model, self._versions(model), seconds)

    def ready(self) -> list[str]:
        return [entry["name"] for entry in self._index()]

    def _index(self) -> list[dict[str, str]]:
        status, text = self._post("repository/index")
        entries = json.loads(text) if status == http.client.OK else []
        return [entry for entry in entries if entry.get("state") == "READY"]

    def _versions(self, model: str) -> tuple[str, ...]:
        ready = [entry for entry in self._index() if entry["name"] == model]
        if not ready:
            raise AdminError(f"{self._where} says that it loaded {model!r}, but it is not ready.")
        return tuple(str(entry["version"]) for entry in ready)

    def _refusal(self, model: str, status: int, message: str) -> AdminError | ModelNotReadyError:
        if status == http.client.FORBIDDEN:
            return AdminError(f"{self._where} {self._key_problem()}")
        if "is not allowed" in message:
            return AdminError(
                f"{self._where} does not load models while it runs (model control mode none). "
                f"{_EXPLICIT}."
            )
        if "failed to poll from model repository" in message:
            return ModelNotReadyError(
                f"{self._where} has no model {model!r} in its repository, or its config.pbtxt "
                "cannot be read; the server's log says more."
            )
        return AdminError(f"{self._where} cannot load {model!r}: {message} {self._left(model)}")

    def _key_problem(self) -> str:
        if self._key is None:
            return f"asks for its admin key: set {KEY_VARIABLE} or {KEY_FILE_VARIABLE}."
        return "has another admin key, or closes these endpoints because it was given none."

    def _left(self, model: str) -> str:
        """What the failed load left behind."""
        status, _ = self._exchange("GET", f"models/{quote(model, safe='')}/ready")
        if status == http.client.OK:
            return "The model that was there goes on answering."
        return "No version of the model is ready."

    @property
    def _where(self) -> str:
        return f"The server at {self._endpoint.address}"

    def _post(self, path: str) -> tuple[int, str]:
        return self._exchange("POST", path)

    def _exchange(self, method: str, path: str) -> tuple[int, str]:
        """One request; the answer's status, and its text or the error message in it."""
        headers = {} if self._key is None else {ADMIN_HEADER: self._key}
        with foreign_errors(self._endpoint, self._timeout_s):
            connection = self._connection()
            try:
                connection.request(method, f"{self._endpoint.path}/v2/{path}", headers=headers)
                response = connection.getresponse()
                text = response.read().decode("utf-8", "replace")
            finally:
                connection.close()
        return response.status, text if response.status == http.client.OK else _message(text)

    def _connection(self) -> http.client.HTTPConnection:
        host, port = self._endpoint.host, self._endpoint.port
        if not self._endpoint.secure:
            return http.client.HTTPConnection(host, port, timeout=self._timeout_s)
        context = ssl.create_default_context()
        return http.client.HTTPSConnection(host, port, timeout=self._timeout_s, context=context)


def _message(text: str) -> str:
    """The message in Triton's error answer; the answer itself where it is from another program."""
    try:
        message = str(json.loads(text)["error"]).strip()
    except (ValueError, KeyError, TypeError):
        message = " ".join(text.split())[:200] or "no message"
    failed = _LOAD_FAILED.match(message)
    message = unwrapped(failed[1]) if failed else message
    return message if message.endswith((".", "!", "?")) else f"{message}."
