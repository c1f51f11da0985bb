"""Training examples: augmented scenes, target masks, and prompts drawn from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from torch import Tensor

from demo_model.scenes import FRAGMENT, Scene
from demo_model.store import SceneStore

Mask = npt.NDArray[np.bool_]

DEEP = 0.5
"""Share of clicks, first ones and corrections, that go to the deepest place of their region."""
EXACT = 0.7
"""Share of boxes that are exact; the others are drawn loosely."""
SPARSE = 0.6
"""Objects that fill less of their bounding box are asked for twice as often."""
BARE = 0.45
"""Those that fill less than this are asked for four times as often."""
SMALL_AREA = 0.004
"""Objects smaller than this fraction of the image are asked for more often, too."""
TRAY = 14
"""Scenes of as many objects or more are trays of look-alikes, which are learnt first."""
TRAYS_TAKEN = 0.7
"""Share of the trays drawn that is trained on. With 0.3 clicks came to spill into look-alikes."""
SMALLEST_AREA = 0.0012
"""Visible area, as a fraction of the image, from which on an object is asked for."""


@dataclass(frozen=True)
class Batch:
    """Images and the objects asked for.

    ``images`` RGB in [0, 1] (B, 3, S, S); ``labels`` (B, S, S) as in `Scene`; ``objects`` (B, P)
    the label of each object asked for.
    """

    images: Tensor
    labels: Tensor
    objects: Tensor


def crop_box(rng: np.random.Generator, size: int) -> tuple[float, float, float, float]:
    """A random part of the scene (left, upper, right, lower), sometimes all of it."""
    if rng.uniform() < 0.35:
        return 0.0, 0.0, float(size), float(size)
    area, aspect = float(rng.uniform(0.3, 1.0)), float(np.exp(rng.uniform(-0.3, 0.3)))
    width = min(size, size * (area * aspect) ** 0.5)
    height = min(size, size * (area / aspect) ** 0.5)
    left, upper = float(rng.uniform(0, size - width)), float(rng.uniform(0, size - height))
    return left, upper, left + width, upper + height


def augment(rng: np.random.Generator, scene: Scene, size: int) -> Scene:
    """Crop, resize to ``size``, flip, and change the colours of a scene."""
    box = crop_box(rng, scene.labels.shape[0])
    shape = (size, size)
    picture = Image.fromarray(scene.image).resize(shape, Image.Resampling.BILINEAR, box=box)
    labels = Image.fromarray(scene.labels).resize(shape, Image.Resampling.NEAREST, box=box)
    image, label_map = np.asarray(picture), np.asarray(labels)
    if rng.uniform() < 0.5:
        image, label_map = image.transpose(1, 0, 2), label_map.T
    if rng.uniform() < 0.5:
        image, label_map = image[::-1], label_map[::-1]
    if rng.uniform() < 0.5:
        image, label_map = image[:, ::-1], label_map[:, ::-1]
    if rng.uniform() < 0.5:
        image = image[..., rng.permutation(3)]
    if rng.uniform() < 0.15:
        image = 255 - image
    return Scene(np.ascontiguousarray(image), np.ascontiguousarray(label_map))


def visible_objects(labels: np.ndarray, smallest: float = SMALLEST_AREA) -> np.ndarray:
    """Labels whose visible area is at least ``smallest`` of the image and at most 0.7 of it."""
    counts = np.bincount(labels.ravel(), minlength=256)
    counts[[0, FRAGMENT]] = 0
    wanted = (counts >= smallest * labels.size) & (counts <= 0.7 * labels.size)
    return np.flatnonzero(wanted)


def draw_batch(
    rng: np.random.Generator, store: SceneStore, size: int, images: int, prompts: int
) -> Batch:
    """Draw ``images`` scenes of ``size`` px with ``prompts`` objects each, some again and again."""
    pictures: list[np.ndarray] = []
    maps: list[np.ndarray] = []
    objects: list[np.ndarray] = []
    while len(pictures) < images:
        drawn = store.draw(rng)
        if len(np.unique(drawn.labels)) > TRAY and rng.uniform() >= TRAYS_TAKEN:
            continue
        scene = augment(rng, drawn, size)
        present = visible_objects(scene.labels)
        if not len(present):
            continue
        pictures.append(scene.image)
        maps.append(scene.labels)
        objects.append(rng.choice(present, prompts, p=difficulty(scene.labels, present)))
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255.0
    return Batch(
        stacked, torch.from_numpy(np.stack(maps)), torch.from_numpy(np.stack(objects)).long()
    )


def difficulty(labels: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """How often to ask for each of the objects, as chances that sum to 1.

    Rings, crescents and what is left of half-hidden things fill little of their boxes; they, and
    the smallest objects, are what masks are worst for.
    """
    boxes = ndimage.find_objects(labels)
    counts = np.bincount(labels.ravel(), minlength=256)
    weights = np.ones(len(objects))
    for index, label in enumerate(objects):
        rows, columns = boxes[label - 1]
        extent = (rows.stop - rows.start) * (columns.stop - columns.start)
        weights[index] += counts[label] < SPARSE * extent
        weights[index] += 2 * (counts[label] < BARE * extent)
        weights[index] += counts[label] < SMALL_AREA * labels.size
    return np.asarray(weights / weights.sum())


def full_masks(batch: Batch) -> Tensor:
    """The objects' masks at image size, bool (B*P, S, S)."""
    masks = batch.labels[:, None] == batch.objects[:, :, None, None]
    return masks.flatten(0, 1)


def targets(masks: Tensor) -> Tensor:
    """Masks (N, S, S) at the decoder's resolution: the covered share of each 4 x 4 px cell."""
    return F.avg_pool2d(masks[:, None].float(), 4)[:, 0]


def cells_to_points(cells: Tensor, width: int) -> Tensor:
    """A random place (x, y in pixels) inside each of the given cells (N,) of a stride-4 grid."""
    corner = torch.stack([cells % width, cells // width], -1).float()
    return ((corner + torch.rand_like(corner)) * 4.0 - 0.5).unsqueeze(1)


def deepest(region: Mask) -> tuple[float, float]:
    """The pixel (x, y) of the region's largest part that is farthest from its border."""
    parts, count = ndimage.label(region)
    if count > 1:
        sizes = np.bincount(parts.ravel())
        sizes[0] = 0
        region = parts == sizes.argmax()
    depth = ndimage.distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    return float(x), float(y)


def pick_cells(region: Tensor) -> Tensor:
    """One cell index per region (N, h, w) of zeros and ones: its deepest, or any but rather inside.

    An empty region gives any cell.
    """
    cells = torch.multinomial(inner_weight(region).flatten(1) + 1e-9, 1)[:, 0]
    for i in torch.nonzero(torch.rand(len(cells)) < DEEP)[:, 0].tolist():
        if region[i].any():
            x, y = deepest(region[i].numpy() > 0)
            cells[i] = int(y) * region.shape[-1] + int(x)
    return cells


def inner_weight(region: Tensor) -> Tensor:
    """Weights that prefer the inside of a region (N, h, w) of zeros and ones."""
    side = max(3, region.shape[-1] // 16 // 2 * 2 + 1)
    smooth = F.avg_pool2d(region[:, None], side, 1, side // 2)[:, 0]
    return region * (smooth**2 + 0.02)


def click(target: Tensor) -> tuple[Tensor, Tensor]:
    """A click inside each object: points (N, 1, 2) in pixels and labels (N, 1)."""
    peak = target.amax((1, 2), keepdim=True)
    region = (target >= torch.minimum(peak, torch.tensor(0.95))).float()
    points = cells_to_points(pick_cells(region), target.shape[-1])
    return points, torch.ones(len(target), 1)


def box(masks: Tensor, jitter: float) -> tuple[Tensor, Tensor]:
    """Boxes around masks (N, S, S) as two corner points each (N, 2, 2), labels 2 and 3.

    Every side is moved by up to ``jitter`` of the box's own size; `EXACT` of the boxes stay.
    """
    size = masks.shape[-1]
    along = torch.arange(size, dtype=torch.float32)
    corners = []
    for axis in (1, 2):  # any() over rows leaves x, over columns leaves y
        hit = masks.any(axis)
        low = torch.where(hit, along, float(size)).amin(1)
        high = torch.where(hit, along, -1.0).amax(1)
        corners.append(torch.stack([low, high], -1))
    points = torch.stack(corners, -1)
    extent = (points[:, 1] - points[:, 0]).unsqueeze(1)
    moved = (torch.rand(len(masks), 1, 1) >= EXACT).float()
    points = points + moved * (torch.rand_like(points) * 2 - 1) * jitter * extent
    labels = torch.tensor([[2.0, 3.0]]).expand(len(masks), 2)
    return points.clamp(0, size - 1), labels


def corrective_click(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """A click where prediction (N, h, w) and target disagree; label 1 where object was missed.

    Where they agree everywhere the click lands inside the object.
    """
    truth = target > 0.5
    wrong = ((logits > 0) != truth).float()
    none = wrong.flatten(1).sum(1) == 0
    wrong[none] = truth[none].float()
    cells = pick_cells(wrong)
    labels = truth.flatten(1).gather(1, cells[:, None]).float()
    return cells_to_points(cells, target.shape[-1]), labels
