"""Prompts: what the caller points at, checked, in pixels of the original image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import PromptError
from .specs import PromptLayout

FOREGROUND, BACKGROUND = 1, 0


@dataclass(frozen=True, eq=False)
class Prompt:
    """B independent prompts for one image.

    ``points``: float32 BxNx2, (x, y) in pixels of the original image. ``labels``: float32 BxN:
    1 foreground, 0 background, -1 padding. ``boxes``: float32 Bx4, (x1, y1, x2, y2) in the same
    frame. ``mask``: float32 (B, 1, side, side) logits, or (1, 1, side, side) for all.
    ``multimask``: three masks for each prompt instead of one.
    """

    points: NDArray[np.float32]
    labels: NDArray[np.float32]
    boxes: NDArray[np.float32] | None
    mask: NDArray[np.float32] | None
    multimask: bool

    @classmethod
    def create(
        cls,
        point_coords: ArrayLike | None = None,
        point_labels: ArrayLike | None = None,
        box: ArrayLike | None = None,
        mask_input: ArrayLike | None = None,
        multimask_output: object = False,
        *,
        original_size: tuple[int, int],
        layout: PromptLayout,
    ) -> Prompt:
        """Check the arguments of ``predict`` against each other and the image (height, width).

        Points must lie in the image, its edges included. Boxes are clipped to it. The
        coordinates of padding points are ignored.

        Raises :class:`PromptError` naming what was expected and what came.
        """
        if not isinstance(multimask_output, (bool, np.bool_)):
            raise PromptError(f"multimask_output must be True or False; got {multimask_output!r}.")
        clicks = _clicks(point_coords, point_labels, original_size, layout.pad_label)
        boxes = None if box is None else _boxes(box, original_size)
        mask = None if mask_input is None else _mask(mask_input, layout.mask_size)
        batch = _batch(clicks, boxes, mask)
        if clicks is None:
            clicks = np.zeros((batch, 0, 2), np.float32), np.zeros((batch, 0), np.float32)
        elif boxes is None and mask is None:
            _refuse_padding_alone(clicks[1], layout.pad_label)
        return cls(*clicks, boxes, mask, bool(multimask_output))

    def split(self) -> list[Prompt]:
        """The same prompts one by one."""
        return [self.rows(slice(i, i + 1)) for i in range(len(self.points))]

    def rows(self, rows: slice) -> Prompt:
        """Some of the prompts."""
        mask = self.mask if self.mask is None or len(self.mask) == 1 else self.mask[rows]
        boxes = None if self.boxes is None else self.boxes[rows]
        return replace(
            self, points=self.points[rows], labels=self.labels[rows], boxes=boxes, mask=mask
        )

    @classmethod
    def join(cls, prompts: Sequence[Prompt]) -> Prompt:
        """One after the other: prompts of one image without masks and with equally many points."""
        first = prompts[0]
        if len(prompts) == 1:
            return first
        boxes = [prompt.boxes for prompt in prompts if prompt.boxes is not None]
        return replace(
            first,
            points=np.concatenate([prompt.points for prompt in prompts]),
            labels=np.concatenate([prompt.labels for prompt in prompts]),
            boxes=np.concatenate(boxes) if boxes else None,
        )


def _array(value: ArrayLike, name: str) -> NDArray[np.generic]:
    try:
        return np.asarray(value)
    except ValueError as exc:
        raise PromptError(
            f"{name} must be an array of numbers; its rows differ in length."
        ) from exc


def _numbers(value: ArrayLike, name: str, kinds: str = "iuf") -> NDArray[np.float32]:
    array = _array(value, name)
    if array.size == 0:
        raise PromptError(f"{name} is empty, of shape {array.shape}; leave it out instead.")
    if array.dtype.kind not in kinds:
        raise PromptError(f"{name} must be an array of numbers; got dtype {array.dtype}.")
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def _clicks(
    coords: ArrayLike | None, labels: ArrayLike | None, size: tuple[int, int], pad_label: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    if coords is None and labels is None:
        return None
    if coords is None or labels is None:
        missing = "point_coords" if coords is None else "point_labels"
        raise PromptError(f"point_coords and point_labels come together; {missing} is missing.")
    points = _numbers(coords, "point_coords")
    if points.ndim not in (2, 3) or points.shape[-1] != 2:
        raise PromptError(f"point_coords must be Nx2, or BxNx2; got shape {points.shape}.")
    marks = _labels(labels, points.shape[:-1], pad_label)
    points[marks == pad_label] = 0
    _check_inside(points, size)
    return points.reshape(-1, *points.shape[-2:]), marks.reshape(-1, marks.shape[-1])


def _labels(value: ArrayLike, shape: tuple[int, ...], pad_label: int) -> NDArray[np.float32]:
    labels = _numbers(value, "point_labels", kinds="biuf")
    if labels.shape != shape:
        raise PromptError(
            f"point_labels must have one label per point: shape {shape} for point_coords of shape "
            f"{(*shape, 2)}; got {labels.shape}."
        )
    bad = labels[~np.isin(labels, (FOREGROUND, BACKGROUND, pad_label))]
    if bad.size:
        hint = " Pass boxes with box=." if bad[0] in (2, 3) else ""
        raise PromptError(
            f"point_labels are {FOREGROUND} (foreground), {BACKGROUND} (background) or "
            f"{pad_label} (padding); got {bad[0]:g}.{hint}"
        )
    return labels


def _check_inside(points: NDArray[np.float32], size: tuple[int, int]) -> None:
    height, width = size
    if not np.isfinite(points).all():
        raise PromptError("point_coords must be finite; got NaN or infinity.")
    outside = ((points < 0) | (points > (width, height))).any(axis=-1)
    if outside.any():
        x, y = points[outside][0]
        raise PromptError(
            f"The point ({x:g}, {y:g}) lies outside the image of {width}x{height} pixels. "
            "Points are (x, y) in pixels of the original image."
        )


def _boxes(value: ArrayLike, size: tuple[int, int]) -> NDArray[np.float32]:
    boxes = _numbers(value, "box")
    if boxes.ndim not in (1, 2) or boxes.shape[-1] != 4:
        raise PromptError(f"box must be (x1, y1, x2, y2), or Bx4; got shape {boxes.shape}.")
    if not np.isfinite(boxes).all():
        raise PromptError("box must be finite; got NaN or infinity.")
    boxes = boxes.reshape(-1, 4)
    _refuse(
        boxes,
        (boxes[:, 0] > boxes[:, 2]) | (boxes[:, 1] > boxes[:, 3]),
        "has its corners in the wrong order; a box is (x1, y1, x2, y2) with x1 < x2 and y1 < y2.",
    )
    height, width = size
    clipped = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
    _refuse(
        boxes,
        (clipped[:, 0] >= clipped[:, 2]) | (clipped[:, 1] >= clipped[:, 3]),
        f"covers nothing of the image of {width}x{height} pixels.",
    )
    return clipped


def _refuse(boxes: NDArray[np.float32], bad: NDArray[np.bool_], why: str) -> None:
    if bad.any():
        raise PromptError(f"The box ({', '.join(f'{v:g}' for v in boxes[bad][0])}) {why}")


def _mask(value: ArrayLike, side: int) -> NDArray[np.float32]:
    array = _array(value, "mask_input")
    expected = f"{side}x{side}, 1x{side}x{side} or Bx1x{side}x{side}"
    if array.dtype.kind != "f":
        raise PromptError(
            f"mask_input must hold float logits, as predict returns them; got dtype {array.dtype}."
        )
    one = array.shape in ((side, side), (1, side, side))
    if not one and (array.ndim != 4 or array.shape[0] < 1 or array.shape[1:] != (1, side, side)):
        raise PromptError(
            f"mask_input must be {expected}; got shape {array.shape}. Of several masks for one "
            "prompt choose one: masks[:, i:i+1]."
        )
    logits = _numbers(array, "mask_input").reshape(-1, 1, side, side)
    if not np.isfinite(logits).all():
        raise PromptError("mask_input must be finite; got NaN or infinity.")
    return logits


def _batch(
    clicks: tuple[NDArray[np.float32], NDArray[np.float32]] | None,
    boxes: NDArray[np.float32] | None,
    mask: NDArray[np.float32] | None,
) -> int:
    """The number of prompts. One mask serves all prompts, as in the official predictor."""
    counts = {} if clicks is None else {"point_coords": len(clicks[0])}
    if boxes is not None:
        counts["box"] = len(boxes)
    if mask is not None and (len(mask) > 1 or not counts):
        counts["mask_input"] = len(mask)
    if not counts:
        raise PromptError("Give point_coords with point_labels, box, mask_input, or several.")
    if len(set(counts.values())) > 1:
        given = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise PromptError(f"The numbers of prompts differ: {given}.")
    return next(iter(counts.values()))


def _refuse_padding_alone(labels: NDArray[np.float32], pad_label: int) -> None:
    empty = (labels == pad_label).all(axis=1)
    if empty.any():
        raise PromptError(
            f"Prompt {int(empty.argmax())} has only padding points (label {pad_label}); "
            "give it a point, a box or a mask."
        )
