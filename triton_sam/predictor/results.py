"""What the decoder said, in the forms that were asked for."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..masks import THRESHOLD, masks_at
from ..protocol import Prediction
from ..rle import to_rle
from ..specs import Family
from .messages import FULL_SIZE, Arrays


def prediction_outputs(
    family: Family,
    prediction: Prediction,
    size: tuple[int, int],
    outputs: frozenset[str],
) -> Arrays:
    """Those of ``outputs`` that follow from masks and scores; ``size``: of the image."""
    logits = prediction.logits
    arrays: Arrays = {}
    if "iou_predictions" in outputs:
        arrays["iou_predictions"] = prediction.scores
    if "low_res_logits" in outputs:
        arrays["low_res_logits"] = logits
    if "low_res_bits" in outputs:
        arrays["low_res_bits"] = _bits(logits > THRESHOLD)
    if outputs & FULL_SIZE:
        masks = masks_at(logits, size, family.image)
        if "masks_rle" in outputs:
            arrays["masks_rle"] = _run_lengths(masks)
        if "masks_bits" in outputs:
            arrays["masks_bits"] = _bits(masks)
    return arrays


def empty_outputs(family: Family, outputs: frozenset[str], names: tuple[str, ...]) -> Arrays:
    """The same outputs, ``names`` among them, with nothing in them."""
    side = family.prompts.mask_size
    shapes = {
        "iou_predictions": (0, 0),
        "low_res_logits": (0, 0, side, side),
        "low_res_bits": (0, 0, side * side // 8),
        "masks_bits": (0, 0, 0),
        "masks_rle": (0, 0),
        "mask_ids": (0, 0),
        **dict.fromkeys(names, (0, 1)),
    }
    texts = {"masks_rle": np.object_, "mask_ids": np.object_}
    types = {"low_res_bits": np.uint8, "masks_bits": np.uint8, **texts}
    return {
        name: np.zeros(shape, types.get(name, np.float32))
        for name, shape in shapes.items()
        if name in outputs
    }


def _bits(masks: NDArray[np.bool_]) -> NDArray[np.uint8]:
    return np.packbits(masks.reshape(*masks.shape[:2], -1), axis=-1)


def _run_lengths(masks: NDArray[np.bool_]) -> NDArray[np.object_]:
    counts = np.empty(masks.shape[:2], np.object_)
    for index in np.ndindex(*counts.shape):
        counts[index] = to_rle(masks[index])["counts"].encode()
    return counts
