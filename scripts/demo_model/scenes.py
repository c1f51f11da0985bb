"""Synthetic scenes: coloured, textured, shaded shapes that overlap on a background.

A scene is an RGB picture and a label map.  Every object is *determinable* from the picture: it
differs from what lies below it in colour, texture or brightness, and its label covers exactly its
visible region.  All lengths below are pixels of the scene unless a name says otherwise; all
randomness comes from the generator handed in, so a seed gives the same scene again.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter
from scipy import ndimage

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Field = Callable[[Floats, Floats], Floats]
"""Maps (x, y) in units of the object's radius to a signed distance, negative inside."""

FRAGMENT = 255
"""Label of what is left of objects of which less than a third is in sight: never asked for."""
NOISE_SIDE = 512
NOISE_SCALES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


def floats(values: npt.ArrayLike) -> Floats:
    """Values as a float32 array."""
    return np.asarray(values, dtype=np.float32)


@dataclass(frozen=True)
class Scene:
    """One picture with its objects.

    ``image`` is uint8 RGB, shape (S, S, 3).  ``labels`` is uint8, shape (S, S): 0 is background,
    k > 0 is the visible region of object k, `FRAGMENT` that of objects mostly hidden.
    """

    image: Bytes
    labels: Bytes


@dataclass(frozen=True)
class Style:
    """What the objects of one scene have in common."""

    count: int
    radius: tuple[float, float]
    """Smallest and largest object radius as a fraction of the scene's side."""
    saturation: float
    light: float
    """Direction the light comes from, radians."""
    coins: bool = False


@lru_cache(maxsize=1)
def noise_bank() -> Floats:
    """Noise tiles in [-1, 1] that wrap around, one per scale, shape (scales, 512, 512)."""
    rng = np.random.default_rng(20_240_729)
    tiles = []
    for scale in NOISE_SCALES:
        white = rng.standard_normal((NOISE_SIDE, NOISE_SIDE)).astype(np.float32)
        smooth = ndimage.gaussian_filter(white, scale, mode="wrap")
        tiles.append(np.clip(smooth / (2.0 * smooth.std()), -1.0, 1.0))
    return np.stack(tiles).astype(np.float32)


def noise(rng: np.random.Generator, height: int, width: int, smallest: int = 0) -> Floats:
    """A random window of the noise bank, shape (height, width); larger windows are tiled."""
    tile = noise_bank()[int(rng.integers(smallest, len(NOISE_SCALES)))]
    rows = (np.arange(height) + int(rng.integers(NOISE_SIDE))) % NOISE_SIDE
    columns = (np.arange(width) + int(rng.integers(NOISE_SIDE))) % NOISE_SIDE
    return floats(tile[rows[:, None], columns[None, :]])


def colour(rng: np.random.Generator, saturation: float) -> Floats:
    """A random RGB colour in [0, 1]; saturation 0 gives greys."""
    grey = float(rng.uniform(0.05, 0.95))
    vivid = rng.uniform(0.0, 1.0, 3)
    return floats(np.clip(grey + saturation * (vivid - vivid.mean()) * 1.3, 0.02, 0.98))


def different_colour(rng: np.random.Generator, saturation: float, other: Floats) -> Floats:
    """A colour at a clear distance from ``other`` (RGB), so that the object can be told apart."""
    gap = float(rng.uniform(0.22, 0.45))
    best = colour(rng, saturation)
    for _ in range(8):
        if float(np.abs(best - other).max()) >= gap:
            break
        fresh = colour(rng, saturation)
        if np.abs(fresh - other).max() > np.abs(best - other).max():
            best = fresh
    return best


def pattern(rng: np.random.Generator, x: Floats, y: Floats, contrast: float) -> Floats:
    """A brightness pattern around 0 on coordinates in pixels: stripes, checks, noise or a ramp."""
    height, width = x.shape
    kind = rng.choice(["none", "ramp", "noise", "fine", "stripes", "checks", "mixed"])
    if kind == "none":
        return np.zeros_like(x)
    if kind == "noise":
        return floats(contrast * noise(rng, height, width, 2))
    if kind == "fine":
        return floats(contrast * 0.8 * noise(rng, height, width))
    if kind == "mixed":
        return floats(
            contrast * (0.6 * noise(rng, height, width) + 0.6 * noise(rng, height, width, 3))
        )
    angle = float(rng.uniform(0, np.pi))
    u = np.cos(angle) * x + np.sin(angle) * y
    if kind == "ramp":
        span = float(np.ptp(u)) + 1.0
        return floats(2.0 * contrast * ((u - u.min()) / span - 0.5))
    period = float(np.exp(rng.uniform(np.log(5.0), np.log(40.0))))
    wave = np.clip(3.0 * np.sin(2 * np.pi * u / period), -1, 1)
    if kind == "checks":
        v = -np.sin(angle) * x + np.cos(angle) * y
        wave = wave * np.clip(3.0 * np.sin(2 * np.pi * v / period), -1, 1)
    return floats(0.6 * contrast * wave)


def ellipse_field(aspect: float) -> Field:
    """An ellipse with half axes 1 and ``aspect``."""

    def field(x: Floats, y: Floats) -> Floats:
        return floats((np.hypot(x, y / aspect) - 1.0) * aspect)

    return field


def box_field(aspect: float, corner: float) -> Field:
    """A rectangle with half sides 1 and ``aspect``, its corners rounded by ``corner``."""

    def field(x: Floats, y: Floats) -> Floats:
        dx = np.abs(x) - (1.0 - corner)
        dy = np.abs(y) - (aspect - corner)
        outside = np.hypot(np.maximum(dx, 0), np.maximum(dy, 0))
        return (outside + np.minimum(np.maximum(dx, dy), 0) - corner).astype(np.float32)

    return field


def polygon_field(normals: Floats, offsets: Floats) -> Field:
    """A convex polygon: the intersection of half planes n·p <= offset."""

    def field(x: Floats, y: Floats) -> Floats:
        distance = np.full(x.shape, -np.inf, dtype=np.float32)
        for (nx, ny), offset in zip(normals, offsets, strict=True):
            np.maximum(distance, nx * x + ny * y - offset, out=distance)
        return distance

    return field


def blob_field(waves: Floats, phases: Floats) -> Field:
    """A closed curve whose radius is a short Fourier series of the angle."""
    norm = 1.0 + float(np.abs(waves).sum())

    def field(x: Floats, y: Floats) -> Floats:
        theta = np.arctan2(y, x)
        radius = np.ones_like(theta)
        for k, (wave, phase) in enumerate(zip(waves, phases, strict=True), start=2):
            radius += wave * np.cos(k * theta + phase)
        return (0.8 * (np.hypot(x, y) - radius / norm)).astype(np.float32)

    return field


def ring_field(aspect: float, width: float) -> Field:
    """An ellipse's outline, ``width`` thick."""
    outer = ellipse_field(aspect)

    def field(x: Floats, y: Floats) -> Floats:
        distance = outer(x, y)
        return floats(np.maximum(distance, -width - distance))

    return field


def union_field(first: Field, second: Field, dx: float, dy: float, scale: float) -> Field:
    """``first`` shrunk to leave room, joined by ``second`` moved by (dx, dy) and scaled."""

    def field(x: Floats, y: Floats) -> Floats:
        inner = 0.7 * first(x / 0.7, y / 0.7)
        extra = scale * second((x - dx) / scale, (y - dy) / scale)
        return floats(np.minimum(inner, extra))

    return field


def simple_field(rng: np.random.Generator) -> Field:
    """One shape at random."""
    kind = rng.choice(
        ["ellipse", "circle", "box", "polygon", "blob"], p=[0.25, 0.2, 0.2, 0.15, 0.2]
    )
    if kind == "ellipse":
        return ellipse_field(float(rng.uniform(0.35, 1.0)))
    if kind == "circle":
        return ellipse_field(1.0)
    if kind == "box":
        aspect = float(rng.uniform(0.3, 1.0))
        return box_field(aspect, float(rng.uniform(0.02, 0.9)) * aspect)
    if kind == "polygon":
        sides = int(rng.integers(3, 8))
        angles = (np.arange(sides) + rng.uniform(-0.25, 0.25, sides)) * 2 * np.pi / sides
        normals = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
        return polygon_field(normals, rng.uniform(0.45, 0.75, sides).astype(np.float32))
    waves = (rng.uniform(-0.3, 0.3, 4) / np.arange(1, 5)).astype(np.float32)
    return blob_field(waves, rng.uniform(0, 2 * np.pi, 4).astype(np.float32))


def random_field(rng: np.random.Generator) -> Field:
    """A simple shape, a ring, or two shapes joined (a mug and its handle, a body and its head)."""
    kind = rng.uniform()
    if kind < 0.68:
        return simple_field(rng)
    if kind < 0.75:
        return ring_field(float(rng.uniform(0.7, 1.0)), float(rng.uniform(0.15, 0.4)))
    second = ring_field(1.0, 0.3) if rng.uniform() < 0.4 else simple_field(rng)
    angle = float(rng.uniform(0, 2 * np.pi))
    reach = float(rng.uniform(0.45, 0.65))
    return union_field(
        simple_field(rng),
        second,
        reach * float(np.cos(angle)),
        reach * float(np.sin(angle)),
        float(rng.uniform(0.25, 0.4)),
    )


@dataclass(frozen=True)
class Patch:
    """An object's field on the rectangle of pixels around it.

    ``distance`` is in pixels (< 0 inside); ``x`` and ``y`` are pixels from the object's centre.
    """

    rows: slice
    columns: slice
    distance: Floats
    x: Floats
    y: Floats
    radius: float


def place(
    rng: np.random.Generator, field: Field, size: int, centre: Floats, radius: float
) -> Patch:
    """Turn a field by a random angle, put it at ``centre`` (x, y) and evaluate it there."""
    margin = radius * 1.15 + 0.06 * size
    top, left = (int(max(0, c - margin)) for c in (centre[1], centre[0]))
    bottom, right = (int(min(size, c + margin + 1)) for c in (centre[1], centre[0]))
    yy, xx = np.mgrid[top : max(bottom, top + 1), left : max(right, left + 1)].astype(np.float32)
    x, y = xx - np.float32(centre[0]), yy - np.float32(centre[1])
    angle = float(rng.uniform(0, 2 * np.pi))
    u = (np.cos(angle) * x + np.sin(angle) * y) / radius
    v = (-np.sin(angle) * x + np.cos(angle) * y) / radius
    distance = field(u.astype(np.float32), v.astype(np.float32)).astype(np.float32) * radius
    rows, columns = slice(top, top + x.shape[0]), slice(left, left + x.shape[1])
    return Patch(rows, columns, distance, x, y, radius)


def cast_shadow(rng: np.random.Generator, canvas: Floats, patch: Patch, light: float) -> None:
    """Darken the canvas beside the object, away from the light."""
    reach = float(rng.uniform(0.0, 0.05)) * canvas.shape[0]
    height, width = patch.distance.shape
    rows = np.clip(np.arange(height) + int(reach * np.sin(light)), 0, height - 1)
    columns = np.clip(np.arange(width) + int(reach * np.cos(light)), 0, width - 1)
    moved = patch.distance[rows[:, None], columns[None, :]]
    softness = float(rng.uniform(0.1, 1.0)) * reach + 2.0
    shadow = np.clip(0.5 - moved / (2 * softness), 0, 1) * float(rng.uniform(0.15, 0.6))
    canvas[patch.rows, patch.columns] *= (1.0 - shadow)[..., None]


def shade(rng: np.random.Generator, patch: Patch, light: float) -> Floats:
    """Brightness factors of a lit solid: a side turned to the light, a rim, a highlight."""
    u = (patch.x * np.cos(light) + patch.y * np.sin(light)) / patch.radius
    factor = np.ones_like(u)
    if rng.uniform() < 0.6:
        factor += float(rng.uniform(0.05, 0.35)) * np.clip(u, -1, 1)
    if rng.uniform() < 0.45:
        width = float(rng.uniform(0.04, 0.25)) * patch.radius
        band = np.clip(1.0 + patch.distance / width, 0, 1)
        turned = float(rng.uniform(-0.5, 0.35)) + float(rng.uniform(0, 0.4)) * np.clip(u, -1, 1)
        factor += turned * band
    return floats(np.clip(factor, 0.15, 2.0))


def decorate(rng: np.random.Generator, paint: Floats, patch: Patch, saturation: float) -> None:
    """Paint a part onto the object: a concentric inset, a band across it, or spots of wear."""
    kind = rng.choice(["inset", "band", "relief"])
    tone = colour(rng, saturation)
    if kind == "inset":
        depth = float(rng.uniform(0.12, 0.35)) * patch.radius
        weight = np.clip(-(patch.distance + depth), 0, 1) * float(rng.uniform(0.3, 1.0))
    elif kind == "band":
        angle, place_at = float(rng.uniform(0, np.pi)), float(rng.uniform(-0.4, 0.4))
        u = (np.cos(angle) * patch.x + np.sin(angle) * patch.y) / patch.radius - place_at
        half = float(rng.uniform(0.06, 0.2))
        weight = np.clip((half - np.abs(u)) * patch.radius, 0, 1) * float(rng.uniform(0.4, 1.0))
    else:
        weight = np.clip(4.0 * noise(rng, patch.x.shape[0], patch.x.shape[1], 1), 0, 1)
        weight = weight * float(rng.uniform(0.2, 0.6))
    paint += weight[..., None] * (tone - paint)


def add_highlight(rng: np.random.Generator, paint: Floats, patch: Patch, light: float) -> None:
    """Add a specular spot on the lit side."""
    offset = float(rng.uniform(0.2, 0.6)) * patch.radius
    dx, dy = patch.x - offset * np.cos(light), patch.y - offset * np.sin(light)
    spread = float(rng.uniform(0.05, 0.25)) * patch.radius + 1.0
    spot = np.exp(-(dx**2 + dy**2) / (2 * spread**2)) * float(rng.uniform(0.2, 0.8))
    paint += spot[..., None] * (1.0 - paint)


def paint_object(
    rng: np.random.Generator, canvas: Floats, patch: Patch, style: Style, base: Floats | None
) -> npt.NDArray[np.bool_]:
    """Draw one object over the canvas and return its mask on the patch, shape of the patch."""
    softness = float(rng.uniform(0.8, 2.2))
    alpha = np.clip(0.5 - patch.distance / softness, 0, 1)
    below = canvas[patch.rows, patch.columns]
    inside = alpha > 0.5
    under = below[inside].mean(0) if inside.any() else below.mean((0, 1))
    tone = different_colour(rng, style.saturation, under) if base is None else base
    # Not every coin of a tray throws a shadow.
    if (base is None or rng.uniform() < 0.5) and rng.uniform() < 0.6:
        cast_shadow(rng, canvas, patch, style.light)
    contrast = float(rng.uniform(0.02, 0.2))
    paint = tone + pattern(rng, patch.x, patch.y, contrast)[..., None]
    if style.coins or rng.uniform() < 0.22:
        decorate(rng, paint, patch, style.saturation)
    paint = paint * shade(rng, patch, style.light)[..., None]
    if rng.uniform() < 0.25:
        add_highlight(rng, paint, patch, style.light)
    below = canvas[patch.rows, patch.columns]
    below += alpha[..., None] * (np.clip(paint, 0, 1) - below)
    return np.asarray(inside, dtype=np.bool_)


def background(rng: np.random.Generator, size: int, saturation: float) -> Floats:
    """Ground to lay objects on: a tone or two with texture and ramps, shape (S, S, 3)."""
    yy, xx = np.mgrid[0:size, 0:size].astype(np.float32)
    canvas = np.empty((size, size, 3), dtype=np.float32)
    canvas[:] = colour(rng, saturation)
    if rng.uniform() < 0.3:
        angle = float(rng.uniform(0, 2 * np.pi))
        u = np.cos(angle) * (xx - size / 2) + np.sin(angle) * (yy - size / 2)
        side = np.clip(0.5 - (u - float(rng.uniform(-0.3, 0.3)) * size), 0, 1)
        other = colour(rng, saturation) + pattern(rng, xx, yy, 0.15)[..., None]
        canvas += side[..., None] * (other - canvas)
    if rng.uniform() < 0.4:
        weight = 0.5 + 0.5 * noise(rng, size, size, 4)
        canvas += weight[..., None] * 0.5 * (colour(rng, saturation) - canvas)
    for _ in range(int(rng.integers(0, 3))):
        canvas += pattern(rng, xx, yy, float(rng.uniform(0.02, 0.16)))[..., None]
    return np.clip(canvas, 0, 1)


def choose_style(rng: np.random.Generator) -> Style:
    """Mixed objects, a tray of similar coins, or a few large things."""
    saturation = 0.0 if rng.uniform() < 0.12 else float(rng.uniform(0.2, 1.0)) ** 2
    light = float(rng.uniform(0, 2 * np.pi))
    kind = rng.uniform()
    if kind < 0.62:
        return Style(int(rng.integers(3, 13)), (0.035, 0.26), saturation, light)
    if kind < 0.8:
        radius = float(rng.uniform(0.035, 0.09))
        count = int(rng.integers(8, 30))
        return Style(count, (radius * 0.8, radius * 1.2), 0.4 * saturation, light, coins=True)
    return Style(int(rng.integers(1, 5)), (0.12, 0.4), saturation, light)


def free_centre(
    rng: np.random.Generator, size: int, radius: float, taken: list[tuple[Floats, float]]
) -> Floats | None:
    """A centre (x, y) where a disc of ``radius`` touches no other, or None if none was found."""
    for _ in range(20):
        centre = rng.uniform(0.02 * size, 0.98 * size, 2).astype(np.float32)
        gaps = [float(np.hypot(*(centre - c))) - 1.02 * (radius + r) for c, r in taken]
        if not gaps or min(gaps) > 0:
            return centre
    return None


def tray_places(rng: np.random.Generator, size: int, style: Style) -> list[tuple[Floats, float]]:
    """Centres (x, y) and radii of round objects that do not overlap: strewn about, or in rows."""
    taken: list[tuple[Floats, float]] = []
    if rng.uniform() < 0.5:
        for _ in range(style.count):
            radius = size * float(rng.uniform(*style.radius))
            centre = free_centre(rng, size, radius, taken)
            if centre is not None:
                taken.append((centre, radius))
        return taken
    pitch = size * style.radius[1] * float(rng.uniform(2.1, 3.2))
    first = rng.uniform(0.3, 0.9, 2) * pitch
    for y in np.arange(first[1], size, pitch):
        for x in np.arange(first[0], size, pitch):
            if rng.uniform() < 0.85 and len(taken) < 60:
                shift = rng.uniform(-0.06, 0.06, 2) * pitch
                radius = size * float(rng.uniform(*style.radius))
                taken.append((floats([x + shift[0], y + shift[1]]), radius))
    return taken


def draw_coins(rng: np.random.Generator, canvas: Floats, labels: Bytes, style: Style) -> None:
    """Many similar round objects; those of some trays look all alike but for their place."""
    size = labels.shape[0]
    aspect = float(rng.uniform(0.8, 1.0))
    base = different_colour(rng, style.saturation, canvas.mean((0, 1)))
    alike = rng.uniform() < 0.6
    stamp = int(rng.integers(2**31))
    for index, (centre, radius) in enumerate(tray_places(rng, size, style), start=1):
        patch = place(rng, ellipse_field(aspect), size, centre, radius)
        tone = floats(np.clip(base + rng.normal(0, 0.04), 0.02, 0.98))
        painter = np.random.default_rng(stamp) if alike else rng
        inside = paint_object(painter, canvas, patch, style, tone)
        labels[patch.rows, patch.columns][inside] = index


def draw_objects(rng: np.random.Generator, canvas: Floats, labels: Bytes, style: Style) -> None:
    """Objects of many kinds, later ones over earlier ones, larger ones first."""
    size = labels.shape[0]
    low, high = np.log(style.radius[0]), np.log(style.radius[1])
    radii = np.sort(np.exp(rng.uniform(low, high, style.count)))[::-1] * size
    if rng.uniform() < 0.3:
        rng.shuffle(radii)
    whole = np.zeros(256)
    for index, radius in enumerate(radii, start=1):
        centre = rng.uniform(0.03 * size, 0.97 * size, 2).astype(np.float32)
        patch = place(rng, random_field(rng), size, centre, float(radius))
        inside = paint_object(rng, canvas, patch, style, None)
        labels[patch.rows, patch.columns][inside] = index
        whole[index] = inside.sum()
    seen = np.bincount(labels.ravel(), minlength=256)
    hidden = np.flatnonzero(seen < whole / 3)
    labels[np.isin(labels, hidden)] = FRAGMENT


def photograph(rng: np.random.Generator, canvas: Floats) -> Bytes:
    """Uneven light, tone, blur, grain and compression, as a camera would add them."""
    size = canvas.shape[0]
    if rng.uniform() < 0.5:
        ramp = np.linspace(-1, 1, size, dtype=np.float32)
        gx, gy = rng.uniform(-0.3, 0.3, 2)
        canvas = canvas * (1.0 + gx * ramp[None, :] + gy * ramp[:, None])[..., None]
    if rng.uniform() < 0.15:
        canvas = np.repeat(canvas.mean(2, keepdims=True), 3, axis=2)
    canvas = np.clip(canvas, 0, 1) ** np.float32(rng.uniform(0.7, 1.4))
    if rng.uniform() < 0.5:
        grain = rng.standard_normal(canvas.shape[:2], dtype=np.float32)[..., None]
        canvas = canvas + grain * np.float32(rng.uniform(0.005, 0.05))
    picture = Image.fromarray((np.clip(canvas, 0, 1) * 255).astype(np.uint8))
    if rng.uniform() < 0.4:
        picture = picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 1.6))))
    if rng.uniform() < 0.4:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=int(rng.integers(35, 95)))
        picture = Image.open(buffer).convert("RGB")
    return np.array(picture, dtype=np.uint8)


def make_scene(rng: np.random.Generator, size: int = 512) -> Scene:
    """Draw one scene of ``size`` x ``size`` pixels."""
    style = choose_style(rng)
    canvas = background(rng, size, style.saturation)
    labels = np.zeros((size, size), dtype=np.uint8)
    if style.coins:
        draw_coins(rng, canvas, labels, style)
    else:
        draw_objects(rng, canvas, labels, style)
    return Scene(photograph(rng, canvas), labels)
