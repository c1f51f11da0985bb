"""Prompts: accepted shapes, and what is refused with which words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from triton_sam.errors import PromptError
from triton_sam.prompts import Prompt
from triton_sam.specs import FAMILIES

SIZE = (100, 200)  # height, width
LAYOUT = next(iter(FAMILIES.values())).prompts
SIDE = LAYOUT.mask_size
NAN, INF = float("nan"), float("inf")


def f32(values: ArrayLike) -> NDArray[np.float32]:
    return np.asarray(values, np.float32)


def create(**given: Any) -> Prompt:
    return Prompt.create(**given, original_size=SIZE, layout=LAYOUT)


def test_points_of_one_prompt() -> None:
    prompt = create(point_coords=[[10, 20], [200, 100]], point_labels=[1, 0])
    np.testing.assert_array_equal(prompt.points, f32([[[10, 20], [200, 100]]]))
    np.testing.assert_array_equal(prompt.labels, f32([[1, 0]]))
    assert prompt.points.dtype == prompt.labels.dtype == np.float32
    assert prompt.boxes is None and prompt.mask is None and prompt.multimask is False


def test_points_of_several_prompts() -> None:
    coords = np.arange(12).reshape(3, 2, 2)
    prompt = create(point_coords=coords, point_labels=[[True, False]] * 3, multimask_output=True)
    np.testing.assert_array_equal(prompt.points, coords.astype(np.float32))
    np.testing.assert_array_equal(prompt.labels, f32([[1, 0]] * 3))
    assert prompt.multimask is True


def test_coordinates_of_padding_are_ignored() -> None:
    prompt = create(point_coords=[[10, 20], [NAN, -5]], point_labels=[1, -1])
    np.testing.assert_array_equal(prompt.points, f32([[[10, 20], [0, 0]]]))
    np.testing.assert_array_equal(prompt.labels, f32([[1, -1]]))


def test_the_callers_array_is_left_alone() -> None:
    coords = f32([[10, 20], [30, 40]])
    create(point_coords=coords, point_labels=[1, -1], box=[1, 2, 3, 4])
    np.testing.assert_array_equal(coords, f32([[10, 20], [30, 40]]))


@pytest.mark.parametrize("box", [[1, 2, 3, 4], [[1, 2, 3, 4]], np.array([1, 2, 3, 4], np.float64)])
def test_one_box(box: Any) -> None:
    prompt = create(box=box)
    np.testing.assert_array_equal(prompt.boxes, f32([[1, 2, 3, 4]]))
    assert prompt.points.shape == (1, 0, 2) and prompt.labels.shape == (1, 0)


def test_boxes_are_clipped_to_the_image() -> None:
    prompt = create(box=[[-5, -5, 10, 10], [150, 50, 300, 101]])
    np.testing.assert_array_equal(prompt.boxes, f32([[0, 0, 10, 10], [150, 50, 200, 100]]))


@pytest.mark.parametrize("shape", [(SIDE, SIDE), (1, SIDE, SIDE), (1, 1, SIDE, SIDE)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_one_mask(shape: tuple[int, ...], dtype: type) -> None:
    logits = np.arange(SIDE * SIDE).reshape(shape) % 61 - 30
    prompt = create(mask_input=logits.astype(dtype))
    assert prompt.mask is not None and prompt.mask.dtype == np.float32
    np.testing.assert_array_equal(prompt.mask, logits.reshape(1, 1, SIDE, SIDE))
    assert prompt.points.shape == (1, 0, 2)


def test_several_masks_alone() -> None:
    assert create(mask_input=np.zeros((3, 1, SIDE, SIDE))).points.shape == (3, 0, 2)


def test_one_mask_serves_all_prompts() -> None:
    prompt = create(
        point_coords=np.zeros((3, 1, 2)), point_labels=np.ones((3, 1)), mask_input=mask()
    )
    assert prompt.mask is not None and prompt.mask.shape == (1, 1, SIDE, SIDE)


def test_boxes_with_points() -> None:
    prompt = create(
        box=np.tile([1, 2, 3, 4], (2, 1)),
        point_coords=np.full((2, 1, 2), 7),
        point_labels=[[1], [-1]],
    )
    assert prompt.boxes is not None and prompt.boxes.shape == (2, 4)
    np.testing.assert_array_equal(prompt.labels, f32([[1], [-1]]))


def mask(value: float = 0.0, *shape: int) -> np.ndarray[Any, Any]:
    return np.full(shape or (SIDE, SIDE), value, np.float32)


def points(*coords: tuple[float, float], **more: Any) -> dict[str, Any]:
    return {"point_coords": coords, "point_labels": [1] * len(coords), **more}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "Give point_coords with point_labels, box, mask_input"),
        ({"point_coords": [[1, 2]]}, "point_labels is missing"),
        ({"point_labels": [1]}, "point_coords is missing"),
        ({"point_coords": [], "point_labels": []}, r"point_coords is empty, of shape \(0,\)"),
        ({"point_coords": np.zeros((0, 2)), "point_labels": []}, "point_coords is empty"),
        ({"point_coords": [1, 2], "point_labels": [1]}, r"Nx2, or BxNx2; got shape \(2,\)"),
        ({"point_coords": [[1, 2, 3]], "point_labels": [1]}, r"got shape \(1, 3\)"),
        ({"point_coords": [[1, 2], [3]], "point_labels": [1]}, "differ in length"),
        ({"point_coords": [["a", "b"]], "point_labels": [1]}, "array of numbers; got dtype <U1"),
        ({"point_coords": [[1, 2]], "point_labels": [1, 0]}, r"\(1,\).*\(1, 2\); got \(2,\)"),
        ({"point_coords": [[[1, 2]]], "point_labels": [1]}, r"\(1, 1\).*got \(1,\)"),
        ({"point_coords": [[1, 2]], "point_labels": [2]}, "got 2. Pass boxes with box="),
        ({"point_coords": [[1, 2]], "point_labels": [3]}, "Pass boxes with box="),
        ({"point_coords": [[1, 2]], "point_labels": [0.5]}, r"got 0\.5\."),
        ({"point_coords": [[1, 2]], "point_labels": [NAN]}, "got nan"),
        ({"point_coords": [[1, 2]], "point_labels": ["1"]}, "got dtype <U1"),
        (
            {"point_coords": [[[1, 2]], [[3, 4]]], "point_labels": [[1], [-1]]},
            "Prompt 1 has only padding",
        ),
        (points((NAN, 2)), "point_coords must be finite"),
        (points((1, INF)), "point_coords must be finite"),
        (points((1e300, 2)), "point_coords must be finite"),
        (points((1, 2), (200.5, 3)), r"\(200\.5, 3\) lies outside the image of 200x100 pixels"),
        (points((1, 100.5)), "lies outside"),
        (points((-0.1, 2)), "lies outside"),
        ({"box": [1, 2, 3]}, r"\(x1, y1, x2, y2\), or Bx4; got shape \(3,\)"),
        ({"box": np.zeros((1, 1, 4))}, r"got shape \(1, 1, 4\)"),
        ({"box": []}, "box is empty"),
        ({"box": [1, 2, NAN, 4]}, "box must be finite"),
        ({"box": [30, 2, 3, 40]}, r"\(30, 2, 3, 40\) has its corners in the wrong order"),
        ({"box": [3, 40, 30, 4]}, "wrong order"),
        ({"box": [201, 2, 210, 40]}, r"covers nothing of the image of 200x100"),
        ({"box": [5, 5, 5, 40]}, "covers nothing"),
        ({"mask_input": mask(0, SIDE, SIDE - 1)}, rf"{SIDE}x{SIDE}.*got shape"),
        ({"mask_input": mask(0, 1, 3, SIDE, SIDE)}, r"masks\[:, i:i\+1\]"),
        ({"mask_input": mask(0, 3, SIDE, SIDE)}, "must be"),
        ({"mask_input": mask() > 0}, "float logits.*got dtype bool"),
        ({"mask_input": mask().astype(np.uint8)}, "got dtype uint8"),
        ({"mask_input": mask(NAN)}, "mask_input must be finite"),
        ({"mask_input": [[1.0], [1.0, 2.0]]}, "differ in length"),
        (points((1, 2), box=[[1, 2, 3, 4]] * 2), "differ: point_coords 1, box 2"),
        (points((1, 2), mask_input=mask(0, 2, 1, SIDE, SIDE)), "point_coords 1, mask_input 2"),
        (points((1, 2), multimask_output=1), "must be True or False; got 1"),
        (points((1, 2), multimask_output=None), "got None"),
    ],
)
def test_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        create(**given)
