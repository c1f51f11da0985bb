"""What the tests share: checkpoints with random weights, their exports and a server for one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from triton_sam.export.checkpoints import make_checkpoint
from triton_sam.export.parity import Difference, Predictor
from triton_sam.export.pipeline import export
from triton_sam.export.wrappers import WRAPPERS
from triton_sam.server import EmbeddedServer
from triton_sam.specs import FAMILIES, Family

SPEC = FAMILIES["sam2"]

# The smallest configuration of each family that can be exported, and the variant it stands for.
SMALL = {
    "sam1": ("vit_b", "sam1_small.yaml"),
    "sam2": ("demo", "sam2.1_demo.yaml"),
    "sam3": ("tracker", "sam3_small.yaml"),
}

# Of the random weights: where those of 0 give masks that are empty, full or a few pixels.
SEEDS = {"sam3": 10}


@dataclass(frozen=True)
class Exported:
    """A checkpoint, the repository that it was exported to, and what the exporter measured."""

    name: str
    variant: str
    model_cfg: str
    checkpoint: Path
    repository: Path
    differences: list[Difference]

    @property
    def family(self) -> Family:
        return FAMILIES[self.name]

    def model(self) -> torch.nn.Module:
        return WRAPPERS[self.name].build_model(self.model_cfg, self.checkpoint)

    def predictor(self) -> Predictor:
        return WRAPPERS[self.name].predictor(self.model())

    def file(self, model: str) -> Path:
        """The ONNX file of the model of that name."""
        spec = next(spec for spec in self.family.models if spec.name == model)
        return self.repository / model / "1" / spec.file

    def manifest(self, model: str) -> Any:
        """What the exporter wrote about the model of that name."""
        return json.loads((self.file(model).parent / "export.json").read_text())


def export_random(name: str, variant: str, folder: Path, cfg: str | None = None) -> Exported:
    """The pair of a checkpoint with random weights; ``cfg``: not the variant's configuration."""
    family = FAMILIES[name]
    cfg = cfg or family.variant(variant).model_cfg
    checkpoint = make_checkpoint(family, cfg, folder / f"{variant}.pt", SEEDS.get(name, 0))
    repository = folder / "repository"
    differences = export(family, variant, checkpoint, repository, model_cfg=cfg, default=True)
    return Exported(name, variant, cfg, checkpoint, repository, differences)


def export_apart(name: str, variant: str, folder: Path) -> Exported:
    """:func:`export_random` in a process of its own, which gives its memory back when it ends."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(export_random, name, variant, folder).result()


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """The smallest configuration of a family, by name, with random weights; exported once."""

    @cache
    def export_once(name: str) -> Exported:
        variant, cfg = SMALL[name]
        return export_random(name, variant, tmp_path_factory.mktemp(name), cfg)

    return export_once


@pytest.fixture(scope="session", params=SMALL)
def each(request: pytest.FixtureRequest, small: Callable[[str], Exported]) -> Exported:
    """:func:`small` of one family after the other."""
    return small(request.param)


@pytest.fixture(scope="session")
def exported(small: Callable[[str], Exported]) -> Exported:
    """:func:`small` of SAM 2."""
    return small("sam2")


@pytest.fixture(scope="session")
def server(exported: Exported) -> Iterator[EmbeddedServer]:
    """An embedded server for :func:`exported`."""
    with EmbeddedServer(exported.repository) as running:
        yield running
