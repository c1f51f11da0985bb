"""What the tests share: checkpoints with random weights, their exports and a server for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

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

# Of the random weights: where 0 gives no mask with pixels of both kinds.
SEEDS = {"sam3": 3}


@dataclass(frozen=True)
class Exported:
    """A checkpoint, the repository that it was exported to, and what the exporter measured."""

    family: Family
    variant: str
    model_cfg: str
    checkpoint: Path
    repository: Path
    differences: list[Difference]

    def model(self) -> torch.nn.Module:
        return WRAPPERS[self.family.name].build_model(self.model_cfg, self.checkpoint)

    def predictor(self) -> Predictor:
        return WRAPPERS[self.family.name].predictor(self.model())

    def file(self, model: str) -> Path:
        """The ONNX file of the model of that name."""
        spec = next(spec for spec in self.family.models if spec.name == model)
        return self.repository / model / "1" / spec.file


def export_random(family: Family, variant: str, folder: Path, cfg: str | None = None) -> Exported:
    """The pair of a checkpoint with random weights; ``cfg``: not the variant's configuration."""
    cfg = cfg or family.variant(variant).model_cfg
    checkpoint = make_checkpoint(family, cfg, folder / f"{variant}.pt", SEEDS.get(family.name, 0))
    repository = folder / "repository"
    differences = export(family, variant, checkpoint, repository, model_cfg=cfg, default=True)
    return Exported(family, variant, cfg, checkpoint, repository, differences)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """The smallest configuration of a family, by name, with random weights; exported once."""

    @cache
    def export_once(name: str) -> Exported:
        variant, cfg = SMALL[name]
        return export_random(FAMILIES[name], variant, tmp_path_factory.mktemp(name), cfg)

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
