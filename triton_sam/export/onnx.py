"""Trace a module to an ONNX file that Triton's ONNX Runtime backend loads."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx.external_data_helper import convert_model_to_external_data
from torch import nn

from ..specs import Model, Tensor

# The lowest opset with LayerNormalization. Every ONNX Runtime that a Triton container carries
# loads opset 17 and IR 8; what a current onnx package writes by default, none of them does.
OPSET = 17
IR_VERSION = 8

_NUMPY = {"float32": np.float32, "int64": np.int64}


# A protobuf message ends at 2 GiB, and the graph needs its share of that.
MAX_INLINE_BYTES = 2_000_000_000


def trace(
    module: nn.Module,
    model: Model,
    examples: tuple[torch.Tensor, ...],
    folder: Path,
    max_inline_bytes: int = MAX_INLINE_BYTES,
) -> Path:
    """Write ``module`` into ``folder`` with the file name, inputs and outputs of ``model``.

    ``examples``: one tensor an input, in the order of ``model.inputs``; an axis that is ``-1``
    in the table accepts any length afterwards. Weights keep the names that they have in
    ``module`` (constants are folded by ONNX Runtime when it loads the file). Weights of more
    than ``max_inline_bytes`` in all go into ``model.data_file`` beside it. Returns the file.
    """
    tensors = model.inputs + model.outputs
    # Of a large model the tracer writes a file for each weight.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        traced = Path(scratch) / model.file
        with torch.no_grad(), warnings.catch_warnings():
            # Traced shape checks, and the deprecation of the tracer: the dynamo exporter fails
            # on the encoder with a batch axis of any length.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module.eval(),
                examples,
                str(traced),
                dynamo=False,
                opset_version=OPSET,
                do_constant_folding=False,
                input_names=[tensor.name for tensor in model.inputs],
                output_names=[tensor.name for tensor in model.outputs],
                dynamic_axes={tensor.name: _symbolic(tensor) for tensor in tensors},
            )
        proto = onnx.load(str(traced))
    _finish(model, proto)
    return save(proto, model, folder, max_inline_bytes)


def save(
    proto: onnx.ModelProto, model: Model, folder: Path, max_inline_bytes: int = MAX_INLINE_BYTES
) -> Path:
    """Write a graph into ``folder`` as ``model.file``, large weights into ``model.data_file``."""
    if sum(len(weight.raw_data) for weight in proto.graph.initializer) > max_inline_bytes:
        convert_model_to_external_data(proto, location=model.data_file)
    onnx.save(proto, str(folder / model.file))
    return folder / model.file


def _symbolic(tensor: Tensor) -> dict[int, str]:
    return {
        axis: f"{tensor.name}_{axis}" for axis, length in enumerate(tensor.dims) if length == -1
    }


def _finish(model: Model, proto: onnx.ModelProto) -> None:
    """Give optional inputs their defaults and drop what tells where the file was made."""
    for tensor in model.inputs:
        if tensor.default is not None:
            shape, value = tensor.default
            array = np.full(shape, value, _NUMPY[tensor.dtype])
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, tensor.name))
    for node in proto.graph.node:
        node.doc_string = ""
    proto.ir_version = IR_VERSION
