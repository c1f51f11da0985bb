"""What the tests share: a checkpoint with random weights, its export and a server for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from triton_sam.export import sam2
from triton_sam.export.checkpoints import make_checkpoint
from triton_sam.export.parity import Difference
from triton_sam.export.pipeline import export
from triton_sam.server import EmbeddedServer
from triton_sam.specs import FAMILIES

SPEC = FAMILIES["sam2"]


@dataclass(frozen=True)
class Exported:
    """A checkpoint, the repository that it was exported to, and what the exporter measured."""

    model_cfg: str
    checkpoint: Path
    repository: Path
    differences: list[Difference]

    def model(self) -> torch.nn.Module:
        return sam2.build_model(self.model_cfg, self.checkpoint)


def export_random(variant: str, folder: Path) -> Exported:
    cfg = SPEC.variant(variant).model_cfg
    checkpoint = make_checkpoint(cfg, folder / f"{variant}.pt")
    differences = export(SPEC, variant, checkpoint, folder / "repository")
    return Exported(cfg, checkpoint, folder / "repository", differences)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The smallest configuration with random weights, exported."""
    return export_random("demo", tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="session")
def server(exported: Exported) -> Iterator[EmbeddedServer]:
    """An embedded server for :func:`exported`."""
    with EmbeddedServer(exported.repository) as running:
        yield running
