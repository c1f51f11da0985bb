"""What is asked: photos of several sizes, prompts and the path of a mouse."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files as package_files
from io import BytesIO

import numpy as np
from PIL import Image

from ..errors import InvalidInputError
from ..images import load_image

PHOTO = "coffee.jpg"
_QUALITY = 92
_NOISE = 4.0  # of 255, about a camera's at daylight: without it enlarged photos pack too well
_TILE = 512
_STAMP = 16


@dataclass(frozen=True)
class Photo:
    """A photo of ``megapixels`` million pixels; ``image``: its pixels."""

    megapixels: float
    image: Image.Image

    @property
    def title(self) -> str:
        return f"{self.megapixels:g} MP"

    def jpeg(self, turn: int) -> bytes:
        """The photo as a JPEG file that differs from turn to turn.

        A corner of a few pixels has a colour of its own, so that no cache knows the image.
        """
        picture = self.image.copy()
        picture.paste(_colour(turn), (0, 0, _STAMP, _STAMP))
        data = BytesIO()
        picture.save(data, "JPEG", quality=_QUALITY)
        return data.getvalue()


def _colour(turn: int) -> tuple[int, int, int]:
    scattered = (turn + 1_000) * 2_654_435_761  # Knuth's multiplier: neighbours get far apart
    return scattered >> 8 & 255, scattered >> 16 & 255, scattered >> 24 & 255


@lru_cache(maxsize=8)
def photo(megapixels: float, source: str | None = None) -> Photo:
    """The shipped photo, or the file ``source``, resized to about ``megapixels``, with noise.

    Raises :class:`ImageError` when ``source`` cannot be read.
    """
    if not 0.01 <= megapixels <= 80:
        raise InvalidInputError(f"Photos have 0.01 to 80 megapixels; got {megapixels:g}.")
    if source is None:
        original = load_image((package_files("triton_sam") / "assets" / PHOTO).read_bytes())
    else:
        original = load_image(source)
    scale = math.sqrt(megapixels * 1e6 / (original.width * original.height))
    size = round(original.width * scale), round(original.height * scale)
    resized = original.resize(size, Image.Resampling.BICUBIC)
    return Photo(megapixels, _with_noise(resized))


def _with_noise(image: Image.Image) -> Image.Image:
    """A band of rows at a time: 48 megapixels as floats would be half a gigabyte."""
    tile = np.random.default_rng(0).normal(0, _NOISE, (_TILE, _TILE, 3)).round().astype(np.int16)
    pixels = np.array(image)
    noise = np.tile(tile, (1, -(-image.width // _TILE), 1))[:, : image.width]
    for top in range(0, image.height, _TILE):
        band = pixels[top : top + _TILE]
        band[:] = np.clip(band + noise[: len(band)], 0, 255)
    return Image.fromarray(pixels)


@dataclass(frozen=True)
class Clicks:
    """B prompts of one click each: ``points`` Bx1x2 in pixels of the image, ``labels`` Bx1."""

    points: list[list[list[float]]]
    labels: list[list[int]]


def clicks(count: int, size: tuple[int, int], turn: int) -> Clicks:
    """``count`` single clicks in an image of ``size`` = (width, height), others each turn."""
    generator = np.random.default_rng([turn % 2**32, count])  # turns of the warm-up are negative
    points = generator.uniform(0.1, 0.9, (count, 1, 2)) * np.array(size)
    return Clicks(points.tolist(), [[1]] * count)


def mouse_path(events: int, size: tuple[int, int], burst: int) -> list[tuple[float, float]]:
    """Positions of a mouse that wanders over an image of ``size`` = (width, height)."""
    phase = 2 * math.pi * np.random.default_rng([burst, events]).random(2)
    steps = np.arange(events) / 60
    x = 0.5 + 0.35 * np.sin(1.9 * steps + phase[0])
    y = 0.5 + 0.35 * np.sin(2.7 * steps + phase[1])
    return [(float(px * size[0]), float(py * size[1])) for px, py in zip(x, y, strict=True)]
