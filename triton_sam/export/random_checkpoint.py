"""A checkpoint with random weights, in the official format: for tests and measurements."""

from __future__ import annotations

from pathlib import Path

import torch

from .sam2 import build_model


def make_checkpoint(model_cfg: str, path: Path, seed: int = 0) -> Path:
    """Write ``{"model": state_dict}`` for ``model_cfg``.

    The initialisation leaves many parameters at zero (biases, positional embeddings) and so
    would hide where an export drops them: every parameter gets some noise. The last layer of
    each mask's hypernetwork gets more, so that logits of both signs and masks of some size
    come out.
    """
    torch.manual_seed(seed)
    model = build_model(model_cfg, None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.02 if parameter.ndim > 1 else 0.1
            parameter.add_(torch.randn_like(parameter), alpha=noise)
            if "output_hypernetworks_mlps" in name and ".layers.2." in name:
                parameter.mul_(4)
    torch.save({"model": model.state_dict()}, path)
    return path
