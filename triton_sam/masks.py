"""Masks: from the decoder's low-resolution logits to what people look at."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .errors import ImageError, InvalidInputError
from .extents import bounding_boxes
from .files import write_atomically
from .images import MAX_IMAGE_PIXELS, ImageSource, load_image
from .painting import paint_masks, paint_preview
from .polygons import Polygon, to_polygons
from .rle import RLE, to_rle
from .specs import ImageSpec

Preview: TypeAlias = "Image.Image | Callable[[], Image.Image] | None"

THRESHOLD = 0.0
"""Logits above it are foreground: ``mask_threshold`` of the official predictors."""

# Floats held at once while a mask is resized: 1 MB, which stays in the processor's cache.
_BLOCK = 1 << 18


def masks_at(
    logits: NDArray[np.float32], size: tuple[int, int], image: ImageSpec
) -> NDArray[np.bool_]:
    """Masks of an image of ``size`` = (height, width), from the decoder's ``logits``.

    ``logits``: float32 (..., h, w), not clamped. Returns bool (..., height, width). Where the
    image was padded, the logits are first brought to the encoder's size and cut to the image, as
    segment_anything's ``Sam.postprocess_masks`` does.
    """
    if image.fit == "stretch":
        return resize_masks(logits, size)
    height, width = image.scaled_size(size)
    flat = logits.reshape(-1, *logits.shape[-2:])
    masks = np.empty((len(flat), *size), np.bool_)
    for low, mask in zip(flat, masks, strict=True):
        framed = resize(low, (image.size, image.size))[:height, :width]
        mask[:] = resize_masks(framed, size)
    return masks.reshape(*logits.shape[:-2], *size)


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


def resize(low: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """One hxw map of logits at ``size`` = (height, width), as :func:`resize_masks` resizes."""
    resized = np.empty(size, np.float32)
    for rows, values in _resized_blocks(low, size):
        resized[rows] = values
    return resized


def clamp(logits: NDArray[np.float32], limit: float | None) -> NDArray[np.float32]:
    """Logits within ±``limit``, as the official predictors that do so return them."""
    if limit is None:
        return logits
    clamped: NDArray[np.float32] = np.clip(logits, np.float32(-limit), np.float32(limit))
    return clamped


def _resized_blocks(
    low: NDArray[np.float32], size: tuple[int, int]
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """The resized hxw logits as blocks of rows: first all columns, then row by row, as torch."""
    height, width = size
    left, right, toward_right = _taps(low.shape[1], width)
    # Not low[:, left], which lies in memory by columns: its rows take ten times as long to read.
    wide = low.take(left, 1) * (1 - toward_right) + low.take(right, 1) * toward_right
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


@dataclass(frozen=True, eq=False, repr=False)
class Segmentation:
    """What B prompts found in one image; M masks each.

    ``masks``: bool BxMxHxW at the image's own size. ``scores``: float32 BxM, the IoU that the
    model expects of each mask. ``logits``: float32 (B, M, h, w) at the decoder's size, clamped as
    ``predict`` returns them; ``logits[:, i:i+1]`` is a ``mask_input`` for the next call.
    ``preview``: the picture as a notebook shows it beneath the masks, at most 1024 pixels wide and
    high, or what makes it; without one the masks are shown alone.
    """

    masks: NDArray[np.bool_]
    scores: NDArray[np.float32]
    logits: NDArray[np.float32]
    preview: Preview = None

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
        return bounding_boxes(self.masks)

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
        paint_masks(picture, self.best(), opacity)
        return picture

    def to_rle(self, *, mask: int | None = None) -> list[RLE]:
        """One mask of each prompt as COCO's compressed run lengths, ready for JSON: B entries.

        ``mask``: which of the prompt's masks; without it the one with the highest score. Needs the
        extra ``coco``. Raises :class:`InvalidInputError` for an index that there is none of, and
        :class:`MissingExtraError`.
        """
        return [to_rle(self._one(prompt, mask)) for prompt in range(len(self.masks))]

    def to_polygons(self, *, mask: int | None = None) -> list[list[Polygon]]:
        """One mask of each prompt as polygons: B lists, each with a polygon for every part.

        See :class:`Polygon` for the coordinates and the holes;
        ``[polygon.outer.ravel().tolist() for polygon in found.to_polygons()[0]]`` is what COCO,
        which knows no holes, calls a segmentation. ``mask`` and the errors: as :meth:`to_rle`,
        with the extra ``polygons``.
        """
        return [to_polygons(self._one(prompt, mask)) for prompt in range(len(self.masks))]

    def __repr__(self) -> str:
        prompts, masks, height, width = self.masks.shape
        scores = ", ".join(f"{score:.2f}" for score in self.scores.max(axis=1, initial=0)[:8])
        return (
            f"Segmentation(prompts={prompts}, masks={masks}, size={width}x{height}, "
            f"best scores=[{scores}{', …' if prompts > 8 else ''}])"
        )

    def _repr_png_(self) -> bytes:
        """What a notebook shows: the best masks over the preview."""
        data = BytesIO()
        shown = self.preview() if callable(self.preview) else self.preview
        paint_preview(shown, self.best(), opacity=0.45).save(data, "PNG")
        return data.getvalue()

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
