"""Trace a module to an ONNX file that Triton's ONNX Runtime backend loads."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from ..specs import Model, Tensor

# The lowest opset with LayerNormalization. Every ONNX Runtime that a Triton container carries
# loads opset 17 and IR 8; what a current onnx package writes by default, none of them does.
OPSET = 17
IR_VERSION = 8

_NUMPY = {"float32": np.float32, "int64": np.int64}


def trace(module: nn.Module, model: Model, examples: tuple[torch.Tensor, ...], path: Path) -> None:
    """Write ``module`` to ``path`` with the inputs and outputs of ``model``.

    ``examples``: one tensor an input, in the order of ``model.inputs``; an axis that is ``-1``
    in the table accepts any length afterwards. Weights keep the names that they have in
    ``module`` (constants are folded by ONNX Runtime when it loads the file).
    """
    tensors = model.inputs + model.outputs
    with torch.no_grad(), warnings.catch_warnings():
        # Traced shape checks, and the deprecation of the tracer: the dynamo exporter fails on
        # the encoder with a batch axis of any length.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            examples,
            str(path),
            dynamo=False,
            opset_version=OPSET,
            do_constant_folding=False,
            input_names=[tensor.name for tensor in model.inputs],
            output_names=[tensor.name for tensor in model.outputs],
            dynamic_axes={tensor.name: _symbolic(tensor) for tensor in tensors},
        )
    _finish(model, path)


def _symbolic(tensor: Tensor) -> dict[int, str]:
    return {
        axis: f"{tensor.name}_{axis}" for axis, length in enumerate(tensor.dims) if length == -1
    }


def _finish(model: Model, path: Path) -> None:
    """Give optional inputs their defaults and drop what tells where the file was made."""
    proto = onnx.load(str(path))
    for tensor in model.inputs:
        if tensor.default is not None:
            shape, value = tensor.default
            array = np.full(shape, value, _NUMPY[tensor.dtype])
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, tensor.name))
    for node in proto.graph.node:
        node.doc_string = ""
    proto.ir_version = IR_VERSION
    onnx.save(proto, str(path))
