"""A Segmentation for other tools: run lengths, polygons, notebooks."""

from __future__ import annotations

import json
import sys
import time
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco
from skimage.measure import points_in_poly

from triton_sam.errors import InvalidInputError, MissingExtraError
from triton_sam.masks import Segmentation
from triton_sam.painting import preview
from triton_sam.polygons import Polygon, to_polygons
from triton_sam.rle import to_rle

# pycocotools' own decoder, which only these tests use, warns of numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

MASKS = hnp.arrays(np.bool_, st.tuples(st.integers(1, 12), st.integers(1, 12)))


def segmentation(*masks: NDArray[np.bool_], image: Image.Image | None = None) -> Segmentation:
    """One prompt for each of the masks, each beside an empty one with a lower score."""
    both = np.stack([np.stack([np.zeros_like(mask), mask]) for mask in masks])
    scores = np.tile(np.array([0.25, 0.75], np.float32), (len(masks), 1))
    logits = np.zeros((len(masks), 2, 4, 4), np.float32)
    return Segmentation(both, scores, logits, preview(image) if image else None)


def disc(height: int, width: int, radius: float, hole: float = 0) -> NDArray[np.bool_]:
    y, x = np.ogrid[:height, :width]
    distance = np.hypot(y - height / 2, x - width / 2)
    return (distance <= radius) & (distance >= hole)


def inside_of(centres: NDArray[np.float64], ring: NDArray[np.float64]) -> NDArray[np.bool_]:
    inside: NDArray[np.bool_] = points_in_poly(centres, ring)
    return inside


def filled(polygons: list[Polygon], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """The pixels whose centres lie in the polygons, by scikit-image."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    centres = np.stack([x.ravel(), y.ravel()], axis=1) + 0.5
    inside = np.zeros(len(centres), bool)
    for polygon in polygons:
        part = inside_of(centres, polygon.outer)
        for hole in polygon.holes:
            part &= ~inside_of(centres, hole)
        inside |= part
    return inside.reshape(shape)


# Run lengths


def test_run_lengths_by_hand() -> None:
    # Columns from the left: 1 off, 2 on, 3 off; each as 48 + its length.
    mask = np.array([[0, 1, 0], [1, 0, 0]], bool)
    assert to_rle(mask) == {"size": [2, 3], "counts": "123"}


@given(MASKS)
def test_run_lengths_are_what_coco_reads(mask: NDArray[np.bool_]) -> None:
    rle = json.loads(json.dumps(to_rle(mask)))
    np.testing.assert_array_equal(coco.decode(rle), mask)
    assert coco.area(rle) == mask.sum()


def test_run_lengths_of_each_prompt() -> None:
    found = segmentation(disc(30, 40, 8), disc(30, 40, 5))
    for number, radius in enumerate((8, 5)):
        np.testing.assert_array_equal(coco.decode(found.to_rle()[number]), disc(30, 40, radius))
    assert [coco.area(rle) for rle in found.to_rle(mask=0)] == [0, 0]
    x, y, width, height = coco.toBbox(found.to_rle()[0])
    assert [x, y, x + width, y + height] == found.bbox[0, 1].tolist()
    with pytest.raises(InvalidInputError, match="There is no mask 2; they are 0 to 1"):
        found.to_rle(mask=2)


# Polygons


def test_polygons_by_hand() -> None:
    mask = np.zeros((6, 9), bool)
    mask[1:4, 2:7] = True
    mask[2, 4] = False
    (polygon,) = to_polygons(mask)
    corners = {(2.0, 1.5), (2.5, 1), (6.5, 1), (7, 1.5), (7, 3.5), (6.5, 4), (2.5, 4), (2, 3.5)}
    assert {tuple(corner) for corner in polygon.outer.tolist()} == corners
    (hole,) = polygon.holes
    assert {tuple(corner) for corner in hole.tolist()} == {(4, 2.5), (4.5, 2), (5, 2.5), (4.5, 3)}


@given(MASKS)
def test_polygons_hold_the_pixels_of_the_mask(mask: NDArray[np.bool_]) -> None:
    polygons = to_polygons(mask)
    np.testing.assert_array_equal(filled(polygons, mask.shape), mask)
    for polygon in polygons:
        for ring in (polygon.outer, *polygon.holes):
            assert len(ring) >= 4
            assert ((ring >= 0) & (ring <= mask.shape[::-1])).all()


def test_polygons_reach_the_edges_of_the_image() -> None:
    (polygon,) = to_polygons(np.ones((3, 5), bool))
    assert (polygon.outer.min(axis=0).tolist(), polygon.outer.max(axis=0).tolist()) == (
        [0, 0],
        [5, 3],
    )
    assert len(polygon.outer) == 8


def test_polygons_of_nothing() -> None:
    assert to_polygons(np.zeros((4, 4), bool)) == []
    assert segmentation(np.zeros((4, 4), bool)).to_polygons() == [[]]


def test_polygons_of_a_ring_agree_with_coco() -> None:
    found = segmentation(disc(300, 400, 120, hole=40), disc(300, 400, 20))
    (ring,), (spot,) = found.to_polygons()
    assert len(ring.holes) == 1 and len(spot.holes) == 0
    flat = [polygon.outer.ravel().tolist() for polygon in found.to_polygons()[1]]
    drawn = coco.decode(coco.merge(coco.frPyObjects(flat, 300, 400))).astype(bool)
    expected = disc(300, 400, 20)
    assert (drawn & expected).sum() / (drawn | expected).sum() > 0.98


def test_polygons_of_a_large_mask_are_quick() -> None:
    mask = disc(2000, 3000, 900, hole=300)
    started = time.perf_counter()
    (polygon,) = to_polygons(mask)
    assert time.perf_counter() - started < 5
    assert len(polygon.outer) < 9000 and len(polygon.holes) == 1


@pytest.mark.parametrize(
    ("package", "extra"), [("pycocotools.mask", "coco"), ("contourpy", "polygons")]
)
def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    found = segmentation(disc(9, 9, 3))
    with pytest.raises(MissingExtraError, match=rf"pip install 'triton-sam\[{extra}\]'"):
        found.to_rle() if extra == "coco" else found.to_polygons()


# Notebooks


def shown(found: Segmentation) -> NDArray[np.uint8]:
    with Image.open(BytesIO(found._repr_png_())) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def test_a_notebook_shows_the_overlay() -> None:
    picture = Image.new("RGB", (400, 300), (200, 30, 30))
    found = segmentation(disc(300, 400, 90), image=picture)
    np.testing.assert_array_equal(shown(found), np.asarray(found.overlay(picture)))


def test_a_notebook_shows_large_images_small() -> None:
    picture = Image.new("RGB", (4000, 3001), (200, 30, 30))
    found = segmentation(disc(3001, 4000, 900), image=picture)
    pixels = shown(found)
    assert pixels.shape == (751, 1000, 3)
    assert pixels[10, 10].tolist() == [200, 30, 30]
    blue = pixels[375, 500].astype(int)
    assert blue[2] > blue[0]
    painted = (pixels != [200, 30, 30]).any(axis=2).mean()
    assert painted == pytest.approx(disc(751, 1000, 228).mean(), rel=0.02)
    assert picture.size == (4000, 3001)


def test_a_notebook_shows_masks_without_a_picture() -> None:
    pixels = shown(segmentation(disc(300, 400, 90), np.zeros((300, 400), bool)))
    assert pixels.shape == (300, 400, 3)
    assert pixels[5, 5].tolist() == [240, 240, 240]
    assert pixels[150, 200].tolist() != [240, 240, 240]


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (1025, 1024)], ids=str)
def test_a_notebook_shows_any_size(size: tuple[int, int]) -> None:
    picture = Image.new("RGB", size[::-1])
    assert max(shown(segmentation(np.ones(size, bool), image=picture)).shape[:2]) <= 1024


def test_the_text_form_is_one_line() -> None:
    text = repr(segmentation(disc(30, 40, 8), disc(30, 40, 5)))
    assert text == "Segmentation(prompts=2, masks=2, size=40x30, best scores=[0.75, 0.75])"
