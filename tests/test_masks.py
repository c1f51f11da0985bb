"""Masks: torch's interpolation, and what a Segmentation tells."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from triton_sam.errors import ImageError, InvalidInputError
from triton_sam.masks import Segmentation, clamp, masks_at, resize_masks
from triton_sam.specs import FAMILIES

SIZES = [
    (300, 400),
    (1000, 257),
    (256, 256),
    (255, 1024),
    (200, 100),
    (7, 5),
    (1, 1),
    (1, 300),
    (999, 1),
]


def f32(values: ArrayLike) -> NDArray[np.float32]:
    return np.asarray(values, np.float32)


def logits(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 12, shape).astype(np.float32)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_masks_are_those_of_torch(size: tuple[int, int]) -> None:
    import torch

    low = logits(2, 3, 256, 256)
    official = torch.nn.functional.interpolate(
        torch.from_numpy(low), size, mode="bilinear", align_corners=False
    ).numpy()

    masks = resize_masks(low, size)

    assert masks.shape == (2, 3, *size) and masks.dtype == np.bool_
    differ = masks != (official > 0)
    # float32 rounding: the values differ by at most 8e-6, so only zeros may fall to either side.
    assert np.abs(official[differ]).max(initial=0) < 1e-5
    assert differ.mean() < 1e-5


@pytest.mark.parametrize("size", [(300, 400), (1000, 257), (255, 1024), (1, 300)], ids=str)
def test_masks_of_a_padded_image_are_those_of_segment_anything(size: tuple[int, int]) -> None:
    from triton_sam.export.torch_compat import prepare_torchvision

    prepare_torchvision()
    import torch
    from segment_anything.modeling import Sam

    image = FAMILIES["sam1"].image
    low = logits(2, 3, 256, 256)
    frame = SimpleNamespace(image_encoder=SimpleNamespace(img_size=image.size))
    official = Sam.postprocess_masks(
        frame, torch.from_numpy(low), image.scaled_size(size), size
    ).numpy()

    masks = masks_at(low, size, image)

    assert masks.shape == (2, 3, *size) and masks.dtype == np.bool_
    differ = masks != (official > 0)
    assert np.abs(official[differ]).max(initial=0) < 1e-5
    assert differ.mean() < 1e-5


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_constant_logits_stay_constant(size: tuple[int, int]) -> None:
    ones = np.ones((1, 1, 256, 256), np.float32)
    assert resize_masks(ones, size).all()
    assert not resize_masks(-ones, size).any()
    assert not resize_masks(0 * ones, size).any()


def test_doubling_by_hand() -> None:
    # Weights 0.25 and 0.75 around each edge: 3 -1 gives 3, 2, 0, -1, and 3 -8 gives 3, .25, ....
    low = f32([[[[3, -1], [3, -8]]]])
    expected = [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]
    np.testing.assert_array_equal(resize_masks(low, (4, 4))[0, 0], np.array(expected, bool))


def test_clamp() -> None:
    np.testing.assert_array_equal(clamp(f32([-40, -3, 32.5]), 32.0), [-32, -3, 32])
    assert clamp(f32([1]), 32.0).dtype == np.float32
    assert clamp(f32([-40]), None) == [-40]


@pytest.fixture
def found() -> Segmentation:
    """Two prompts, two masks each, in an image 40 wide and 30 high."""
    masks = np.zeros((2, 2, 30, 40), bool)
    masks[0, 0, 5:15, 10:30] = True
    masks[0, 1, 0, 0] = True
    masks[1, 1] = True
    scores = f32([[0.9, 0.2], [0.3, 0.8]])
    return Segmentation(masks, scores, np.zeros((2, 2, 256, 256), np.float32))


def test_area_and_bbox(found: Segmentation) -> None:
    np.testing.assert_array_equal(found.area, [[200, 1], [0, 1200]])
    np.testing.assert_array_equal(
        found.bbox, [[[10, 5, 30, 15], [0, 0, 1, 1]], [[0, 0, 0, 0], [0, 0, 40, 30]]]
    )


def test_best(found: Segmentation) -> None:
    np.testing.assert_array_equal(found.best(), found.masks[[0, 1], [0, 1]])


def test_png(found: Segmentation, tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    data = found.to_png(path)
    assert path.read_bytes() == data
    with Image.open(BytesIO(data)) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "L", (40, 30))
        np.testing.assert_array_equal(np.asarray(image), found.masks[0, 0] * np.uint8(255))
    pairs: list[tuple[dict[str, Any], tuple[int, int]]] = [
        ({"prompt": 1}, (1, 1)),
        ({"prompt": 1, "mask": 0}, (1, 0)),
    ]
    for options, mask in pairs:
        with Image.open(BytesIO(found.to_png(**options))) as image:
            np.testing.assert_array_equal(np.asarray(image) > 0, found.masks[mask])


@pytest.mark.parametrize("options", [{"prompt": 2}, {"prompt": -1}, {"mask": 2}, {"mask": -1}])
def test_png_of_nothing(found: Segmentation, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=r"There is no (prompt|mask) -?\d; they are 0 to 1"):
        found.to_png(**options)


def test_overlay_paints_the_masks_and_nothing_else() -> None:
    masks = np.zeros((1, 1, 400, 500), bool)
    masks[0, 0, 100:200, 150:300] = True
    found = Segmentation(masks, np.ones((1, 1), np.float32), np.zeros((1, 1, 4, 4), np.float32))
    image = np.full((400, 500, 3), 100, np.uint8)

    painted = np.asarray(found.overlay(image, opacity=0.5))

    np.testing.assert_array_equal(painted[150, 200], [65, 122, 178])  # half of (30, 144, 255)
    np.testing.assert_array_equal(painted[150, 150], [30, 144, 255])  # the outline
    changed = (painted != image).any(axis=2)
    assert changed[100:200, 150:300].all()
    changed[94:206, 144:306] = False
    assert not changed.any()
    assert (image == 100).all()


def test_overlay_gives_each_prompt_its_color() -> None:
    masks = np.zeros((9, 1, 30, 900), bool)
    for i in range(9):
        masks[i, 0, :, 100 * i + 20 : 100 * i + 80] = True
    found = Segmentation(masks, np.ones((9, 1), np.float32), np.zeros((9, 1, 4, 4), np.float32))
    painted = found.overlay(np.zeros((30, 900, 3), np.uint8))
    colors = [painted.getpixel((100 * i + 50, 15)) for i in range(9)]
    assert len(set(colors)) == 8 and colors[8] == colors[0]


def test_overlay_of_an_empty_mask_changes_nothing() -> None:
    found = Segmentation(
        np.zeros((1, 1, 5, 6), bool), np.ones((1, 1), np.float32), logits(1, 1, 4, 4)
    )
    image = Image.new("RGB", (6, 5), "red")
    assert found.overlay(image).tobytes() == image.tobytes()


def test_overlay_needs_the_same_image(found: Segmentation) -> None:
    with pytest.raises(ImageError, match="40x30 pixels; got one of 30x40"):
        found.overlay(np.zeros((40, 30, 3), np.uint8))
