"""Half precision: weights and arithmetic in float16, inputs and outputs in float32."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import onnx
from onnx import GraphProto, NodeProto, TensorProto
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

from ..errors import ExportError
from ..specs import Family, Model
from ..specs.split import split_decoder
from .onnx import save
from .parity import Difference, Predictor, compare, compare_served, photos
from .split import share_weights

MASK_IOU = 0.99
"""Smallest overlap allowed between a half-precision model's mask and the official one."""

_TIE = 0.01
"""Official scores that are this close say the same: half precision may choose the other mask."""

# Where positions become angles: float16 knows pixels above 512 only to the half.
_ANGLES = ("Sin", "Cos")

# The weights by which SAM 2's encoder resizes its positions.
_STRETCH = "stretch_"

# How the converter names the casts that it puts in.
_INSERTED = re.compile(r"_cast_to_fp(16|32)_node$|^graph_(in|out)put_cast\d+$")


@dataclass(frozen=True)
class Recipe:
    """What stays in float32: all that positions are computed from, and some kinds of nodes."""

    keeps: str
    ops: tuple[str, ...] = ()


_NORMS = ("LayerNormalization", "ReduceMean", "Pow", "Sqrt", "Softmax")

# Tried in this order, until masks are right.
RECIPES = (
    Recipe("positions"),
    Recipe("positions, norms, softmax", _NORMS),
    Recipe("positions, norms, softmax, sums, activations", (*_NORMS, "Add", "Erf", "Sigmoid")),
)


@dataclass(frozen=True)
class Halved:
    """A pair in half precision that has passed, and what was tried before it.

    ``failed``: the first mask that was wrong, by what was kept in float32 then. ``served``: how
    the predictor's graphs did; none where they did not pass and were left out.
    """

    files: dict[str, Path]
    recipe: Recipe
    differences: list[Difference]
    failed: dict[str, str]
    served: list[Difference]

    def as_dict(self) -> dict[str, object]:
        return {
            "precision": "fp16",
            "kept_in_float32": self.recipe.keeps,
            "failed": self.failed,
            "predictor_parity": [one.as_dict() for one in self.served],
        }


def halve(family: Family, predictor: Predictor, files: Mapping[str, Path], scratch: Path) -> Halved:
    """The pair in half precision, with as little kept in float32 as photos allow.

    ``files``: the float32 pair by model name. Raises :class:`ExportError` when some mask of a
    photo still overlaps with the official one by less than :data:`MASK_IOU`.
    """
    failed: dict[str, str] = {}
    for number, recipe in enumerate(RECIPES):
        halves = {}
        root = scratch / f"half-{number}"
        for model in family.models:
            folder = root / model.name / "1"
            folder.mkdir(parents=True)
            halves[model.name] = convert(files[model.name], model, recipe, folder)
        differences = compare(family, predictor, halves, photos(), _TIE)
        wrong = _wrong(differences)
        if not wrong:
            source = files[family.decoder.name].parent
            served = _halve_split(family, predictor, source, RECIPES[number:], root)
            return Halved(halves, recipe, differences, failed, served)
        failed[recipe.keeps] = str(min(wrong, key=lambda found: found.mask_iou))
        shutil.rmtree(root)
    tried = "; ".join(f"with {keeps} in float32: {found}" for keeps, found in failed.items())
    raise ExportError(
        f"In half precision masks overlap with the official ones by less than {MASK_IOU}; nothing "
        f"was installed. The worst {tried}."
    )


def _wrong(differences: list[Difference]) -> list[Difference]:
    # Written so that a NaN is a failure.
    return [found for found in differences if not found.mask_iou >= MASK_IOU]


def _halve_split(
    family: Family, predictor: Predictor, source: Path, recipes: Iterable[Recipe], root: Path
) -> list[Difference]:
    """Put the predictor's graphs in half precision beside the decoder in ``root``.

    ``source``: the folder of the float32 ones. Returns how they did, or nothing where none of
    ``recipes`` makes them right; then there are none.
    """
    decoder = root / family.decoder.name / "1" / family.decoder.file
    graphs = split_decoder(family).graphs
    for recipe in recipes:
        for model in graphs:
            share_weights(convert(source / model.file, model, recipe, decoder.parent), decoder)
        differences = compare_served(family, predictor, root, photos(), _TIE)
        if not _wrong(differences):
            return differences
    for model in graphs:
        (decoder.parent / model.file).unlink()
    return []


def convert(source: Path, model: Model, recipe: Recipe, folder: Path) -> Path:
    """Write the float32 file ``source`` of ``model`` in half precision into ``folder``.

    Optional inputs keep their float32 defaults. External data of ``source`` lie beside it.
    Returns the file.
    """
    proto = onnx.load(str(source), load_external_data=False)
    defaults = _take_defaults(proto.graph, model)
    kept = sorted(_positions(proto.graph))
    # From a file the converter infers shapes also of what is too large for a message.
    with tempfile.NamedTemporaryFile(dir=source.parent, suffix=".onnx") as stripped:
        onnx.save(proto, stripped.name)
        half = convert_float_to_float16(
            stripped.name,
            keep_io_types=True,
            op_block_list=[*DEFAULT_OP_BLOCK_LIST, *recipe.ops],
            node_block_list=kept,
        )
    # Inferred shapes may be narrower than those that are promised.
    del half.graph.output[:]
    half.graph.output.extend(proto.graph.output)
    _shorten(half.graph)
    _sort(half.graph)
    half.graph.initializer.extend(defaults)
    return save(half, model, folder)


def _take_defaults(graph: GraphProto, model: Model) -> list[TensorProto]:
    """Remove the defaults of optional inputs, which the converter would turn to float16."""
    optional = {tensor.name for tensor in model.inputs if tensor.optional}
    defaults = [initializer for initializer in graph.initializer if initializer.name in optional]
    for initializer in defaults:
        graph.initializer.remove(initializer)
    return defaults


def _positions(graph: GraphProto) -> set[str]:
    """The names of all nodes that sines, cosines and resized positions need, and of those."""
    producer = {output: node for node in graph.node for output in node.output}
    found: set[str] = set()
    waiting = [
        node
        for node in graph.node
        if node.op_type in _ANGLES or any(name.startswith(_STRETCH) for name in node.input)
    ]
    while waiting:
        node = waiting.pop()
        if node.name not in found:
            found.add(node.name)
            waiting += [producer[name] for name in node.input if name in producer]
    return found


def _shorten(graph: GraphProto) -> None:
    """Take out detours: float32 to float16 and back between two nodes kept in float32."""
    ours = list(_drop_twins([node for node in graph.node if _INSERTED.search(node.name)], graph))
    down = {node.output[0]: node.input[0] for node in _casts(ours, TensorProto.FLOAT16)}
    shortcut = {
        node.output[0]: down[node.input[0]]
        for node in _casts(ours, TensorProto.FLOAT)
        if node.input[0] in down
    }
    outputs = {value.name for value in graph.output}
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = shortcut.get(name, name)
    for to in (TensorProto.FLOAT, TensorProto.FLOAT16):
        used = {name for node in graph.node for name in node.input} | outputs
        for node in list(_casts(ours, to)):
            if node.output[0] not in used:
                graph.node.remove(node)


def _drop_twins(casts: list[NodeProto], graph: GraphProto) -> Iterator[NodeProto]:
    """The casts, each once: the converter repeats those of a tensor that several nodes take."""
    seen = set()
    for node in casts:
        if node.output[0] in seen:
            graph.node.remove(node)
        else:
            seen.add(node.output[0])
            yield node


def _sort(graph: GraphProto) -> None:
    """Bring the nodes into an order of computation; the converter puts its casts at the end."""
    producer = {output: i for i, node in enumerate(graph.node) for output in node.output}
    order = TopologicalSorter(
        {
            i: {producer[name] for name in node.input if name in producer}
            for i, node in enumerate(graph.node)
        }
    )
    nodes = [graph.node[i] for i in order.static_order()]
    del graph.node[:]
    graph.node.extend(nodes)


def _casts(nodes: Iterable[NodeProto], to: int) -> Iterator[NodeProto]:
    return (node for node in nodes if node.op_type == "Cast" and node.attribute[0].i == to)
