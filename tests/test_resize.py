"""The resize of 8-bit images is torchvision's, value for value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import triton_sam
from triton_sam.images import load_image
from triton_sam.resize import resize_uint8

ASSETS = Path(triton_sam.__file__).parent / "assets"
SIDE = st.one_of(st.integers(1, 40), st.integers(1, 2000))


@pytest.fixture(scope="module")
def torchvision_resize() -> Any:
    from triton_sam.export.torch_compat import prepare_torchvision

    prepare_torchvision()
    import torch
    from torchvision.transforms.v2 import functional

    # Without AVX2 torchvision resizes floats and rounds once.
    assert torch.backends.cpu.get_cpu_capability() != "DEFAULT"

    def resize(plane: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
        # Three channels: a single one takes another path there on some processors.
        tensor = torch.from_numpy(plane.copy()).expand(3, -1, -1)
        first, *others = functional.resize(tensor, list(size), antialias=True).numpy()
        assert all((first == other).all() for other in others)
        return np.asarray(first, np.uint8)

    return resize


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)


@settings(max_examples=150, deadline=None)
@given(source=st.tuples(SIDE, SIDE), target=st.tuples(SIDE, SIDE), seed=st.integers(0, 9))
def test_any_size_to_any_size(
    torchvision_resize: Any, source: tuple[int, int], target: tuple[int, int], seed: int
) -> None:
    plane = noise(*source, seed)
    np.testing.assert_array_equal(resize_uint8(plane, target), torchvision_resize(plane, target))


@pytest.mark.parametrize("size", [(1, 9000), (9000, 1), (3000, 4000), (1008, 7), (20_000, 3)])
def test_long_and_large_images(torchvision_resize: Any, size: tuple[int, int]) -> None:
    plane = noise(*size)
    target = (1008, 1008)
    np.testing.assert_array_equal(resize_uint8(plane, target), torchvision_resize(plane, target))


@pytest.mark.parametrize("value", [0, 255])
def test_extreme_values_stay(torchvision_resize: Any, value: int) -> None:
    plane = np.full((700, 3001), value, np.uint8)
    official = torchvision_resize(plane, (1008, 1008))
    np.testing.assert_array_equal(resize_uint8(plane, (1008, 1008)), official)


@pytest.mark.parametrize("name", ["coffee.jpg", "coins.png"])
@pytest.mark.parametrize("scale", [0.3, 1.0, 3.7])
def test_photos(torchvision_resize: Any, name: str, scale: float) -> None:
    photo = load_image(ASSETS / name)
    photo = photo.resize((round(photo.width * scale), round(photo.height * scale)))
    for channel in np.asarray(photo).transpose(2, 0, 1):
        official = torchvision_resize(channel, (1008, 1008))
        np.testing.assert_array_equal(resize_uint8(channel, (1008, 1008)), official)


def test_a_view_and_the_same_size() -> None:
    plane = noise(30, 40)
    resized = resize_uint8(plane[::2, ::-1], (15, 40))
    assert resized.dtype == np.float32
    np.testing.assert_array_equal(resized, plane[::2, ::-1])
