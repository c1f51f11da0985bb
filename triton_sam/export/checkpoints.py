"""Checkpoints in the official format that nobody has to download, for tests and measurements."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from ..specs import Family
from . import sam2
from .wrappers import WRAPPERS

# The last layer of a mask's hypernetwork, as Meta's packages and transformers name it.
_MASK_LAYER = re.compile(r"output_hypernetworks_mlps\.\d+\.(layers\.2|proj_out)\.")


def make_checkpoint(family: Family, model_cfg: str, path: Path, seed: int = 0) -> Path:
    """Write a checkpoint of ``family`` with random weights for the configuration ``model_cfg``.

    The initialisation leaves many parameters at zero (biases, positional embeddings) and so
    would hide where an export drops them: every parameter gets some noise. The last layer of
    each mask's hypernetwork gets more, so that logits of both signs and masks of some size
    come out.
    """
    torch.manual_seed(seed)
    wrapper = WRAPPERS[family.name]
    model = wrapper.build_model(model_cfg, None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.02 if parameter.ndim > 1 else 0.1
            parameter.add_(torch.randn_like(parameter), alpha=noise)
            if _MASK_LAYER.search(name):
                parameter.mul_(4)
    wrapper.save_checkpoint(model, path)
    return path


def checkpoint_from_pair(encoder: Path, decoder: Path, model_cfg: str, path: Path) -> Path:
    """Write the SAM 2 checkpoint that an exported pair came from, as far as images need it.

    ``encoder``, ``decoder``: the ONNX files. The exporter leaves weights under their own names,
    so the pair holds the checkpoint. What only video needs keeps a random initialisation.
    """
    weights = _initializers(encoder, {"model.": ""})
    weights |= _initializers(
        decoder, {"prompt_encoder.": "sam_prompt_encoder.", "mask_decoder.": "sam_mask_decoder."}
    )
    model = sam2.build_model(model_cfg, None)
    state = model.state_dict()
    state.update((name, torch.from_numpy(weights[name])) for name in state.keys() & weights.keys())
    model.load_state_dict(state)
    sam2.save_checkpoint(model, path)
    return path


def _initializers(path: Path, prefixes: dict[str, str]) -> dict[str, NDArray[np.float32]]:
    found = {}
    for initializer in onnx.load(str(path)).graph.initializer:
        for prefix, replacement in prefixes.items():
            if initializer.name.startswith(prefix):
                name = replacement + initializer.name.removeprefix(prefix)
                found[name] = onnx.numpy_helper.to_array(initializer).copy()
    return found
