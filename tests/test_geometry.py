"""Points, masks and pixels share one frame, for every family and image sizes of any shape."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from triton_sam.images import preprocess, to_encoder_frame
from triton_sam.masks import masks_at
from triton_sam.specs import FAMILIES, Family

Size = tuple[int, int]

EXTREMES = [(1, 1), (8000, 50), (50, 8000), (1, 8000), (8000, 1), (1024, 1024), (1008, 1008)]


def sizes() -> st.SearchStrategy[Size]:
    """(height, width) from 1x1 to 8000x50, either way round."""
    long_side = st.integers(1, 8000)
    both = long_side.flatmap(
        lambda side: st.tuples(st.just(side), st.integers(1, max(1, 400_000 // side)))
    )
    any_size = st.one_of(both, both.map(lambda size: (min(size[1], 8000), size[0])))
    return st.one_of(st.sampled_from(EXTREMES), any_size)


families = pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
unit = st.floats(0, 1, width=32)


def pixel_centres(size: Size, family: Family) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Where the centres of the image's columns and rows lie in the encoder's frame."""
    height, width = size
    x = np.stack([np.arange(width) + 0.5, np.zeros(width)], axis=1).astype(np.float32)
    y = np.stack([np.zeros(height), np.arange(height) + 0.5], axis=1).astype(np.float32)
    return (
        to_encoder_frame(x, size, family.image)[:, 0],
        to_encoder_frame(y, size, family.image)[:, 1],
    )


@families
@given(size=sizes(), at=st.tuples(unit, unit))
def test_points_come_back(family: Family, size: Size, at: tuple[float, float]) -> None:
    height, width = size
    point = np.array([at], np.float32) * np.array([width, height], np.float32)
    framed = to_encoder_frame(point, size, family.image)
    scaled_height, scaled_width = family.image.scaled_size(size)
    back = framed.astype(np.float64) * [width / scaled_width, height / scaled_height]
    np.testing.assert_allclose(back, point, atol=2e-3)
    assert framed.dtype == np.float32 and framed.shape == point.shape
    assert (framed >= 0).all() and (framed <= family.image.size * (1 + 1e-6)).all()


@families
@given(size=sizes())
def test_the_image_fills_its_part_of_the_frame(family: Family, size: Size) -> None:
    height, width = size
    corners = np.array([[0, 0], [width, height]], np.float32)
    framed = to_encoder_frame(corners, size, family.image)
    scaled_height, scaled_width = family.image.scaled_size(size)
    np.testing.assert_allclose(framed, [[0, 0], [scaled_width, scaled_height]], rtol=1e-6)
    assert max(scaled_height, scaled_width) == family.image.size
    assert min(scaled_height, scaled_width) >= 1


@families
@settings(max_examples=40, deadline=None)
@given(size=sizes(), through=st.tuples(unit, unit), angle=st.floats(0, 6.28))
@example(size=(8000, 50), through=(0.5, 0.5), angle=0.7)
@example(size=(50, 8000), through=(0.5, 0.5), angle=0.7)
@example(size=(1, 1), through=(0.2, 0.9), angle=2.0)
def test_masks_come_back(
    family: Family, size: Size, through: tuple[float, float], angle: float
) -> None:
    """A half-plane in the encoder's frame is, in the image, the pixels whose centres it holds."""
    frame, low = family.image.size, family.prompts.mask_size
    scaled_height, scaled_width = family.image.scaled_size(size)
    normal_x, normal_y = np.cos(angle), np.sin(angle)
    offset = normal_x * through[0] * scaled_width + normal_y * through[1] * scaled_height

    centre = (np.arange(low) + 0.5) * frame / low
    logits = normal_x * centre[None, :] + normal_y * centre[:, None] - offset
    masks = masks_at(logits.astype(np.float32)[None, None], size, family.image)

    x, y = pixel_centres(size, family)
    distance = normal_x * x[None, :] + normal_y * y[:, None] - offset
    assert masks.shape == (1, 1, *size) and masks.dtype == np.bool_
    # Linear logits survive interpolation; only in the outermost half cell it repeats the edge.
    cell = frame / low
    clear = np.abs(distance) > 0.5 * cell * (abs(normal_x) + abs(normal_y)) + 0.5
    np.testing.assert_array_equal(masks[0, 0][clear], (distance > 0)[clear])
    inner = (cell <= x) & (x <= scaled_width - cell)
    inner = inner[None, :] & ((cell <= y) & (y <= scaled_height - cell))[:, None]
    inner &= np.abs(distance) > 0.01
    np.testing.assert_array_equal(masks[0, 0][inner], (distance > 0)[inner])


@families
@settings(max_examples=15, deadline=None)
@given(size=sizes(), share=st.floats(0.05, 0.95), vertical=st.booleans())
@example(size=(8000, 50), share=0.3, vertical=True)
@example(size=(8000, 50), share=0.3, vertical=False)
@example(size=(1, 8000), share=0.6, vertical=False)
def test_the_encoder_sees_the_pixel_under_a_point(
    family: Family, size: Size, share: float, vertical: bool
) -> None:
    """White begins in the tensor where the points of white pixels begin."""
    height, width = size
    length = height if vertical else width
    cut = int(share * length)
    line = np.where(np.arange(length) >= cut, 255, 0).astype(np.uint8)
    pixels = np.repeat(line[:, None], width, 1) if vertical else np.repeat(line[None], height, 0)
    tensor = preprocess(Image.fromarray(pixels).convert("RGB"), family.image)[0, 0]

    points = pixel_centres(size, family)[1 if vertical else 0]
    seen = tensor[:, 0] if vertical else tensor[0]
    black = preprocess(Image.new("RGB", (1, 1)), family.image)[0, 0, 0, 0]
    white = preprocess(Image.new("RGB", (1, 1), "white"), family.image)[0, 0, 0, 0]
    scale = points[0] / 0.5  # frame pixels per image pixel
    # The bilinear filter reaches one pixel of the coarser grid to each side.
    reach = max(1.0, scale) + 1
    edge = cut * scale
    at = np.clip(points.astype(np.intp), 0, len(seen) - 1)
    after, before = points > edge + reach, points < edge - reach
    np.testing.assert_allclose(seen[at[after]], white, atol=1e-5)
    np.testing.assert_allclose(seen[at[before]], black, atol=1e-5)
