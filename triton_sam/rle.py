"""Masks as COCO's compressed run lengths."""

from __future__ import annotations

from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from .errors import MissingExtraError


class RLE(TypedDict):
    """A mask as COCO's tools and JSON files hold it. ``size``: [height, width]."""

    size: list[int]
    counts: str


def to_rle(mask: NDArray[np.bool_]) -> RLE:
    """``mask``, bool HxW, as run lengths of its columns.

    Raises :class:`MissingExtraError` without the extra ``coco``.
    """
    try:
        from pycocotools.mask import encode
    except ImportError as exc:
        raise MissingExtraError(
            "COCO run lengths need the pycocotools package: pip install 'triton-sam[coco]'"
        ) from exc
    encoded = encode(np.asfortranarray(mask, np.uint8))
    return RLE(size=[int(side) for side in encoded["size"]], counts=encoded["counts"].decode())
