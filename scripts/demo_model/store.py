"""Scenes on disk: drawn once, read many times.

A store is a folder of shards ``NNNN-images.npy`` (uint8, N x S x S x 3) and ``NNNN-labels.npy``
(uint8, N x S x S).  A shard appears under its final name only when it is complete, so training may
read a store that is still being filled.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tqdm import tqdm

from demo_model.scenes import Bytes, Scene, make_scene


def write_shard(folder: Path, index: int, count: int, size: int, seed: int) -> None:
    """Draw ``count`` scenes of ``size`` px; scene i of the shard depends on (seed, index, i)."""
    images = np.empty((count, size, size, 3), dtype=np.uint8)
    labels = np.empty((count, size, size), dtype=np.uint8)
    for i in tqdm(range(count), desc=f"shard {index}", unit="scene"):
        scene = make_scene(np.random.default_rng([seed, index, i]), size)
        images[i], labels[i] = scene.image, scene.labels
    folder.mkdir(parents=True, exist_ok=True)
    # The labels come first: a reader looks for the images and then finds both.
    for name, array in (("labels", labels), ("images", images)):
        part = folder / f".{index:04d}-{name}.part.npy"
        np.save(part, array)
        part.replace(folder / f"{index:04d}-{name}.npy")


def fill(folder: Path, shards: int, count: int, size: int, seed: int) -> None:
    """Write the shards 0 … shards-1 that the store does not hold yet."""
    for index in range(shards):
        if not (folder / f"{index:04d}-images.npy").exists():
            write_shard(folder, index, count, size, seed)


class SceneStore:
    """The complete shards of a folder, read through memory maps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images: list[Bytes] = []
        self.labels: list[Bytes] = []
        self.refresh()
        if not self.images:
            raise FileNotFoundError(
                f"{folder} holds no scenes; draw some with: train_demo_model.py scenes {folder}"
            )

    def refresh(self) -> None:
        """Take up shards that were completed since the last look."""
        while (path := self.folder / f"{len(self.images):04d}-images.npy").exists():
            labels = path.with_name(path.name.replace("images", "labels"))
            self.images.append(np.load(path, mmap_mode="r"))
            self.labels.append(np.load(labels, mmap_mode="r"))

    def held_out(self) -> SceneStore:
        """The store's first shard, which `draw` of this store leaves out."""
        other = SceneStore.__new__(SceneStore)
        other.folder = self.folder
        other.images, other.labels = self.images[:1] * 2, self.labels[:1] * 2
        return other

    def draw(self, rng: np.random.Generator) -> Scene:
        """A scene at random, from any shard but the first, which is kept for watching progress."""
        shard = int(rng.integers(1, len(self.images)))
        index = int(rng.integers(len(self.images[shard])))
        return Scene(np.asarray(self.images[shard][index]), np.asarray(self.labels[shard][index]))
