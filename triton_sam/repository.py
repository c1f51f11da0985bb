"""The model repository on disk: rendered from the table, and held against it.

::

    model_repository/
      sam2_encoder/config.pbtxt        committed; rendered by `triton-sam configure`
      sam2_encoder/1/model.onnx        made by `triton-sam export sam2`
      sam2_encoder/1/export.json       the manifest: where it came from, and its parity
      sam2_decoder/...
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import MissingExtraError, RepositoryError
from .files import write_atomically
from .specs import FAMILIES, Family, Model, Tensor

if TYPE_CHECKING:
    import onnx

MODEL_FILE = "model.onnx"
MANIFEST_FILE = "export.json"

_HEADER = "# Rendered by `triton-sam configure` from triton_sam/specs.py: edit there.\n"
_TRITON_TYPES = {"float32": "TYPE_FP32", "int64": "TYPE_INT64"}


@dataclass(frozen=True)
class Problem:
    """Something wrong with one model: what it is, and what to do about it."""

    model: str
    message: str

    def __str__(self) -> str:
        return f"{self.model}: {self.message}"


def render_config(model: Model) -> str:
    """The ``config.pbtxt`` of ``model``.

    ``dynamic_batching { }`` with ``max_batch_size: 0`` batches nothing: it is what lets Triton
    drop a cancelled request that still waits. It stays empty on purpose, since priorities,
    queue limits and timeouts make the batcher sleep beside an idle instance. ``count: 1``,
    because two instances on a CPU are two sessions that compete for the same cores. No
    ``kind``: GPU where there is one, else CPU.
    """
    return (
        _HEADER
        + f'name: "{model.name}"\n'
        + 'backend: "onnxruntime"\n'
        + f'default_model_filename: "{MODEL_FILE}"\n'
        + "max_batch_size: 0\n"
        + _render_tensors("input", model.inputs)
        + _render_tensors("output", model.outputs)
        + "instance_group [ { count: 1 } ]\n"
        + "dynamic_batching { }\n"
    )


def _render_tensors(kind: str, tensors: Iterable[Tensor]) -> str:
    return f"{kind} [\n" + ",\n".join(_render_tensor(tensor) for tensor in tensors) + "\n]\n"


def _render_tensor(tensor: Tensor) -> str:
    dims = ", ".join(str(length) for length in tensor.dims)
    optional = " optional: true" if tensor.optional else ""
    data_type = _TRITON_TYPES[tensor.dtype]
    return f'  {{ name: "{tensor.name}" data_type: {data_type} dims: [ {dims} ]{optional} }}'


def write_configs(root: Path, families: Iterable[Family] = FAMILIES.values()) -> list[Path]:
    """Write each model's ``config.pbtxt`` and version folder; the files written are returned."""
    written = []
    for model in _models(families):
        (root / model.name / "1").mkdir(parents=True, exist_ok=True)
        path = root / model.name / "config.pbtxt"
        write_atomically(path, render_config(model).encode())
        written.append(path)
    return written


def install(
    root: Path, family: Family, files: Mapping[str, Path], manifest: dict[str, Any]
) -> None:
    """Move a family's exported models into ``root``, each with its manifest.

    ``files``: the ONNX file of each model by model name, on the file system of ``root``.
    ``manifest``: what the models have in common; each one's own hash is added.
    """
    write_configs(root, [family])
    for model in family.models:
        folder = root / model.name / "1"
        source = files[model.name]
        own = {"model": model.name, "sha256": sha256(source), "bytes": source.stat().st_size}
        # Without its manifest the old model is no longer vouched for, should this be cut short.
        (folder / MANIFEST_FILE).unlink(missing_ok=True)
        source.replace(folder / MODEL_FILE)
        content = json.dumps({**own, **manifest}, indent=2) + "\n"
        write_atomically(folder / MANIFEST_FILE, content.encode())


def read_manifest(root: Path, model: str) -> dict[str, Any] | None:
    """The manifest beside ``model``'s file, or ``None`` when there is none that can be read."""
    try:
        content = json.loads((root / model / "1" / MANIFEST_FILE).read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def sha256(path: Path) -> str:
    """Hex digest of the file at ``path``."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check(root: Path, families: Iterable[Family] = FAMILIES.values()) -> list[Problem]:
    """What is missing, stale or mismatched between the table, the configs and the models.

    An empty list means that a server started on ``root`` serves what the table says. Raises
    :class:`RepositoryError` when ``root`` is not a folder and :class:`MissingExtraError` when
    the ``onnx`` package, which reads the models' own inputs and outputs, is not installed.
    """
    if not root.is_dir():
        raise RepositoryError(f"No model repository at {root}; `triton-sam configure` makes one.")
    problems: list[Problem] = []
    for family in families:
        for model in family.models:
            problems += (Problem(model.name, message) for message in _check_model(root, model))
        problems += _check_pair(root, family)
    return problems


def _models(families: Iterable[Family]) -> Iterator[Model]:
    return (model for family in families for model in family.models)


def _check_model(root: Path, model: Model) -> Iterator[str]:
    config = root / model.name / "config.pbtxt"
    if not config.is_file():
        yield "config.pbtxt is missing; run `triton-sam configure`."
    elif config.read_text() != render_config(model):
        yield "config.pbtxt differs from the table; run `triton-sam configure`."
    path = root / model.name / "1" / MODEL_FILE
    if not path.is_file():
        yield f"1/{MODEL_FILE} is missing; run `triton-sam export`."
        return
    manifest = read_manifest(root, model.name)
    if manifest is None:
        yield f"1/{MANIFEST_FILE} is missing or unreadable, so the model's origin is unknown."
    elif manifest.get("sha256") != sha256(path):
        yield f"1/{MODEL_FILE} is not the file that 1/{MANIFEST_FILE} describes; export it again."
    yield from _check_graph(path, model)


def _check_pair(root: Path, family: Family) -> Iterator[Problem]:
    manifests = [read_manifest(root, model.name) for model in family.models]
    origins = {m["checkpoint"]["sha256"] for m in manifests if m is not None}
    if len(origins) > 1:
        yield Problem(
            family.decoder.name,
            f"it comes from another checkpoint than {family.encoder.name}; export both again.",
        )


def _check_graph(path: Path, model: Model) -> Iterator[str]:
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as exc:
        raise MissingExtraError(
            "Reading a model's inputs and outputs needs the onnx package: "
            "pip install 'triton-sam[server]'"
        ) from exc
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except DecodeError:
        yield f"1/{MODEL_FILE} is damaged; export it again."
        return
    defaults = {initializer.name for initializer in graph.initializer}
    inputs = {value.name: value for value in graph.input}
    outputs = {value.name: value for value in graph.output}
    yield from _check_values("input", model.inputs, inputs)
    yield from _check_values("output", model.outputs, outputs)
    for tensor in model.inputs:
        if tensor.name in inputs and tensor.optional != (tensor.name in defaults):
            yield (
                f"input {tensor.name!r} {'has no' if tensor.optional else 'has a'} default in the "
                f"graph; the table says {'optional' if tensor.optional else 'required'}."
            )


def _check_values(
    kind: str, tensors: tuple[Tensor, ...], values: dict[str, onnx.ValueInfoProto]
) -> Iterator[str]:
    names = [tensor.name for tensor in tensors]
    if sorted(names) != sorted(values):
        yield f"the graph's {kind}s are {sorted(values)}; the table says {sorted(names)}."
    for tensor in tensors:
        if tensor.name not in values:
            continue
        dtype, dims = _describe(values[tensor.name])
        own, table = f"{dtype} {dims}", f"{tensor.dtype} {list(tensor.dims)}"
        # An axis that the graph leaves open may be fixed by the table, not the other way round.
        if dtype != tensor.dtype or not _dims_fit(dims, tensor.dims):
            yield f"{kind} {tensor.name!r} is {own} in the graph, {table} in the table."


def _dims_fit(graph: list[int], table: tuple[int, ...]) -> bool:
    return len(graph) == len(table) and all(
        length in (-1, expected) for length, expected in zip(graph, table, strict=True)
    )


def _describe(value: onnx.ValueInfoProto) -> tuple[str, list[int]]:
    from onnx.helper import tensor_dtype_to_np_dtype

    tensor = value.type.tensor_type
    dims = [d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim]
    return str(tensor_dtype_to_np_dtype(tensor.elem_type)), dims
