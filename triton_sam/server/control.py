"""Who may do what on a server: model control, and the endpoints that take a key.

Triton compares one header with one value for each group of endpoints. It takes the value on its
command line only, so whoever can list the processes of the server's machine can read the key.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import AdminError

MODES = ("none", "explicit")
"""``none``: the models of the start, for ever. ``explicit``: they can be loaded anew."""

ADMIN_HEADER = "triton-sam-admin"
"""The HTTP header that carries the key. Over gRPC it is ``triton-grpc-protocol-`` + this."""

ADMIN_APIS = ("model-repository", "model-config", "shared-memory", "trace", "logging")
"""What takes the key. Open stay what clients, health checks and benchmarks need, all of it
read-only or inference: ``health``, ``metadata``, ``inference``, ``statistics``."""

KEY_VARIABLE = "TRITON_SAM_ADMIN_KEY"
KEY_FILE_VARIABLE = "TRITON_SAM_ADMIN_KEY_FILE"
MINIMUM_KEY = 16

_MAKE_ONE = "`openssl rand -hex 32` makes one"


def read_key(
    file: str | os.PathLike[str] | None = None, variables: Mapping[str, str] = os.environ
) -> str | None:
    """The admin key, or ``None`` when there is none.

    It is in ``file``, else in the variable ``TRITON_SAM_ADMIN_KEY``, else in the file that
    ``TRITON_SAM_ADMIN_KEY_FILE`` names. An empty file or variable is none. Raises
    :class:`AdminError` for a file that cannot be read and for a key that cannot be used.
    """
    name = file or (None if variables.get(KEY_VARIABLE) else variables.get(KEY_FILE_VARIABLE))
    if name is None:
        text = variables.get(KEY_VARIABLE, "")
    else:
        try:
            text = Path(name).read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise AdminError(f"The key file {os.fspath(name)} cannot be read: {reason}.") from error
    return check_key(text) if text else None


def check_key(key: str) -> str:
    """``key``, if it can be sent as a header and is not guessed at once; else :class:`AdminError`.

    The message does not repeat it.
    """
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise AdminError(
            "The admin key holds spaces or characters that a header cannot carry; expected "
            f"letters, digits and punctuation. {_MAKE_ONE}."
        )
    if len(key) < MINIMUM_KEY:
        raise AdminError(
            f"The admin key has {len(key)} characters, expected {MINIMUM_KEY} or more; {_MAKE_ONE}."
        )
    return key


def check_mode(mode: str, key: str | None) -> None:
    """Raise :class:`AdminError` for an unknown ``mode``, and for ``explicit`` without a key."""
    if mode not in MODES:
        raise AdminError(
            f"The model control mode is {mode!r}, expected {' or '.join(MODES)}. Triton's poll "
            "mode, which loads whatever appears in the folder, is not supported."
        )
    if mode == "explicit" and key is None:
        raise AdminError(
            "Explicit model control needs a key, since whoever may load a model runs code on the "
            f"server: set {KEY_VARIABLE} or {KEY_FILE_VARIABLE}; {_MAKE_ONE}."
        )


def control_flags(mode: str, models: Sequence[str]) -> list[str]:
    """Triton's flags for ``mode``; in ``explicit`` mode ``models`` are those of the start."""
    flags = [f"--model-control-mode={mode}"]
    if mode == "explicit":
        flags += [f"--load-model={name}" for name in models]
    return flags


def restriction_flags(key: str, client_shm: bool = False) -> list[str]:
    """Triton's flags that refuse :data:`ADMIN_APIS` to whoever does not send ``key``.

    ``client_shm``: without that of shared memory, which is for clients then.
    """
    apis = [api for api in ADMIN_APIS if not (client_shm and api == "shared-memory")]
    restriction = f"{','.join(apis)}:{ADMIN_HEADER}={key}"
    return [f"--http-restricted-api={restriction}", f"--grpc-restricted-protocol={restriction}"]
