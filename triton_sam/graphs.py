"""ONNX graphs that others made: where their weights lie, and what their borders are made of.

Needs the ``onnx`` package. Weights are never loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    StringStringEntryProto,
    TensorProto,
    helper,
    load_model,
)

from .errors import CheckpointError

# Offsets into external data are multiples of this, so that the file can be mapped into memory.
_ALIGNMENT = 1 << 16


def read_graph(path: Path) -> ModelProto:
    """The model in ``path`` without the weights beside it.

    Raises :class:`CheckpointError` when it is not an ONNX file.
    """
    try:
        model = load_model(str(path), load_external_data=False)
    except DecodeError as exc:
        raise CheckpointError(f"{path} is damaged or is no ONNX file; download it again.") from exc
    if not model.graph.node:
        raise CheckpointError(f"{path} is an ONNX file without a graph; download it again.")
    return model


@dataclass(frozen=True)
class External:
    """A tensor whose ``length`` bytes lie in the file ``location`` from ``offset`` on."""

    tensor: TensorProto
    location: str
    offset: int
    length: int


def external_tensors(graph: GraphProto) -> Iterator[External]:
    """Every tensor of ``graph`` and of the graphs in it that has its data in another file."""
    for tensor in _tensors(graph):
        if tensor.data_location == TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            length = int(entries["length"]) if "length" in entries else _nbytes(tensor)
            location, offset = entries.get("location", ""), int(entries.get("offset", 0))
            yield External(tensor, location, offset, length)


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    for each in _with_subgraphs(graph):
        yield from each.initializer
        for sparse in each.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        for attribute in _attributes(each):
            yield from [attribute.t, *attribute.tensors]


def _with_subgraphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for attribute in _attributes(graph):
        for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
            yield from _with_subgraphs(inner)


def _attributes(graph: GraphProto) -> Iterator[AttributeProto]:
    for node in graph.node:
        yield from node.attribute


def _nbytes(tensor: TensorProto) -> int:
    itemsize = int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    return int(math.prod(tensor.dims)) * itemsize


def gather_data(graph: GraphProto, folder: Path, name: str) -> list[Path]:
    """Let every external tensor of ``graph`` point into one file called ``name``.

    Returns the files in ``folder`` that make it up, in order, each to begin at a multiple of
    :func:`align`. Raises :class:`CheckpointError` when one is missing or too short.
    """
    starts: dict[str, int] = {}
    end = 0
    for external in list(external_tensors(graph)):
        source = _data_file(folder, external)
        if external.location not in starts:
            starts[external.location] = end
            end = align(end + source.stat().st_size)
        offset = starts[external.location] + external.offset
        _point_to(external, name, offset)
    return [folder / location for location in starts]


def align(position: int) -> int:
    """``position``, or the next one at which a data file may begin."""
    return -(-position // _ALIGNMENT) * _ALIGNMENT


def _data_file(folder: Path, external: External) -> Path:
    name = external.location
    if not name or name in (".", "..") or Path(name).name != name:
        raise CheckpointError(
            f"The tensor {external.tensor.name!r} has its data in {name!r}; expected a file beside "
            "the model. Download the model again."
        )
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, where the model's weights are; download it.")
    needed, there = external.offset + external.length, path.stat().st_size
    if there < needed:
        raise CheckpointError(
            f"{path} has {there} bytes, and the model needs {needed} of it; download it again."
        )
    return path


def _point_to(external: External, name: str, offset: int) -> None:
    values = {"location": name, "offset": str(offset), "length": str(external.length)}
    del external.tensor.external_data[:]
    external.tensor.external_data.extend(
        StringStringEntryProto(key=key, value=value) for key, value in values.items()
    )


def widen_borders(graph: GraphProto) -> list[str]:
    """Make float16 inputs and outputs of ``graph`` float32, with a cast behind and before them.

    Returns the names of those that were changed.
    """
    inputs = [value for value in graph.input if _is_half(value.type)]
    outputs = [value for value in graph.output if _is_half(value.type)]
    names = {value.name: f"{value.name}_float16" for value in [*inputs, *outputs]}
    _rename(graph, lambda name: names.get(name, name))
    for value in [*inputs, *outputs]:
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    nodes = [_cast(value.name, names[value.name], TensorProto.FLOAT16) for value in inputs]
    nodes += graph.node
    nodes += [_cast(names[value.name], value.name, TensorProto.FLOAT) for value in outputs]
    del graph.node[:]
    graph.node.extend(nodes)
    return list(names)


def _is_half(type_proto: object) -> bool:
    elem_type: int = type_proto.tensor_type.elem_type  # type: ignore[attr-defined]
    return elem_type == TensorProto.FLOAT16


def _cast(source: str, target: str, to: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{target}_cast", to=to)


def _rename(graph: GraphProto, new: Callable[[str], str]) -> None:
    """Rename what nodes read and write, also where graphs inside of them read it."""
    for each in _with_subgraphs(graph):
        for node in each.node:
            node.input[:] = map(new, node.input)
            node.output[:] = map(new, node.output)
        # An inner graph may answer with a value of the outer one.
        for value in [*each.value_info, *(each.output if each is not graph else [])]:
            value.name = new(value.name)
