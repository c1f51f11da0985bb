"""Images that stay encoded on the server: what is sent to its predictor, and how answers are read.

No I/O but for reading the image's file. What the predictor's tensors mean is said in
:mod:`triton_sam.specs.predictor`.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .embedding import Embedding
from .errors import EmbeddingError, ImageError, InferenceError
from .images import ImageSource, check_image, load_image
from .masks import clamp
from .painting import preview
from .predictor.jobs import Priority
from .predictor.masks import MOST_MASKS, mask_name
from .prompts import Prompt
from .protocol import Arrays, Call, Prediction
from .specs import Family
from .specs.predictor import predictor_model

Content: TypeAlias = "bytes | NDArray[np.uint8]"

_IMAGE_OUTPUTS = ("found", "handle", "original_size")
_MASK_OUTPUTS = ("found", "low_res_logits", "iou_predictions")

# Of the masks that were answered last: the server keeps about as many, of all clients together.
_NOTED = 256
# Every so manieth value tells masks apart well enough to ask for one by name.
_STRIDE = 61


@dataclass(frozen=True, eq=False)
class ServerEmbedding(Embedding):
    """An encoded image that lies on the server; ``digest`` is its handle there.

    ``content``: the image as it was sent. A server that has forgotten it is sent it again.
    ``max_pixels``: as the client's.
    """

    content: Content = b""
    tenant_key: bytes = b""
    max_pixels: int = 0

    def to_bytes(self, *, float16: bool = False) -> bytes:
        raise EmbeddingError(
            "This embedding lies on the server and cannot be saved; one that a client with "
            "embedding='client' made can."
        )

    def preview(self) -> Image.Image:
        """The image as a notebook shows it beneath masks; decoded when it is first looked at."""
        return self._picture

    @cached_property
    def _picture(self) -> Image.Image:
        return preview(load_image(self.content, self.max_pixels))


def read_content(source: ImageSource, max_pixels: int) -> Content:
    """What is sent of an image: its file's own bytes, or HxWx3 uint8 where there is no file.

    Of a file only the head is looked at; the server decodes it. Raises :class:`ImageError` for
    what is no image, too large, or cannot be read.
    """
    if isinstance(source, (np.ndarray, Image.Image)):
        return np.asarray(load_image(source, max_pixels))
    if isinstance(source, (str, os.PathLike)):
        try:
            content = Path(source).read_bytes()
        except OSError as exc:
            raise ImageError(f"Cannot read {os.fspath(source)!r}: {exc.strerror or exc}.") from exc
    else:
        content = bytes(source)
    check_image(content, max_pixels)
    return content


@dataclass(eq=False)
class NotedMasks:
    """Which masks the server may still have, by a glimpse of each answer. Safe to use from threads.

    Naming a mask takes a sixth of a millisecond, so that it is left for those that come back.
    """

    family: Family
    _noted: OrderedDict[int, None] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, handle: str, logits: NDArray[np.float32]) -> None:
        """Remember the masks of an answer, BxMxhxw, not clamped."""
        masks = logits.reshape(-1, logits.shape[-2] * logits.shape[-1])
        if len(masks) > MOST_MASKS:
            return
        glimpses = clamp(masks[:, ::_STRIDE], self.family.prompts.mask_clip)
        with self._lock:
            for glimpse in glimpses:
                self._noted[_key(handle, glimpse)] = None
            while len(self._noted) > _NOTED:
                self._noted.popitem(last=False)

    def names(self, handle: str, masks: NDArray[np.float32] | None) -> list[str] | None:
        """The names of a prompt's masks, (B or 1)x1xhxw, where all of them may be there."""
        if masks is None or len(masks) > MOST_MASKS:
            return None
        keys = self._keys(handle, masks)
        with self._lock:
            if not all(key in self._noted for key in keys):
                return None
        return [mask_name(handle, mask) for mask in masks]

    def forget(self, handle: str, masks: NDArray[np.float32]) -> None:
        """Note that the server does not have them."""
        with self._lock:
            for key in self._keys(handle, masks):
                self._noted.pop(key, None)

    @staticmethod
    def _keys(handle: str, masks: NDArray[np.float32]) -> list[int]:
        return [_key(handle, mask) for mask in masks.reshape(len(masks), -1)[:, ::_STRIDE]]


def _key(handle: str, glimpse: NDArray[np.float32]) -> int:
    return hash((handle, glimpse.tobytes()))


def find_call(family: Family, handle: str) -> Call:
    """Ask whether the server has an image."""
    inputs = {"image_handle": _text(handle.encode())}
    return Call(predictor_model(family).name, inputs, _IMAGE_OUTPUTS)


def send_call(family: Family, content: Content, tenant_key: bytes) -> Call:
    """Have the server encode an image."""
    inputs = _image_inputs(content, tenant_key)
    return Call(predictor_model(family).name, inputs, _IMAGE_OUTPUTS)


def read_found(
    family: Family,
    variant: str,
    content: Content,
    tenant_key: bytes,
    max_pixels: int,
    arrays: Arrays,
) -> ServerEmbedding | None:
    """The answer to either; ``None`` when the server does not have the image."""
    if not bool(arrays["found"][0]):
        return None
    height, width = (int(side) for side in arrays["original_size"])
    (handle,) = arrays["handle"]
    return ServerEmbedding(
        {},
        (height, width),
        bytes(handle).decode(),
        family.name,
        variant,
        content=content,
        tenant_key=tenant_key,
        max_pixels=max_pixels,
    )


def click_call(
    family: Family,
    embedding: ServerEmbedding,
    prompt: Prompt,
    priority: Priority,
    again: bool = False,
    mask_names: Sequence[str] | None = None,
) -> Call:
    """Ask for the masks of B prompts; ``again``: send the image too, which the server forgot.

    ``mask_names``: sent in place of the prompt's masks.
    """
    outputs: tuple[str, ...] = _MASK_OUTPUTS
    inputs: dict[str, NDArray[np.generic]] = {"image_handle": _text(embedding.digest.encode())}
    if again:
        inputs = _image_inputs(embedding.content, embedding.tenant_key)
    if prompt.points.shape[1]:
        inputs |= {"point_coords": prompt.points, "point_labels": prompt.labels}
    if prompt.boxes is not None:
        inputs["boxes"] = prompt.boxes
    if mask_names is not None:
        inputs["mask_id"] = np.array([name.encode() for name in mask_names], np.object_)
        outputs = (*outputs, "mask_found")
    elif prompt.mask is not None:
        inputs["mask_input"] = prompt.mask
    if prompt.multimask:
        inputs["multimask_output"] = np.ones(1, np.bool_)
    if priority is not Priority.CLICK:
        inputs["priority"] = np.array([priority], np.int32)
    return Call(predictor_model(family).name, inputs, outputs)


Missing: TypeAlias = Literal["image", "mask"]


def read_click(family: Family, prompt: Prompt, arrays: Arrays) -> Prediction | Missing:
    """The answer to :func:`click_call`, or what the server has forgotten."""
    if not bool(arrays["found"][0]):
        return "image"
    if "mask_found" in arrays and not bool(arrays["mask_found"][0]):
        return "mask"
    logits = np.asarray(arrays["low_res_logits"], np.float32)
    scores = np.asarray(arrays["iou_predictions"], np.float32)
    count, side = len(prompt.points), family.prompts.mask_size
    if (
        logits.shape[-2:] != (side, side)
        or logits.shape[:2] != scores.shape
        or len(scores) != count
    ):
        raise InferenceError(
            f"The model {predictor_model(family).name!r} answered {count} prompts with logits of "
            f"shape {logits.shape} and scores of shape {scores.shape}."
        )
    return Prediction(logits, scores)


def _image_inputs(content: Content, tenant_key: bytes) -> dict[str, NDArray[np.generic]]:
    key = {"tenant_key": _text(tenant_key)} if tenant_key else {}
    if isinstance(content, bytes):
        return {"encoded_image": _text(content), **key}
    return {"image": content, **key}


def _text(value: bytes) -> NDArray[np.generic]:
    return np.array([value], np.object_)
