"""A request to the predictor as it came, read and checked; an answer as it goes back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInputError
from .jobs import Priority

Arrays = dict[str, NDArray[Any]]

Kind = Literal["invalid", "unknown", "busy", "late", "cancelled", "failed"]

_PROMPTS = ("point_coords", "boxes", "mask_input", "mask_id")
FULL_SIZE = frozenset({"masks_rle", "masks_bits"})


class PredictorError(Exception):
    """A request that is not answered. ``kind``: what kind of reason there was."""

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, eq=False)
class Request:
    """What came: ``inputs`` by name, the ``outputs`` to send back, and how to answer.

    ``reply`` is called once, from any thread, with the outputs or an error.
    """

    inputs: Mapping[str, NDArray[Any]]
    outputs: frozenset[str]
    reply: Callable[[Arrays | PredictorError], None]
    is_cancelled: Callable[[], bool] = lambda: False

    @property
    def content(self) -> bytes | NDArray[np.uint8] | None:
        """The image itself: a file's bytes or pixels; ``None`` where a handle stands for it."""
        file, pixels = self.inputs.get("encoded_image"), self.inputs.get("image")
        if file is not None and pixels is not None:
            raise InvalidInputError("A request has one image: encoded_image or image, not both.")
        return pixels if file is None else text(file, "encoded_image")

    @property
    def handle(self) -> str | None:
        given = self.inputs.get("image_handle")
        return None if given is None else text(given, "image_handle").decode(errors="replace")

    @property
    def tenant_key(self) -> bytes:
        given = self.inputs.get("tenant_key")
        return b"" if given is None else text(given, "tenant_key")

    @property
    def priority(self) -> Priority:
        value = self._number("priority", Priority.CLICK)
        try:
            return Priority(value)
        except ValueError:
            known = ", ".join(f"{p.value} ({p.name.lower()})" for p in Priority)
            raise InvalidInputError(f"priority is one of {known}; got {value}.") from None

    @property
    def seconds(self) -> float:
        """How long an answer is of use."""
        if "deadline_ms" not in self.inputs:
            return float("inf")
        value = self._number("deadline_ms", 0)
        if value <= 0:
            raise InvalidInputError(f"deadline_ms must be greater than 0; got {value}.")
        return value / 1e3

    @property
    def prompts(self) -> dict[str, Any]:
        """The arguments of ``Prompt.create``; empty when nothing is asked about the image."""
        if not any(name in self.inputs for name in (*_PROMPTS, "point_labels")):
            return {}
        return {
            "point_coords": self.inputs.get("point_coords"),
            "point_labels": self.inputs.get("point_labels"),
            "box": self.inputs.get("boxes"),
            "mask_input": self.inputs.get("mask_input"),
            "multimask_output": bool(self._number("multimask_output", 0)),
        }

    @property
    def mask_names(self) -> list[str]:
        """The names that stand for ``mask_input``; none where there is no ``mask_id``."""
        given = self.inputs.get("mask_id")
        if given is None:
            return []
        if "mask_input" in self.inputs:
            raise InvalidInputError(
                "A request has one mask prompt: mask_input or mask_id, not both."
            )
        if given.size == 0:
            raise InvalidInputError("mask_id is empty; leave it out instead.")
        return [bytes(name).decode(errors="replace") for name in given.reshape(-1)]

    def check_counts(self, max_prompts: int, max_points: int, max_clicks: int) -> None:
        """Raise :class:`InvalidInputError` for more prompts, points, or points of one prompt."""
        points, masks = self.inputs.get("point_coords"), self.inputs.get("mask_input")
        boxes, names = self.inputs.get("boxes"), self.inputs.get("mask_id")
        if points is not None and points.size // 2 > max_points:
            raise InvalidInputError(
                f"point_coords has {points.size // 2} points; a request takes {max_points}."
            )
        if points is not None and points.ndim > 1 and points.shape[-2] > max_clicks:
            raise InvalidInputError(
                f"A prompt has {points.shape[-2]} points; one takes {max_clicks}."
            )
        for array, axes in ((points, 3), (boxes, 2), (masks, 3), (names, 1)):
            if array is not None and array.ndim >= axes and len(array) > max_prompts:
                raise InvalidInputError(
                    f"The request has {len(array)} prompts; one takes {max_prompts}."
                )

    @property
    def takes_long(self) -> bool:
        """Whether something is asked for that takes a while to make from the logits."""
        return bool(self.outputs & {*FULL_SIZE, "mask_ids"})

    def _number(self, name: str, default: int) -> int:
        given = self.inputs.get(name)
        if given is None:
            return default
        if given.size != 1:
            raise InvalidInputError(f"{name} is one value; got {given.size}.")
        return int(given.reshape(-1)[0])


def text(array: NDArray[Any], name: str) -> bytes:
    """The one value of a BYTES tensor."""
    if array.size != 1:
        raise InvalidInputError(f"{name} is one value; got {array.size}.")
    value = array.reshape(-1)[0]
    return value if isinstance(value, bytes) else bytes(value)


def image_outputs(found: bool, handle: str, size: tuple[int, int]) -> Arrays:
    """What every answer says of the image."""
    return {
        "found": np.array([found]),
        "handle": np.array([handle.encode()], object),
        "original_size": np.array(size, np.int32),
    }
