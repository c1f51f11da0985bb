"""A checkpoint, read back out of an exported pair."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from triton_sam.export.sam2 import build_model


def checkpoint_from_pair(encoder: Path, decoder: Path, model_cfg: str, path: Path) -> Path:
    """The checkpoint that an exported pair came from, as far as images need it.

    The exporter leaves weights under their own names, so the pair holds the checkpoint. What
    only video needs (memory) keeps a random initialisation.
    """
    weights = _initializers(encoder, {"model.": ""})
    weights |= _initializers(
        decoder, {"prompt_encoder.": "sam_prompt_encoder.", "mask_decoder.": "sam_mask_decoder."}
    )
    state = build_model(model_cfg, None).state_dict()
    known = {name: torch.from_numpy(value) for name, value in weights.items() if name in state}
    assert sum(value.numel() for value in known.values()) > 4_500_000
    state.update(known)
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
