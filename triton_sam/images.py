"""Images: from what a caller has to the tensor that an encoder takes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import ImageError
from .resize import resize_uint8
from .specs import ImageSpec
from .specs.types import Resize

ImageSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | NDArray[np.uint8]"
)

MAX_IMAGE_PIXELS = 89_478_485
"""Default limit of width times height: the one above which Pillow itself warns."""

_ACCEPTED = "a path, the bytes of an image file, a PIL.Image or an HxWx3 uint8 array in RGB"
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")


def load_image(source: ImageSource, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """The image as a person sees it: upright, 8-bit RGB.

    ``source``: a path, the bytes of an image file, a ``PIL.Image``, or an array, HxWx3 uint8 in
    RGB order or HxW uint8 grey. EXIF orientation is applied, transparency is laid on white,
    16-bit grey is scaled to 8 bits (v / 257, rounded); of an animation the first frame counts.

    The number of pixels is compared with ``max_pixels`` before anything is decoded. Pillow has a
    limit of its own, ``PIL.Image.MAX_IMAGE_PIXELS``: it warns above that and refuses twice as much.

    Raises :class:`ImageError` for what is not an image, is damaged, empty or too large.
    """
    if isinstance(source, np.ndarray):
        _check_array(source)
        _check_size(source.shape[1], source.shape[0], max_pixels)
        return Image.fromarray(np.ascontiguousarray(source)).convert("RGB")
    if isinstance(source, Image.Image):
        return _decode(source, "the PIL image", max_pixels)
    file, name = _file(source)
    with _pillow_errors(name), Image.open(file) as image:
        return _decode(image, name, max_pixels)


def check_image(content: bytes, max_pixels: int) -> None:
    """Raise :class:`ImageError` for bytes whose head is not that of an image within the limit."""
    file, name = _file(content)
    with _pillow_errors(name), Image.open(file) as image:
        _check_size(image.width, image.height, max_pixels)


def preprocess(image: Image.Image, spec: ImageSpec) -> NDArray[np.float32]:
    """The encoder's input: float32 (1, 3, size, size), RGB; ``image`` is 8-bit RGB.

    In [0, 1] where mean and standard deviation are applied inside the encoder's graph, else
    normalised here. The resize is the official predictor's, bilinear and anti-aliased: of floats,
    with no rounding to 8 bits, for SAM 2 (Pillow's mode F applies torchvision's filter, a channel
    at a time; the results differ by less than 1e-6), of 8-bit values for the others.
    """
    size = height, width = spec.scaled_size((image.height, image.width))
    tensor = np.empty((1, 3, spec.size, spec.size), np.float32)
    for channel, (plane, mean, std) in enumerate(zip(tensor[0], spec.mean, spec.std, strict=True)):
        values = _resize(image.getchannel(channel), size, spec.resize)
        if spec.normalise_in_graph:
            np.divide(values, 255, out=plane[:height, :width])
        else:
            # On 0 to 255, as transformers' processors: the bits agree.
            values = values - np.float32(255 * mean)
            np.divide(values, np.float32(255 * std), out=plane[:height, :width])
        padding = mean if spec.normalise_in_graph else 0
        plane[height:] = padding
        plane[:height, width:] = padding
    return tensor


def _resize(channel: Image.Image, size: tuple[int, int], how: Resize) -> NDArray[np.float32]:
    """One channel, 0 to 255, at ``size`` = (height, width)."""
    if how == "torch8":
        return resize_uint8(np.asarray(channel), size)
    source = channel.convert("F") if how == "float" else channel
    return np.asarray(source.resize(size[::-1], Image.Resampling.BILINEAR), np.float32)


def to_encoder_frame(
    coords: NDArray[np.float32], original_size: tuple[int, int], spec: ImageSpec
) -> NDArray[np.float32]:
    """Points in pixels of the original image to pixels of the encoder's input.

    ``coords``: float32 (..., 2), (x, y). ``original_size``: (height, width). The operations are
    those of sam2's ``SAM2Transforms.transform_coords`` for ``stretch`` and of segment_anything's
    ``ResizeLongestSide.apply_coords`` for ``pad``, so the bits agree.
    """
    height, width = original_size
    if spec.fit == "stretch":
        relative = np.divide(coords, np.array([width, height], np.float32))
        framed: NDArray[np.float32] = np.multiply(relative, np.float32(spec.size))
        return framed
    scaled_height, scaled_width = spec.scaled_size(original_size)
    scale = np.array([scaled_width / width, scaled_height / height])
    return np.asarray(coords * scale, np.float32)


def digest(image: Image.Image) -> str:
    """A name for the pixels of an RGB image: equal for equal pixels, however they were loaded."""
    seen = hashlib.sha256(f"{image.width}x{image.height}:".encode())
    seen.update(image.tobytes())
    return seen.hexdigest()


def _file(source: object) -> tuple[BytesIO | str | os.PathLike[str], str]:
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
        if not data:
            raise ImageError("The image is empty: 0 bytes.")
        return BytesIO(data), f"the image of {len(data)} bytes"
    if isinstance(source, (str, os.PathLike)):
        return source, repr(os.fspath(source))
    raise ImageError(f"An image is {_ACCEPTED}; got {type(source).__name__}.")


@contextmanager
def _pillow_errors(name: str) -> Iterator[None]:
    """Everything that Pillow raises becomes an ImageError in one line.

    Its decoders raise many types on damaged files (OSError, SyntaxError, EOFError, struct.error,
    zlib.error, IndexError, …), hence the broad ``except``.
    """
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError as exc:
        raise ImageError(f"Cannot read {name}: not an image in a known format.") from exc
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise ImageError(
            f"Cannot read {name}: {exc} Trusted images of that size need a higher "
            "PIL.Image.MAX_IMAGE_PIXELS."
        ) from exc
    except OSError as exc:
        raise ImageError(f"Cannot read {name}: {exc.strerror or exc}.") from exc
    except Exception as exc:
        raise ImageError(f"Cannot read {name}: damaged or not supported ({exc}).") from exc


def _decode(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    _check_size(*image.size, max_pixels)
    with _pillow_errors(name):
        return _as_seen(ImageOps.exif_transpose(image))


def _as_seen(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ImageError(
            "The image holds floating-point values, whose range is unknown; convert it to 8 bits."
        )
    if image.mode == "I" or image.mode in _SIXTEEN_BIT:
        return _from_16_bit(image)
    if image.has_transparency_data:
        seen = Image.new("RGBA", image.size, "white")
        seen.alpha_composite(image.convert("RGBA"))
        return seen.convert("RGB")
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(
            f"The image holds integers from {values.min()} to {values.max()}; 16-bit grey is "
            "0 to 65535. Convert it to 8 bits."
        )
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"The image is empty: {width}x{height} pixels.")
    if width * height > max_pixels:
        raise ImageError(
            f"The image has {width}x{height} = {width * height} pixels; the limit is {max_pixels} "
            "(max_image_pixels)."
        )


def _check_array(array: NDArray[np.generic]) -> None:
    got = f"got {array.dtype} of shape {array.shape}."
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
        raise ImageError(
            f"An image array is HxWx3; {got} Move the channels last: array.transpose(1, 2, 0)."
        )
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] != 3):
        raise ImageError(f"An image array is HxWx3 in RGB order, or HxW grey; {got}")
    if array.dtype != np.uint8:
        raise ImageError(
            f"An image array is uint8, 0 to 255; {got} Convert it first: values in [0, 1] with "
            "(array * 255).round().astype(np.uint8)."
        )
