"""Each family's wrapper: its official model, what is traced from it, and its predictor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from torch import Tensor, nn

from ..specs import Family
from . import sam1, sam2, sam3
from .parity import Predictor


class Wrapper(Protocol):
    """What a family's module in this package has.

    ``PACKAGES``: the distributions, by name, that the model and the predictor come from.
    """

    PACKAGES: tuple[str, ...]

    def build_model(self, model_cfg: str, checkpoint: Path | None) -> nn.Module:
        """The official model in evaluation mode; without ``checkpoint`` with random weights.

        Raises :class:`InvalidInputError` for a configuration that there is none of, and
        :class:`CheckpointError` for a checkpoint that cannot be used with it.
        """

    def save_checkpoint(self, model: nn.Module, path: Path) -> None:
        """Write the weights of ``model`` in the official format."""

    def modules(
        self, model: nn.Module, family: Family
    ) -> Mapping[str, tuple[nn.Module, tuple[Tensor, ...]]]:
        """What is traced: for each model of ``family`` the module and example inputs."""

    def predictor(self, model: nn.Module) -> Predictor:
        """The official predictor on ``model``."""


WRAPPERS: Mapping[str, Wrapper] = MappingProxyType({"sam1": sam1, "sam2": sam2, "sam3": sam3})
