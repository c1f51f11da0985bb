"""Prompts drawn onto a picture, the way annotation tools show them."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw

from .files import write_atomically

_FOREGROUND = (46, 204, 64)
_BACKGROUND = (255, 65, 54)
_BOX = (255, 255, 255)
_SMOOTH = 4  # drawn so many times larger, then reduced: Pillow draws without antialiasing


def draw_prompts(
    picture: Image.Image,
    points: Sequence[Sequence[float]] = (),
    labels: Sequence[int] = (),
    box: Sequence[float] | None = None,
) -> Image.Image:
    """A copy of ``picture`` with a dot for each point and a frame for the box.

    ``points``: (x, y) in pixels of the picture, green for label 1 and red for 0. ``box``:
    (x0, y0, x1, y1). Dots and lines grow with the picture.
    """
    unit = max(1.0, min(picture.size) / 400)
    size = (picture.width * _SMOOTH, picture.height * _SMOOTH)
    layer = Image.new("RGBA", size, (*_BOX, 0))
    draw = ImageDraw.Draw(layer)
    if box is not None:
        frame = [value * _SMOOTH for value in box]
        draw.rectangle(frame, outline=_BOX, width=round(1.5 * unit * _SMOOTH))
    for (x, y), label in zip(points, labels, strict=True):
        for radius, color in ((6, (255, 255, 255)), (4.2, _FOREGROUND if label else _BACKGROUND)):
            _dot(draw, x * _SMOOTH, y * _SMOOTH, radius * unit * _SMOOTH, color)
    result = picture.convert("RGBA")
    result.alpha_composite(layer.resize(picture.size, Image.Resampling.BOX))
    return result.convert("RGB")


def _dot(
    draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, color: tuple[int, int, int]
) -> None:
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=(*color, 255))


def write_png(picture: Image.Image, path: Path) -> None:
    """Write ``picture`` to ``path`` as PNG, whatever its suffix; whole or not at all."""
    data = BytesIO()
    picture.save(data, "PNG")
    write_atomically(path, data.getvalue())
