"""Checkpoints in the official format that nobody has to download, for tests and measurements."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

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


def checkpoint_from_pair(encoder: Path, decoder: Path, model_cfg: str, path: Path) -> Path:
    """Write the checkpoint that an exported pair came from, as far as images need it.

    ``encoder``, ``decoder``: the ONNX files. The exporter leaves weights under their own names,
    so the pair holds the checkpoint. What only video needs keeps a random initialisation.
    """
    weights = _initializers(encoder, {"model.": ""})
    weights |= _initializers(
        decoder, {"prompt_encoder.": "sam_prompt_encoder.", "mask_decoder.": "sam_mask_decoder."}
    )
    state = build_model(model_cfg, None).state_dict()
    state.update((name, torch.from_numpy(weights[name])) for name in state.keys() & weights.keys())
    torch.save({"model": state}, path)
    return path


def _initializers(path: Path, prefixes: dict[str, str]) -> dict[str, NDArray[np.float32]]:
    found = {}
    for initializer in onnx.load(str(path)).graph.initializer:
        for prefix, replacement in prefixes.items():
            if initializer.name.startswith(prefix):
                name = replacement + initializer.name.removeprefix(prefix)
                found[name] = onnx.numpy_helper.to_array(initializer).copy()
    return found
