"""Limits that a caller sets."""

from __future__ import annotations

import math
from typing import TypeVar

from ..errors import InvalidInputError

_Number = TypeVar("_Number", int, float)


def positive(name: str, value: _Number) -> _Number:
    """``value``, if it is a finite number above zero; else :class:`InvalidInputError`."""
    if not (math.isfinite(value) and value > 0):
        raise InvalidInputError(f"{name} must be above 0; got {value}.")
    return value
