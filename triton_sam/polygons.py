"""Masks as polygons."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from .errors import MissingExtraError
from .extents import bounding_boxes

# Of each part: its rings one after another, and where each begins, with the end.
_Filled: TypeAlias = "tuple[list[NDArray[np.float64]], list[NDArray[np.uint32]]]"


class Polygon(NamedTuple):
    """One connected part of a mask. All rings are float64 Nx2, (x, y) in pixels, not closed.

    Pixel i reaches from i to i + 1, so coordinates are 0 to width and 0 to height, and a pixel's
    centre is at i + 0.5. ``outer``: around the part. ``holes``: around what is cut out of it.
    """

    outer: NDArray[np.float64]
    holes: tuple[NDArray[np.float64], ...]


def to_polygons(mask: NDArray[np.bool_]) -> list[Polygon]:
    """The outlines of ``mask``, bool HxW: they run halfway between pixels inside and outside.

    The pixels whose centres lie in the polygons, and not in their holes, are those of the mask.
    Corners are cut by half a pixel. Pixels that touch at a corner only are apart. Raises
    :class:`MissingExtraError` without the extra ``polygons``.
    """
    try:
        from contourpy import FillType, contour_generator
    except ImportError as exc:
        raise MissingExtraError(
            "Polygons need the contourpy package: pip install 'triton-sam[polygons]'"
        ) from exc
    x1, y1, x2, y2 = (int(edge) for edge in bounding_boxes(mask))
    # A rim of background closes the outlines at the edges of the image.
    inside = np.pad(mask[y1:y2, x1:x2], 1).astype(np.float64)
    # Grid position 0 is the centre of the rim's pixels, half a pixel before the box.
    traced = contour_generator(z=inside, fill_type=FillType.OuterOffset)
    parts, offsets = cast("_Filled", traced.filled(0.5, 2.0))
    shift = np.array([x1 - 0.5, y1 - 0.5])
    return [_polygon(part + shift, ends) for part, ends in zip(parts, offsets, strict=True)]


def _polygon(points: NDArray[np.float64], offsets: NDArray[np.integer]) -> Polygon:
    outer, *holes = (_corners(points[start:end]) for start, end in pairwise(offsets))
    return Polygon(outer, tuple(holes))


def _corners(closed: NDArray[np.float64]) -> NDArray[np.float64]:
    """The ring without its repeated end and without the points on straight lines.

    All coordinates are multiples of a half, so the comparison is exact.
    """
    ring = closed[:-1]
    before = ring - np.roll(ring, 1, axis=0)
    after = np.roll(ring, -1, axis=0) - ring
    turns = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    corners: NDArray[np.float64] = ring[turns]
    return corners
