"""Masks painted onto a picture."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from .extents import bounding_boxes

# In the order of the prompts; told apart with the usual colour blindnesses.
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
_PREVIEW_SIDE = 1024
_PAPER = (240, 240, 240)


def paint_masks(picture: Image.Image, masks: NDArray[np.bool_], opacity: float) -> None:
    """Lay the masks (B, H, W) on the picture of their size, in place, each in its own colour."""
    for number, mask in enumerate(masks):
        _paint(picture, mask, _PALETTE[number % len(_PALETTE)], opacity)


def preview(picture: Image.Image) -> Image.Image:
    """``picture`` no larger than a notebook shows: the longest side at most 1024 pixels."""
    factor = _reduction(picture.size)
    return picture.reduce(factor) if factor > 1 else picture


def paint_preview(
    shown: Image.Image | None, masks: NDArray[np.bool_], opacity: float
) -> Image.Image:
    """The masks (B, H, W) on ``shown``, the preview of their picture, or on plain paper."""
    height, width = masks.shape[1:]
    factor = _reduction((width, height))
    small = [_shrink(mask, factor) for mask in masks]
    size = (math.ceil(width / factor), math.ceil(height / factor))
    picture = shown.copy() if shown is not None else Image.new("RGB", size, _PAPER)
    paint_masks(picture, np.reshape(small, (len(masks), size[1], size[0])), opacity)
    return picture


def _reduction(size: tuple[int, int]) -> int:
    return math.ceil(max(size) / _PREVIEW_SIDE)


def _shrink(mask: NDArray[np.bool_], factor: int) -> NDArray[np.bool_]:
    """A pixel is in the small mask when half of its share of the large one is."""
    share = Image.fromarray(mask.astype(np.uint8) * 255).reduce(factor)
    return np.asarray(share) > 127


def _paint(
    picture: Image.Image, mask: NDArray[np.bool_], color: tuple[int, int, int], opacity: float
) -> None:
    """Lay one mask on the picture, in place; only the part around the mask is touched."""
    line = max(1.0, min(picture.size) / 400)
    margin = math.ceil(4 * line)
    x1, y1, x2, y2 = (int(edge) for edge in bounding_boxes(mask))
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
