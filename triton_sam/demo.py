"""The demo: a real photo, a small model of our own and an embedded server."""

from __future__ import annotations

import hashlib
import lzma
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .client import SAM2TritonClient
from .files import write_atomically
from .images import load_image
from .masks import Segmentation
from .pictures import draw_prompts, write_png
from .repository import graph_files, write_configs
from .server import EmbeddedServer
from .server.install import default_home
from .specs import FAMILIES, MANIFEST_FILE, Model

_ASSETS = package_files("triton_sam") / "assets"
_FAMILY = FAMILIES["sam2"]

_ENLARGED = 3

# In pixels of the enlarged photo.
_PROMPTS: dict[str, dict[str, Any]] = {
    "coin-1": {"point_coords": [[300, 168]], "point_labels": [1]},
    "coin-2": {"point_coords": [[638, 580]], "point_labels": [1]},
    "coin-3": {"point_coords": [[1008, 372]], "point_labels": [1]},
    "coin-4": {"box": [75, 312, 198, 432]},
}


def demo_repository() -> Path:
    """A model repository with the demo model, unpacked once into the user's cache folder.

    The models are stored compressed with the package; the folder's name carries their digest,
    so that a new version unpacks anew.
    """
    packed = {model.name: _packed(model) for model in _FAMILY.models}
    assets = [name for files in packed.values() for name in files.values()]
    digest = hashlib.sha256(b"".join((_ASSETS / name).read_bytes() for name in assets)).hexdigest()
    root = default_home() / f"demo-{digest[:12]}"
    for model in _FAMILY.models:
        folder = root / model.name / "1"
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / MANIFEST_FILE).is_file():
            for name, asset in packed[model.name].items():
                content = lzma.decompress((_ASSETS / asset).read_bytes())
                write_atomically(folder / name, content)
            # Written last: where it is, the model is whole.
            manifest = (_ASSETS / f"{model.name}.json").read_bytes()
            write_atomically(folder / MANIFEST_FILE, manifest)
    write_configs(root, [_FAMILY])
    return root


def _packed(model: Model) -> dict[str, str]:
    """The names of the assets that hold a model's files, by the files' names."""
    graphs = {name: f"{model.name}-{name}.xz" for name in graph_files(_FAMILY, model)}
    return {model.file: f"{model.name}.onnx.xz", **graphs}


def demo_photo() -> Image.Image:
    """Greek coins from Pompeii, 384×303 enlarged three times, which makes for smooth outlines.

    Brooklyn Museum Collection, no known copyright restrictions; as shipped with scikit-image.
    """
    photo = load_image(_ASSETS.joinpath("coins.png").read_bytes())
    return photo.resize((photo.width * _ENLARGED, photo.height * _ENLARGED))


def run(output: Path) -> None:
    """Segment the photo and write the overlay and the masks into ``output``; says what it does."""
    output.mkdir(parents=True, exist_ok=True)
    photo = demo_photo()
    with _timed("Demo model unpacked"):
        repository = demo_repository()
    server = EmbeddedServer(repository)
    try:
        with _timed("Triton server started, both models loaded"):
            server.start()
        results = _segment(server.http_url, photo)
    finally:
        server.stop()
    for name, result in results.items():
        path = output / f"mask-{name}.png"
        result.to_png(path)
        print(f"  {path}: {int(result.area[0, 0])} pixels, score {float(result.scores[0, 0]):.2f}")
    picture = _picture(photo, list(results.values()))
    write_png(picture, output / "overlay.png")
    write_png(photo, output / "photo.png")
    print(f"  {output / 'overlay.png'}: look at this one\n")
    print("The same on an image of yours:")
    print("  triton-sam segment IMAGE --point X,Y --embedded --demo -o out.png")
    print("The demo model is small and was trained on synthetic scenes. For Meta's masks export a")
    print('SAM 2.1 checkpoint: see "Serve SAM 2.1 or SAM 1" in the README.')


def _segment(url: str, photo: Image.Image) -> dict[str, Segmentation]:
    results = {}
    with SAM2TritonClient(url) as client:
        with _timed(f"Photo of {photo.width}×{photo.height} encoded"):
            client.set_image(photo)
        for name, prompt in _PROMPTS.items():
            with _timed(f"{name} from one {'box' if 'box' in prompt else 'click'}"):
                results[name] = client.segment(**prompt)
    return results


def _picture(photo: Image.Image, results: list[Segmentation]) -> Image.Image:
    together = Segmentation(
        masks=np.concatenate([result.masks for result in results]),
        scores=np.concatenate([result.scores for result in results]),
        logits=np.concatenate([result.logits for result in results]),
    )
    picture = together.overlay(photo)
    for prompt in _PROMPTS.values():
        points, labels = prompt.get("point_coords", ()), prompt.get("point_labels", ())
        picture = draw_prompts(picture, points, labels, prompt.get("box"))
    return picture


@contextmanager
def _timed(what: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds = time.perf_counter() - started
    print(f"{seconds:7.2f} s  {what}", flush=True)
