"""A checkpoint's weights: read without running what the file may hold, and put into a model."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError


def read(checkpoint: Path) -> Any:
    """What ``torch.save`` wrote; only tensors are unpickled.

    Raises :class:`CheckpointError` when there is no file or it is something else.
    """
    if not checkpoint.is_file():
        raise CheckpointError(f"No checkpoint at {checkpoint}; download it first.")
    try:
        return torch.load(checkpoint, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as exc:
        raise CheckpointError(
            f"{checkpoint} is damaged or is not a PyTorch checkpoint; download it again."
        ) from exc


def load(model: nn.Module, state: Mapping[str, Tensor], checkpoint: Path, model_cfg: str) -> None:
    """Give ``model``, of the configuration ``model_cfg``, the weights ``state``.

    Raises :class:`CheckpointError` when a name or a shape differs.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as exc:
        detail = " ".join(str(exc).split())[:300]
        raise CheckpointError(
            f"{checkpoint} does not belong to {model_cfg}; choose the variant that it was made "
            f"for. {detail}"
        ) from exc
