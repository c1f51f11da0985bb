"""Held-out figures through the official predictor, and overlays to look at."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from scipy import ndimage
from tqdm import tqdm

from demo_model.sampling import Mask, deepest, visible_objects
from demo_model.scenes import make_scene
from triton_sam.demo import demo_repository
from triton_sam.export.checkpoints import checkpoint_from_pair
from triton_sam.export.sam2 import build_model, predictor
from triton_sam.specs import FAMILIES

HELD_OUT_SEED = 77_000
OBJECTS_PER_SCENE = 6


def load_predictor(config: Path, checkpoint: Path) -> Any:
    """The official image predictor around a published checkpoint."""
    return predictor(build_model(str(config), checkpoint))


def shipped_checkpoint(config: Path, folder: Path) -> Path:
    """The checkpoint of the demo model that comes with the package, written into ``folder``."""
    family, root = FAMILIES["sam2"], demo_repository()
    encoder, decoder = (root / model.name / "1/model.onnx" for model in family.models)
    return checkpoint_from_pair(encoder, decoder, str(config), folder / "sam2.1_demo.pt")


def iou(ours: Mask, truth: Mask) -> float:
    """Intersection over union of two masks of one shape."""
    either = int((ours | truth).sum())
    return float((ours & truth).sum()) / either if either else 1.0


def bounding_box(mask: Mask) -> npt.NDArray[np.float32]:
    """The box (x0, y0, x1, y1) of a mask, in pixels."""
    ys, xs = np.nonzero(mask)
    return np.array([xs.min(), ys.min(), xs.max(), ys.max()], dtype=np.float32)


def random_inside(rng: np.random.Generator, mask: Mask) -> tuple[float, float]:
    """A pixel (x, y) drawn evenly from the mask without its outermost ring."""
    inner = ndimage.binary_erosion(mask, iterations=3)
    ys, xs = np.nonzero(inner if inner.any() else mask)
    index = int(rng.integers(len(xs)))
    return float(xs[index]), float(ys[index])


@dataclass
class Figures:
    """IoUs per way of asking, one entry per object."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        """Note one object's IoU."""
        self.values.setdefault(name, []).append(value)

    def summary(self) -> dict[str, dict[str, float]]:
        """Mean with its standard error, median, share at 0.75 and more, lowest, per way of asking.

        The error is that of objects drawn one by one (deviation / √n). Those of one scene are
        more alike than that, so it is rather too small.
        """
        return {
            name: {
                "objects": len(v),
                "mean": round(float(np.mean(v)), 4),
                "error": round(float(np.std(v) / np.sqrt(max(len(v) - 1, 1))), 4),
                "median": round(float(np.median(v)), 4),
                "at_least_0.75": round(float(np.mean(np.array(v) >= 0.75)), 4),
                "lowest": round(min(v), 4),
            }
            for name, v in self.values.items()
        }


def ask(predictor: Any, truth: Mask, rng: np.random.Generator, figures: Figures) -> None:
    """Ask for one object in all ways and note the IoUs against its mask."""
    point, one = np.array([deepest(truth)]), np.array([1])
    masks, _, logits = predictor.predict(point, one, multimask_output=False)
    figures.add("one click", iou(masks[0] > 0, truth))
    points, labels, mask = point, one, masks[0] > 0
    for _ in range(2):
        wrong = mask ^ truth
        if not wrong.any():
            break
        x, y = deepest(wrong)
        points = np.vstack([points, [x, y]])
        labels = np.append(labels, int(truth[int(y), int(x)]))
        masks, _, logits = predictor.predict(
            points, labels, mask_input=logits, multimask_output=False
        )
        mask = masks[0] > 0
    figures.add("one click, two corrections", iou(mask, truth))
    masks, quality, _ = predictor.predict(point, one, multimask_output=True)
    figures.add("one click, best of 3 as predicted", iou(masks[quality.argmax()] > 0, truth))
    masks, _, _ = predictor.predict(box=bounding_box(truth), multimask_output=False)
    figures.add("box", iou(masks[0] > 0, truth))
    anywhere = np.array([random_inside(rng, truth)])
    masks, _, _ = predictor.predict(anywhere, one, multimask_output=False)
    figures.add("one click anywhere inside", iou(masks[0] > 0, truth))


def held_out(predictor: Any, scenes: range, size: int = 1024) -> Figures:
    """Figures over the fresh scenes with the given numbers, of ``size`` px, six objects each."""
    figures = Figures()
    for index in tqdm(scenes, desc="held out", unit="scene"):
        rng = np.random.default_rng([HELD_OUT_SEED, index])
        scene = make_scene(rng, size)
        objects = rng.permutation(visible_objects(scene.labels))[:OBJECTS_PER_SCENE]
        if not len(objects):
            continue
        predictor.set_image(scene.image)
        for label in objects:
            ask(predictor, scene.labels == label, rng, figures)
    return figures


def overlay(image: npt.NDArray[np.uint8], masks: list[Mask], marks: list[Any]) -> Image.Image:
    """The picture with masks in colour; marks are clicks (x, y) or boxes (x0, y0, x1, y1)."""
    canvas = image.astype(np.float32)
    colours = np.array(
        [[255, 60, 60], [60, 200, 60], [80, 120, 255], [255, 180, 0], [220, 60, 255]]
    )
    for index, mask in enumerate(masks):
        canvas[mask] = 0.45 * canvas[mask] + 0.55 * colours[index % len(colours)]
        edge = mask ^ ndimage.binary_erosion(mask)
        canvas[edge] = colours[index % len(colours)]
    picture = Image.fromarray(canvas.astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for mark in marks:
        if len(mark) == 4:
            pen.rectangle([float(v) for v in mark], outline="cyan")
        else:
            x, y = mark
            pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill="white", outline="black")
    return picture


def write_summary(summary: dict[str, dict[str, float]], path: Path) -> None:
    """Store figures as JSON."""
    path.write_text(json.dumps(summary, indent=2) + "\n")


PHOTOGRAPHS: dict[str, list[tuple[float, ...]]] = {
    "coins": [
        *((45, 54), (99, 56), (155, 51), (271, 119), (44, 124), (205, 124), (102, 196), (154, 198)),
        *((317, 106, 355, 144), (18, 233, 74, 287), (144, 236, 200, 287)),
    ],
    "coffee": [(172, 18, 406, 208)],
}
"""Clicks (x, y) and boxes (x0, y0, x1, y1), pixels of scikit-image's sample photographs."""


def answer(predictor: Any, prompt: tuple[float, ...]) -> tuple[Mask, float]:
    """The single mask for a click or a box on the current image, and its predicted quality."""
    if len(prompt) == 4:
        masks, quality, _ = predictor.predict(box=np.array(prompt), multimask_output=False)
    else:
        masks, quality, _ = predictor.predict(
            np.array([prompt]), np.array([1]), multimask_output=False
        )
    return masks[0] > 0, float(quality[0])


def photograph(name: str) -> npt.NDArray[np.uint8]:
    """A sample photograph of scikit-image as RGB."""
    from skimage import data

    image = np.asarray(getattr(data, name)())
    if image.ndim == 2:
        image = np.stack([image] * 3, -1)
    return np.ascontiguousarray(image[..., :3], dtype=np.uint8)


def coins() -> list[Mask]:
    """The 24 coins of scikit-image's photograph, by its watershed example.

    The method and the two grey levels are those of its "Comparing edge-based and region-based
    segmentation"; regions of a few pixels, which are no coins, are left out.
    """
    from skimage import data, filters, measure, segmentation

    image = data.coins()
    markers = np.where(image > 150, 2, np.where(image < 30, 1, 0))
    found = segmentation.watershed(filters.sobel(image), markers) == 2
    regions = measure.label(ndimage.binary_fill_holes(found))
    masks = [regions == number for number in range(1, regions.max() + 1)]
    return [mask for mask in masks if mask.sum() > 100]


def ask_for_coins(predictor: Any) -> Figures:
    """IoU with the watershed's coins, by a click in the middle of each and by its box."""
    figures = Figures()
    predictor.set_image(photograph("coins"))
    for mask in coins():
        figures.add("coins, one click", iou(answer(predictor, deepest(mask))[0], mask))
        figures.add("coins, box", iou(answer(predictor, tuple(bounding_box(mask)))[0], mask))
    return figures


def draw_answers(
    predictor: Any, image: npt.NDArray[np.uint8], prompts: list[tuple[float, ...]]
) -> Image.Image:
    """Ask for each prompt on an image and draw the masks and prompts over it."""
    predictor.set_image(image)
    masks = [answer(predictor, prompt)[0] for prompt in prompts]
    return overlay(image, masks, prompts)


def write_pictures(predictor: Any, folder: Path, scenes: int = 8) -> None:
    """Overlays on held-out scenes (one click per object, four to a row) and on photographs."""
    folder.mkdir(parents=True, exist_ok=True)
    tiles = []
    for index in range(scenes):
        rng = np.random.default_rng([HELD_OUT_SEED, index])
        scene = make_scene(rng, 1024)
        objects = rng.permutation(visible_objects(scene.labels))[:OBJECTS_PER_SCENE]
        clicks: list[tuple[float, ...]] = [deepest(scene.labels == label) for label in objects]
        tiles.append(draw_answers(predictor, scene.image, clicks).resize((384, 384)))
    sheet = Image.new("RGB", (4 * 384, (scenes + 3) // 4 * 384))
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (index % 4 * 384, index // 4 * 384))
    sheet.save(folder / "demo-scenes.png")
    for name, prompts in PHOTOGRAPHS.items():
        draw_answers(predictor, photograph(name), prompts).save(folder / f"demo-{name}.png")
