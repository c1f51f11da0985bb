"""Masks: from the decoder's low-resolution logits to what people look at."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from .errors import ImageError, InvalidInputError
from .files import write_atomically
from .images import MAX_IMAGE_PIXELS, ImageSource, load_image

THRESHOLD = 0.0
"""Logits above it are foreground: ``mask_threshold`` of the official predictors."""

# Colours of overlays, in the order of the prompts; told apart with the usual colour blindnesses.
_PALETTE = (
    (30, 144, 255),
    (255, 140, 26),
    (46, 204, 113),
    (232, 62, 140),
    (245, 197, 24),
    (155, 93, 229),
    (0, 194, 199),
    (239, 68, 68),
)

# Floats held at once while a mask is resized: 1 MB, which stays in the processor's cache.
_BLOCK = 1 << 18


def resize_masks(logits: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Masks at ``size`` = (height, width): resized logits above :data:`THRESHOLD`.

    ``logits``: float32 (..., h, w). Returns bool (..., height, width). The values are those of
    ``torch.nn.functional.interpolate(mode="bilinear", align_corners=False)``; only a block of
    rows exists as floats at a time.
    """
    flat = logits.reshape(-1, *logits.shape[-2:])
    masks = np.empty((len(flat), *size), np.bool_)
    for low, mask in zip(flat, masks, strict=True):
        for rows, values in _resized_blocks(low, size):
            np.greater(values, THRESHOLD, out=mask[rows])
    return masks.reshape(*logits.shape[:-2], *size)


def clamp(logits: NDArray[np.float32], limit: float) -> NDArray[np.float32]:
    """Logits within ±``limit``, as the official predictors return low-resolution masks."""
    clamped: NDArray[np.float32] = np.clip(logits, np.float32(-limit), np.float32(limit))
    return clamped


def _resized_blocks(
    low: NDArray[np.float32], size: tuple[int, int]
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """The resized hxw logits as blocks of rows: first all columns, then row by row, as torch."""
    height, width = size
    left, right, toward_right = _taps(low.shape[1], width)
    wide = low[:, left] * (1 - toward_right) + low[:, right] * toward_right
    top, bottom, down = _taps(low.shape[0], height)
    step = max(1, _BLOCK // width)
    for start in range(0, height, step):
        rows = slice(start, start + step)
        weight = down[rows, None]
        values = wide[top[rows]]
        values *= 1 - weight
        lower = wide[bottom[rows]]
        lower *= weight
        values += lower
        yield rows, values


def _taps(
    source: int, target: int
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """For each of ``target`` positions: its two neighbours and the weight of the second.

    ATen's ``area_pixel_compute_source_index``: float32, multiplied and added in one rounding.
    """
    scale = np.float64(np.float32(source) / np.float32(target))
    position = np.maximum(scale * (np.arange(target) + 0.5) - 0.5, 0).astype(np.float32)
    first = np.minimum(position.astype(np.intp), source - 1)
    second = np.minimum(first + 1, source - 1)
    return first, second, np.clip(position - first.astype(np.float32), 0, 1)


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What B prompts found in one image; M masks each.

    ``masks``: bool BxMxHxW at the image's own size. ``scores``: float32 BxM, the IoU that the
    model expects of each mask. ``logits``: float32 (B, M, h, w) at the decoder's size, clamped as
    ``predict`` returns them; ``logits[:, i:i+1]`` is a ``mask_input`` for the next call.
    """

    masks: NDArray[np.bool_]
    scores: NDArray[np.float32]
    logits: NDArray[np.float32]

    def best(self) -> NDArray[np.bool_]:
        """The mask with the highest score of each prompt: bool BxHxW."""
        rows = np.arange(len(self.masks))
        chosen: NDArray[np.bool_] = self.masks[rows, self.scores.argmax(axis=1)]
        return chosen

    @cached_property
    def area(self) -> NDArray[np.int64]:
        """Pixels in each mask: int64 BxM."""
        return np.asarray(np.count_nonzero(self.masks, axis=(2, 3)), np.int64)

    @cached_property
    def bbox(self) -> NDArray[np.int64]:
        """The box around each mask: int64 BxMx4, (x1, y1, x2, y2) in pixels.

        x2 and y2 are one past the last pixel, so a box can be given back as a prompt and
        ``mask[y1:y2, x1:x2]`` holds the whole mask. An empty mask has (0, 0, 0, 0).
        """
        return _bbox(self.masks)

    def to_png(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        prompt: int = 0,
        mask: int | None = None,
    ) -> bytes:
        """One mask as a grey PNG, 0 and 255, at the image's size; written to ``path`` if given.

        ``mask``: which of the prompt's masks; without it the one with the highest score.
        Raises :class:`InvalidInputError` for an index that there is none of.
        """
        data = BytesIO()
        Image.fromarray(self._one(prompt, mask).astype(np.uint8) * 255).save(data, "PNG")
        if path is not None:
            write_atomically(Path(path), data.getvalue())
        return data.getvalue()

    def overlay(self, image: ImageSource, *, opacity: float = 0.45) -> Image.Image:
        """The image with the best mask of each prompt: a translucent fill and an outline.

        ``image``: the one that was segmented, in any form that ``set_image`` takes.
        ``opacity``: of the fill, 0 to 1. Raises :class:`ImageError` when the sizes differ.
        """
        height, width = self.masks.shape[2:]
        # Its size is known to be right for a mask, whatever the limit was then.
        picture = load_image(image, max_pixels=max(height * width, MAX_IMAGE_PIXELS))
        if picture.size != (width, height):
            raise ImageError(
                f"The masks belong to an image of {width}x{height} pixels; "
                f"got one of {picture.width}x{picture.height}."
            )
        for number, mask in enumerate(self.best()):
            _paint(picture, mask, _PALETTE[number % len(_PALETTE)], opacity)
        return picture

    def _one(self, prompt: int, mask: int | None) -> NDArray[np.bool_]:
        prompts, masks = self.masks.shape[:2]
        if not 0 <= prompt < prompts:
            raise InvalidInputError(f"There is no prompt {prompt}; they are 0 to {prompts - 1}.")
        if mask is None:
            mask = int(self.scores[prompt].argmax())
        if not 0 <= mask < masks:
            raise InvalidInputError(f"There is no mask {mask}; they are 0 to {masks - 1}.")
        chosen: NDArray[np.bool_] = self.masks[prompt, mask]
        return chosen


def _bbox(masks: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(x1, y1, x2, y2) around each of the masks (..., H, W)."""
    x1, x2 = _extent(np.asarray(masks.any(axis=-2)))
    y1, y2 = _extent(np.asarray(masks.any(axis=-1)))
    return np.stack([x1, y1, x2, y2], axis=-1)


def _extent(lines: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First true position and one past the last along the last axis; 0 and 0 without any."""
    length = lines.shape[-1]
    found = lines.any(axis=-1)
    first = lines.argmax(axis=-1)
    end = np.where(found, length - lines[..., ::-1].argmax(axis=-1), 0)
    return first.astype(np.int64), end.astype(np.int64)


def _paint(
    picture: Image.Image, mask: NDArray[np.bool_], color: tuple[int, int, int], opacity: float
) -> None:
    """Lay one mask on the picture, in place; only the part around the mask is touched."""
    line = max(1.0, min(picture.size) / 400)
    margin = math.ceil(4 * line)
    x1, y1, x2, y2 = (int(edge) for edge in _bbox(mask))
    if x1 == x2:
        return
    box = (
        max(0, x1 - margin),
        max(0, y1 - margin),
        min(picture.width, x2 + margin),
        min(picture.height, y2 + margin),
    )
    part = mask[box[1] : box[3], box[0] : box[2]]
    soft = Image.fromarray(part.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(line))
    from_edge = np.abs(np.asarray(soft, np.float32) / 255 - 0.5)
    # One sigma from the edge 0.16 or 0.84 is left: a line two sigma wide, on a halo of three.
    outline = np.clip(0.5 + (0.34 - from_edge) * 4 * line, 0, 1)
    halo = np.clip(0.5 + (0.43 - from_edge) * 8 * line, 0, 1)
    picture.paste((255, 255, 255), box, _alpha(halo * 0.8))
    picture.paste(color, box, _alpha(np.maximum(outline, part * opacity)))


def _alpha(share: NDArray[np.floating]) -> Image.Image:
    return Image.fromarray((share * 255).round().astype(np.uint8))
