#!/usr/bin/env python3
"""A pair whose masks are its image: for checks that need many encodings, each told from the others.

The tensors are SAM 2.1's in names and shapes, so that an encoded image takes as much memory, and
what lies between takes milliseconds: the encoder projects averaged pixels onto its features, the
decoder takes them back out. With ``multimask_output`` a click is answered with three masks, the
image's red, green and blue (:func:`logits_of`), and as scores its x and y as shares of the image's
sides, and its label; without it with the first of each.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike, NDArray
from onnx import TensorProto, helper, numpy_helper

from triton_sam.repository import install
from triton_sam.specs import FAMILIES, Model, Tensor

FAMILY = FAMILIES["sam2"]
_SCALE = 60.0


def logits_of(values: ArrayLike) -> NDArray[np.float32]:
    """What a mask has where a channel has ``values`` of 0 to 255."""
    return ((np.asarray(values, np.float32) / 255 - 0.5) * _SCALE).astype(np.float32)


def install_plain_pair(repository: Path) -> None:
    """Put the pair into ``repository``, with its configurations and its predictor's."""
    rng = np.random.default_rng(0)
    weights = [
        rng.standard_normal((tensor.dims[1], 3)).astype(np.float32)
        for tensor in FAMILY.encoder.outputs
    ]
    graphs = {
        FAMILY.encoder.name: _encoder(weights),
        FAMILY.decoder.name: _decoder([np.linalg.pinv(weight) for weight in weights]),
    }
    repository.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=repository) as folder:
        files = {name: Path(folder) / f"{name}.onnx" for name in graphs}
        for name, graph in graphs.items():
            onnx.save(graph, files[name])
        install(repository, FAMILY, files, {"source": "scripts/plain_pair.py"})


def _encoder(weights: list[NDArray[np.float32]]) -> onnx.ModelProto:
    pixels, nodes, constants = FAMILY.encoder.inputs[0].name, [], []
    for tensor, weight in zip(FAMILY.encoder.outputs, weights, strict=True):
        step = FAMILY.image.size // tensor.dims[2]
        pooled, name = f"pooled_{step}", f"weights_{step}"
        nodes.append(_pool(pixels, pooled, step))
        nodes.append(helper.make_node("Conv", [pooled, name], [tensor.name]))
        constants.append(numpy_helper.from_array(weight[:, :, None, None], name))
    return _model(FAMILY.encoder, nodes, constants)


def _pool(source: str, target: str, step: int) -> onnx.NodeProto:
    square = [step, step]
    return helper.make_node("AveragePool", [source], [target], kernel_shape=square, strides=square)


def _decoder(inverses: list[NDArray[np.float32]]) -> onnx.ModelProto:
    layout, nodes, colours = FAMILY.prompts, [], []
    constants: dict[str, NDArray[Any]] = {
        "scale": np.array(_SCALE / len(inverses), np.float32),
        "offset": np.array(_SCALE / 2, np.float32),
        "side": np.array(FAMILY.image.size, np.float32),
        "zero": np.array(0, np.float32),
        "first": np.array(0, np.int64),
        "rows": np.array([-1, 1, 1, 1], np.int64),
        "one": np.array([1], np.float32),
        "two": np.array([2], np.float32),
        "none": np.array([0], np.int64),
        "channels": np.array([1], np.int64),
    }
    for tensor, inverse in zip(FAMILY.encoder.outputs, inverses, strict=True):
        name, factor = f"{tensor.name}_inverse", layout.mask_size // tensor.dims[2]
        constants[name] = inverse[:, :, None, None].astype(np.float32)
        constants[f"{name}_factor"] = np.array([1, 1, factor, factor], np.float32)
        nodes += [
            helper.make_node("Conv", [tensor.name, name], [f"{name}_small"]),
            helper.make_node(
                "Resize",
                [f"{name}_small", "", f"{name}_factor"],
                [f"{name}_large"],
                mode="nearest",
                coordinate_transformation_mode="asymmetric",
                nearest_mode="floor",
            ),
        ]
        colours.append(f"{name}_large")
    nodes += [
        helper.make_node("Sum", colours, ["colours"]),
        helper.make_node("Mul", ["colours", "scale"], ["scaled"]),
        helper.make_node("Sub", ["scaled", "offset"], ["logits"]),
        helper.make_node("Gather", [layout.points, "first"], ["point"], axis=1),
        helper.make_node("Div", ["point", "side"], ["shares"]),
        helper.make_node("Gather", [layout.labels, "first"], ["label"], axis=1),
        helper.make_node("Unsqueeze", ["label", "channels"], ["labels"]),
        # All inputs have a part in the answer: others ONNX Runtime would leave out.
        helper.make_node("ReduceSum", [layout.mask], ["mask_sum"], keepdims=0),
        helper.make_node("ReduceSum", [layout.has_mask], ["has_mask_sum"], keepdims=0),
        helper.make_node("Sum", ["labels", "mask_sum", "has_mask_sum"], ["options"]),
        helper.make_node("Concat", ["shares", "options"], ["three_scores"], axis=1),
        helper.make_node("Mul", ["labels", "zero"], ["object_score_logits"]),
        helper.make_node("Reshape", ["object_score_logits", "rows"], ["zeros"]),
        helper.make_node("Add", ["logits", "zeros"], ["three_masks"]),
        # One or three.
        helper.make_node("Mul", [layout.multimask, "two"], ["more"]),
        helper.make_node("Add", ["more", "one"], ["count"]),
        helper.make_node("Cast", ["count"], ["end"], to=TensorProto.INT64),
        *(
            helper.make_node("Slice", [source, "none", "end", "channels"], [target])
            for source, target in (("three_masks", FAMILY.masks), ("three_scores", FAMILY.scores))
        ),
    ]
    named = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    defaults = [
        numpy_helper.from_array(np.full(*tensor.default, np.float32), tensor.name)
        for tensor in FAMILY.decoder.inputs
        if tensor.default is not None
    ]
    return _model(FAMILY.decoder, nodes, [*named, *defaults])


def _model(
    model: Model, nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto]
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        model.name,
        [_declared(tensor) for tensor in model.inputs],
        [_declared(tensor) for tensor in model.outputs],
        constants,
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(made)
    return made


def _declared(tensor: Tensor) -> onnx.ValueInfoProto:
    dims = [
        length if length > 0 else f"{tensor.name}_{axis}" for axis, length in enumerate(tensor.dims)
    ]
    return helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, dims)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and install the pair."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("repository", type=Path, help="where to install it; made when missing")
    install_plain_pair(parser.parse_args(arguments).repository)
    return 0


if __name__ == "__main__":
    sys.exit(main())
