"""Images: what is read, what is refused, and the official transform's values."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from triton_sam.errors import ImageError
from triton_sam.images import (
    MAX_IMAGE_PIXELS,
    ImageSource,
    digest,
    load_image,
    preprocess,
    to_encoder_frame,
)
from triton_sam.specs import FAMILIES, Family

SIZES = [
    (640, 480),
    (480, 640),
    (1024, 1024),
    (1800, 1200),
    (300, 2000),
    (1023, 1025),
    (5, 3),
    (1, 1),
    (1, 7),
]


def f32(values: ArrayLike) -> NDArray[np.float32]:
    return np.asarray(values, np.float32)


@pytest.fixture(params=list(FAMILIES.values()), ids=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    found: Family = request.param
    return found


def pixels(width: int = 7, height: int = 5, seed: int = 0) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def test_every_way_in_gives_the_same_pixels(tmp_path: Path) -> None:
    array = pixels()
    image = Image.fromarray(array)
    data = encoded(image)
    path = tmp_path / "ü image.png"
    path.write_bytes(data)

    sources: list[ImageSource] = [
        array,
        image,
        data,
        bytearray(data),
        memoryview(data),
        path,
        str(path),
    ]
    for source in [*sources, np.asfortranarray(array)]:
        loaded = load_image(source)
        assert loaded.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(loaded), array)
    assert len({digest(load_image(source)) for source in sources}) == 1


def test_digest_tells_pixels_and_sizes_apart() -> None:
    black = np.zeros((4, 6, 3), np.uint8)
    other = black.copy()
    other[3, 5, 2] = 1
    images = [load_image(a) for a in (black, other, black.reshape(6, 4, 3))]
    assert len({digest(image) for image in images}) == 3


def test_a_pil_image_is_left_as_it_was() -> None:
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    load_image(image)
    assert image.mode == "RGBA"
    rgb = Image.new("RGB", (4, 4))
    load_image(rgb).putpixel((0, 0), (1, 2, 3))
    assert rgb.getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = pixels(6, 4)
    undo: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, exif=exif)
    np.testing.assert_array_equal(np.asarray(load_image(data)), upright)
    np.testing.assert_array_equal(np.asarray(load_image(Image.open(BytesIO(data)))), upright)


def one(color: object, mode: str) -> Image.Image:
    return Image.new(mode, (2, 2), color)  # type: ignore[arg-type]


def palette(transparency: int | None = None) -> bytes:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    return encoded(image) if transparency is None else encoded(image, transparency=transparency)


def sixteen(value: int) -> Image.Image:
    return Image.fromarray(np.full((2, 2), value, np.uint16))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (one(77, "L"), (77, 77, 77)),
        (one((77, 255), "LA"), (77, 77, 77)),
        (one((77, 0), "LA"), (255, 255, 255)),
        (one((10, 20, 30, 255), "RGBA"), (10, 20, 30)),
        (one((10, 20, 30, 0), "RGBA"), (255, 255, 255)),
        (one((0, 0, 0, 51), "RGBA"), (204, 204, 204)),
        (one(1, "1"), (255, 255, 255)),
        (one(0, "1"), (0, 0, 0)),
        (palette(), (10, 20, 30)),
        (palette(transparency=1), (255, 255, 255)),
        (palette(transparency=0), (10, 20, 30)),
        (one((10, 20, 30), "RGB").convert("P").convert("PA"), None),
        (encoded(one((9, 9, 9), "RGB"), transparency=(9, 9, 9)), (255, 255, 255)),
        (encoded(one(9, "L"), transparency=9), (255, 255, 255)),
        (one((0, 255, 255, 0), "CMYK"), (255, 0, 0)),
        (one((76, 85, 255), "YCbCr"), (254, 0, 0)),
        (one((0, 255, 255), "HSV"), (255, 0, 0)),
        (sixteen(0), (0, 0, 0)),
        (sixteen(65535), (255, 255, 255)),
        (sixteen(128), (0, 0, 0)),
        (sixteen(129), (1, 1, 1)),
        (sixteen(257 * 100), (100, 100, 100)),
        (encoded(sixteen(257 * 100)), (100, 100, 100)),
        (encoded(sixteen(257 * 100), "TIFF"), (100, 100, 100)),
        (one(65535, "I"), (255, 255, 255)),
    ],
)
def test_modes_become_what_a_person_sees(
    image: Image.Image | bytes, expected: tuple[int, int, int] | None
) -> None:
    loaded = load_image(image)
    assert loaded.mode == "RGB"
    assert expected is None or loaded.getpixel((0, 0)) == expected


def test_cmyk_jpeg_of_adobe_programs_is_not_inverted() -> None:
    # Pillow writes CMYK JPEGs inverted, with Adobe's marker, as those programs do.
    red = load_image(encoded(one((0, 255, 255, 0), "CMYK"), "JPEG", quality=100)).getpixel((0, 0))
    assert isinstance(red, tuple)
    np.testing.assert_allclose(red, (255, 0, 0), atol=3)


def test_grey_array_and_first_frame() -> None:
    grey = load_image(np.full((3, 4), 9, np.uint8))
    assert (grey.size, grey.getpixel((0, 0))) == ((4, 3), (9, 9, 9))
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_image(gif).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "0 bytes"),
        (b"no image at all", "not an image in a known format"),
        ("", "Cannot read ''"),
        ("missing.png", "'missing.png': No such file"),
        ("nul\0byte.png", "damaged or not supported"),
        (".", "directory"),
        (None, "got NoneType"),
        ([[1, 2]], "got list"),
        (np.zeros((4, 4, 3), np.float32), r"uint8.*got float32 of shape \(4, 4, 3\).*astype"),
        (np.zeros((4, 4, 3), bool), "got bool"),
        (np.zeros((4, 4, 4), np.uint8), r"HxWx3.*\(4, 4, 4\)"),
        (np.zeros((3, 4, 5), np.uint8), "channels last"),
        (np.zeros((4,), np.uint8), r"\(4,\)"),
        (np.zeros((0, 4, 3), np.uint8), "empty: 4x0"),
        (np.zeros((4, 0), np.uint8), "empty: 0x4"),
        (Image.new("RGB", (0, 5)), "empty: 0x5"),
        (Image.new("F", (2, 2)), "floating-point"),
        (Image.new("I", (2, 2), 65536), "integers from 65536"),
        (Image.new("I", (2, 2), -1), "integers from -1"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(source: object, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        load_image(source)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_truncated_files_are_refused(format: str, share: float) -> None:
    data = encoded(Image.fromarray(pixels(80, 60)), format)
    with pytest.raises(ImageError):
        load_image(data[: int(len(data) * share)])


def test_size_is_checked_before_decoding() -> None:
    # The pixels of this PNG are missing: only its header can be read.
    header_only = encoded(Image.new("RGB", (100, 100)))[:45]
    with pytest.raises(ImageError, match=r"100x100 = 10000 pixels; the limit is 9999"):
        load_image(header_only, max_pixels=9999)
    for source in (np.zeros((100, 100), np.uint8), Image.new("L", (100, 100))):
        with pytest.raises(ImageError, match="limit is 9999"):
            load_image(source, max_pixels=9999)
    assert load_image(np.zeros((100, 100), np.uint8), max_pixels=10000).size == (100, 100)


@pytest.mark.parametrize("side", [10_000, 20_000])
def test_pillows_own_limit_is_ours_too(side: int) -> None:
    # Above its limit Pillow warns (an error in these tests), above twice that it refuses.
    assert side * side > MAX_IMAGE_PIXELS
    header = bytearray(encoded(Image.new("1", (1, 1))))
    header[16:24] = side.to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    with pytest.raises(ImageError, match=r"PIL\.Image\.MAX_IMAGE_PIXELS"):
        load_image(bytes(header), max_pixels=10**9)


def test_plain_rgb_is_what_the_official_predictor_sees() -> None:
    image = Image.fromarray(pixels(33, 21))
    np.testing.assert_array_equal(np.asarray(load_image(image)), np.array(image.convert("RGB")))


def _official_input(family: Family, image: Image.Image) -> Any:
    """What the official predictor gives its image encoder: normalised, (1, 3, size, size)."""
    from triton_sam.export.torch_compat import prepare_torchvision

    prepare_torchvision()
    import torch

    if family.name == "sam1":
        from segment_anything.modeling import Sam
        from segment_anything.utils.transforms import ResizeLongestSide

        resized = ResizeLongestSide(family.image.size).apply_image(np.asarray(image))
        tensor = torch.as_tensor(resized).permute(2, 0, 1)[None]

        class Official:
            preprocess = Sam.preprocess
            pixel_mean = torch.tensor([123.675, 116.28, 103.53]).reshape(3, 1, 1)
            pixel_std = torch.tensor([58.395, 57.12, 57.375]).reshape(3, 1, 1)
            image_encoder = SimpleNamespace(img_size=family.image.size)

        return Official().preprocess(tensor).numpy()
    if family.name == "sam2":
        from sam2.utils.transforms import SAM2Transforms

        return SAM2Transforms(family.image.size, 0.0)(np.array(image))[None].numpy()
    from transformers import Sam3ImageProcessor

    return Sam3ImageProcessor()(image, return_tensors="pt")["pixel_values"].numpy()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_preprocess_agrees_with_the_official_transform(
    size: tuple[int, int], family: Family
) -> None:
    spec = family.image
    image = Image.fromarray(pixels(*size))
    ours = preprocess(image, spec)
    assert ours.dtype == np.float32 and ours.shape == (1, 3, spec.size, spec.size)
    if spec.normalise_in_graph:
        mean, std = (f32(values).reshape(3, 1, 1) for values in (spec.mean, spec.std))
        ours = (ours - mean) / std

    official = _official_input(family, image)
    if not spec.normalise_in_graph:
        np.testing.assert_array_equal(ours, official)
    # Resized values differ by 3e-7 at most, over these sizes and 4000x3000; std is about 0.22.
    assert np.abs(ours - official).max() <= 3e-6


def test_preprocess_keeps_values_and_channels(family: Family) -> None:
    side = family.image.size
    image = Image.new("RGB", (side, side), (255, 51, 0))
    expected = f32([1.0, 51 / 255, 0.0])
    if not family.image.normalise_in_graph:
        expected = (expected - f32(family.image.mean)) / f32(family.image.std)
    np.testing.assert_array_equal(preprocess(image, family.image)[0, :, 7, 9], expected)


def test_padding_is_the_mean_colour() -> None:
    spec = FAMILIES["sam1"].image
    ours = preprocess(Image.new("RGB", (200, 100), "white"), spec)[0]
    assert (ours[:, :512] == 1).all()
    # Exactly 0 after the graph has taken the mean away.
    assert (ours[:, 512:] == f32(spec.mean)[:, None, None]).all()


def test_points_move_as_in_the_official_transform(family: Family) -> None:
    from triton_sam.export.torch_compat import prepare_torchvision

    prepare_torchvision()
    import torch
    from sam2.utils.transforms import SAM2Transforms
    from segment_anything.utils.transforms import ResizeLongestSide

    size = (1201, 1807)
    points = np.random.default_rng(0).uniform(0, 1200, (500, 2)).astype(np.float32)
    ours = to_encoder_frame(points, size, family.image)
    if family.image.fit == "pad":
        official = ResizeLongestSide(family.image.size).apply_coords(points, size)
        np.testing.assert_array_equal(ours, official.astype(np.float32))
    else:
        transforms = SAM2Transforms(family.image.size, 0.0)
        moved = transforms.transform_coords(torch.from_numpy(points), True, size)
        np.testing.assert_array_equal(ours, moved.numpy())


@given(
    width=st.integers(1, 20_000),
    height=st.integers(1, 20_000),
    x=st.floats(0, 1, width=32),
    y=st.floats(0, 1, width=32),
)
def test_points_round_trip(width: int, height: int, x: float, y: float) -> None:
    point = np.array([x * width, y * height], np.float32)
    for family in FAMILIES.values():
        there = to_encoder_frame(point, (height, width), family.image)
        assert there.dtype == np.float32
        scaled = np.array(family.image.scaled_size((height, width))[::-1])
        assert (there >= 0).all() and (there <= scaled * (1 + 1e-6)).all()
        back = there.astype(np.float64) / scaled * (width, height)
        np.testing.assert_allclose(back, point, rtol=3e-7, atol=1e-30)
