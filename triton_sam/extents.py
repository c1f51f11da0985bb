"""Where masks begin and end."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def bounding_boxes(masks: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The box around each of the masks (..., H, W): int64 (..., 4), (x1, y1, x2, y2) in pixels.

    x2 and y2 are one past the last pixel. An empty mask has (0, 0, 0, 0).
    """
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
