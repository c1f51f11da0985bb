"""The model repository on disk: rendered from the table, and held against it.

::

    model_repository/
      sam2_encoder/config.pbtxt        committed; rendered by `triton-sam configure`
      sam2_encoder/1/model.onnx        made by `triton-sam export sam2`
      sam2_encoder/1/export.json       the manifest: where it came from, and its parity
      sam2_decoder/...
      sam2_decoder/1/click.onnx        with prepare.onnx and mask.onnx: what the predictor runs
                                       in place of the decoder, with the decoder's weights
      sam2_predictor/config.pbtxt      committed; runs the pair beside it, in the backend `sam`
      sam2_predictor/1/pair.json       the hashes of that pair
      sam2_large_encoder/...           another variant, beside the default one
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import MissingExtraError, RepositoryError
from .files import sha256, write_atomically
from .specs import FAMILIES, MANIFEST_FILE, Family, Model, Tensor
from .specs.predictor import predictor_model
from .specs.split import split_decoder

if TYPE_CHECKING:
    import onnx

PAIR_FILE = "pair.json"

HEADER = "# Rendered by `triton-sam configure` from triton_sam/specs: edit there.\n"
_INSTANCES = re.compile(r"^instance_group \[ \{ count: (\d+) \} \]$", re.MULTILINE)
_TRITON_TYPES = {
    "float32": "TYPE_FP32",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "uint8": "TYPE_UINT8",
    "bool": "TYPE_BOOL",
    "string": "TYPE_STRING",
}


@dataclass(frozen=True)
class Problem:
    """Something wrong with one model: what it is, and what to do about it."""

    model: str
    message: str

    def __str__(self) -> str:
        return f"{self.model}: {self.message}"


def render_config(model: Model, instances: int = 1) -> str:
    """The ``config.pbtxt`` of ``model``; ``instances``: how many on each GPU, or on the CPU.

    ``dynamic_batching { }`` with ``max_batch_size: 0`` batches nothing: it is what lets Triton
    drop a cancelled request that still waits. It stays empty on purpose, since priorities,
    queue limits and timeouts make the batcher sleep beside an idle instance. ``count`` is
    always there and 1 by default, because two instances on a CPU, Triton's own default, are two
    sessions that compete for the same cores. No ``kind``: GPU where there is one, else CPU.
    """
    return (
        HEADER
        + f'name: "{model.name}"\n'
        + 'backend: "onnxruntime"\n'
        + f'default_model_filename: "{model.file}"\n'
        + "max_batch_size: 0\n"
        + render_tensors("input", model.inputs)
        + render_tensors("output", model.outputs)
        + f"instance_group [ {{ count: {instances} }} ]\n"
        + "dynamic_batching { }\n"
    )


def render_predictor(family: Family) -> str:
    """The ``config.pbtxt`` of the predictor of ``family``, which runs the pair beside it.

    ``dynamic_batching { }`` as for the pair: it lets a request that is cancelled before the
    backend has it leave the queue. One instance for each GPU, whatever the pair has: each keeps
    images of its own, and a second one would have to encode them again.
    """
    model = predictor_model(family)
    parameters = {"family": family.name, "variant": family.served_variant}
    return (
        HEADER
        + f'name: "{model.name}"\n'
        + 'backend: "sam"\n'
        + "max_batch_size: 0\n"
        + render_tensors("input", model.inputs)
        + render_tensors("output", model.outputs)
        + "".join(
            f'parameters {{ key: "{key}" value: {{ string_value: "{value}" }} }}\n'
            for key, value in parameters.items()
            if value
        )
        + "instance_group [ { count: 1 } ]\n"
        + "dynamic_batching { }\n"
    )


def render_tensors(kind: str, tensors: Iterable[Tensor]) -> str:
    """The list of ``input`` or ``output`` tensors of a configuration."""
    return f"{kind} [\n" + ",\n".join(_render_tensor(tensor) for tensor in tensors) + "\n]\n"


def _render_tensor(tensor: Tensor) -> str:
    dims = ", ".join(str(length) for length in tensor.dims)
    optional = " optional: true" if tensor.optional else ""
    data_type = _TRITON_TYPES[tensor.dtype]
    return f'  {{ name: "{tensor.name}" data_type: {data_type} dims: [ {dims} ]{optional} }}'


def write_configs(
    root: Path, families: Iterable[Family] | None = None, instances: int | None = None
) -> list[Path]:
    """Write each model's ``config.pbtxt`` and version folder; the files written are returned.

    ``families``: without it every family, and the other variants that are installed.
    ``instances``: how many of each model on a GPU; ``None`` keeps the number of the file that
    is there, or takes 1.
    """
    if families is None:
        others = [family for family in installed(root) if family not in FAMILIES.values()]
        families = [*FAMILIES.values(), *others]
    written = []
    for name, render in _configs(root, families):
        (root / name / "1").mkdir(parents=True, exist_ok=True)
        path = root / name / "config.pbtxt"
        count = configured_instances(path) if instances is None else instances
        write_atomically(path, render(count).encode())
        written.append(path)
    return written


def _configs(root: Path, families: Iterable[Family]) -> Iterator[tuple[str, Callable[[int], str]]]:
    """Each model's name, and what renders its configuration for a number of instances."""
    for family in families:
        for model in family.models:
            yield model.name, partial(render_config, _as_installed(root, model))
        yield predictor_model(family).name, partial(_render_predictor, family)


def _render_predictor(family: Family, instances: int) -> str:
    return render_predictor(family)


def configured_instances(config: Path) -> int:
    """The number of instances in the file ``config``; 1 where it does not say."""
    found = _INSTANCES.search(config.read_text()) if config.is_file() else None
    return int(found[1]) if found else 1


def install(
    root: Path, family: Family, files: Mapping[str, Path], manifest: dict[str, Any]
) -> None:
    """Move a family's exported models into ``root``, each with its manifest.

    ``files``: the ONNX file of each model by model name, on the file system of ``root``. Beside it
    lie external data, under its name and ``_data`` (the graph must name them as
    :attr:`Model.data_file`), and beside the decoder the predictor's graphs, if there are any.
    ``manifest``: what the models have in common; each one's own hash is added. The key
    ``published`` in it says that others exported the pair.
    """
    for model in family.models:
        folder = root / model.name / "1"
        folder.mkdir(parents=True, exist_ok=True)
        source = files[model.name]
        data = source.with_name(f"{source.name}_data")
        own = {"model": model.name, **describe_file(source)}
        if data.exists():
            own["data"] = describe_file(data)
        graphs = {name: source.with_name(name) for name in graph_files(family, model)}
        graphs = {name: graph for name, graph in graphs.items() if graph.is_file()}
        if graphs:
            own["graphs"] = {name: describe_file(graph) for name, graph in graphs.items()}
        # Without its manifest the old model is no longer vouched for, should this be cut short.
        for name in (MANIFEST_FILE, model.data_file, *graph_files(family, model)):
            (folder / name).unlink(missing_ok=True)
        if data.exists():
            data.replace(folder / model.data_file)
        source.replace(folder / model.file)
        for name, graph in graphs.items():
            graph.replace(folder / name)
        content = json.dumps({**own, **manifest}, indent=2) + "\n"
        write_atomically(folder / MANIFEST_FILE, content.encode())
    write_configs(root, [family])
    _stamp_predictor(root, family)


def graph_files(family: Family, model: Model) -> list[str]:
    """The files of the predictor's graphs that lie beside the file of ``model``."""
    return [graph.file for graph in split_decoder(family).graphs if graph.name == model.name]


def _stamp_predictor(root: Path, family: Family) -> None:
    """Say in the predictor's folder which pair it runs.

    Triton loads a model anew only when something in its own folder has changed.
    """
    pair: dict[str, str | None] = {}
    for model in family.models:
        manifest = read_manifest(root, model.name) or {}
        pair[model.name] = manifest.get("sha256")
        graphs = manifest.get("graphs", {}).items()
        pair |= {f"{model.name}/{name}": graph["sha256"] for name, graph in graphs}
    folder = root / predictor_model(family).name / "1"
    write_atomically(folder / PAIR_FILE, (json.dumps(pair, indent=2) + "\n").encode())


def describe_file(path: Path) -> dict[str, Any]:
    """What a manifest says about a file: its hash and its size in bytes."""
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


def describe_checkpoint(path: Path, digest: Callable[[Path], str] | None = None) -> dict[str, Any]:
    """As :func:`describe_file`, also for a checkpoint that is a folder.

    A folder's hash is that of the lines ``<sha256>  <name>`` of its files, in the order of their
    names (what ``sha256sum *`` prints); its size is their sum. What a download keeps beside them
    does not count. ``digest``: gives a file's SHA-256 where it is known without reading it.
    """
    files = sorted(filter(_is_content, path.iterdir())) if path.is_dir() else [path]
    hashes = {file.name: (digest or sha256)(file) for file in files}
    lines = "".join(f"{value}  {name}\n" for name, value in hashes.items())
    return {
        "sha256": hashlib.sha256(lines.encode()).hexdigest()
        if path.is_dir()
        else hashes[path.name],
        "bytes": sum(file.stat().st_size for file in files),
    }


def _is_content(path: Path) -> bool:
    beside = path.name.startswith(".") or path.suffix in {".sha256", ".part", ".etag"}
    return path.is_file() and not beside


def _as_installed(root: Path, model: Model) -> Model:
    """``model`` with the inputs of our own exports where one of ours is installed."""
    manifest = read_manifest(root, model.name)
    ours = manifest is not None and "published" not in manifest
    return model if ours else model.without_ours()


def read_manifest(root: Path, model: str) -> dict[str, Any] | None:
    """The manifest beside ``model``'s file, or ``None`` when there is none that can be read."""
    try:
        content = json.loads((root / model / "1" / MANIFEST_FILE).read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def check(root: Path, families: Iterable[Family] | None = None) -> list[Problem]:
    """What is missing, stale or mismatched between the table, the configs and the models.

    ``families``: those to check; without it those of which a model is installed, or all where
    none is. An empty list means that a server started on ``root`` serves what the table says.

    Raises :class:`RepositoryError` when ``root`` is not a folder and :class:`MissingExtraError`
    when the ``onnx`` package, which reads the models' own inputs and outputs, is not installed.
    """
    if not root.is_dir():
        raise RepositoryError(f"No model repository at {root}; `triton-sam configure` makes one.")
    problems: list[Problem] = []
    for family in installed(root) or FAMILIES.values() if families is None else families:
        for model in family.models:
            problems += (Problem(model.name, message) for message in _check_model(root, model))
        problems += _check_pair(root, family)
        problems += _check_graphs(root, family)
        problems += _check_predictor(root, family)
    return problems


def installed(root: Path) -> list[Family]:
    """The families and variants of which a model is in ``root``, each with its own names."""
    named = [family.named(variant) for family in FAMILIES.values() for variant in family.variants]
    return [
        family
        for family in named
        if any((root / model.name / "1" / model.file).exists() for model in family.models)
    ]


def _check_model(root: Path, model: Model) -> Iterator[str]:
    model = _as_installed(root, model)
    config = root / model.name / "config.pbtxt"
    if not config.is_file():
        yield "config.pbtxt is missing; run `triton-sam configure`."
    elif config.read_text() != render_config(model, configured_instances(config)):
        yield "config.pbtxt differs from the table; run `triton-sam configure`."
    path = root / model.name / "1" / model.file
    if not path.is_file():
        yield f"1/{model.file} is missing; run `triton-sam export`."
        return
    manifest = read_manifest(root, model.name)
    if manifest is None:
        yield f"1/{MANIFEST_FILE} is missing or unreadable, so the model's origin is unknown."
    else:
        yield from _check_files(path, path.with_name(model.data_file), manifest)
    yield from graph_problems(path, model)


def _check_files(path: Path, data: Path, manifest: dict[str, Any]) -> Iterator[str]:
    described = {path: manifest.get("sha256")}
    if "data" in manifest:
        described[data] = manifest["data"].get("sha256")
    for name, graph in manifest.get("graphs", {}).items():
        described[path.with_name(name)] = graph.get("sha256")
    for file, expected in described.items():
        if not file.is_file():
            yield f"1/{file.name} is missing; export the model again."
        elif sha256(file) != expected:
            yield (
                f"1/{file.name} is not the file that 1/{MANIFEST_FILE} describes; export it again."
            )


def _check_graphs(root: Path, family: Family) -> Iterator[Problem]:
    for graph in split_decoder(family).graphs:
        path = root / graph.name / "1" / graph.file
        if path.is_file():
            for message in graph_problems(path, graph):
                yield Problem(graph.name, f"1/{graph.file}: {message}")


def _check_predictor(root: Path, family: Family) -> Iterator[Problem]:
    name = predictor_model(family).name
    config = root / name / "config.pbtxt"
    if not config.is_file():
        yield Problem(name, "config.pbtxt is missing; run `triton-sam configure`.")
    elif config.read_text() != render_predictor(family):
        yield Problem(name, "config.pbtxt differs from the table; run `triton-sam configure`.")


def _check_pair(root: Path, family: Family) -> Iterator[Problem]:
    manifests = [read_manifest(root, model.name) for model in family.models]
    origins = {json.dumps(m.get("checkpoint", m.get("published"))) for m in manifests if m}
    if len(origins) > 1:
        yield Problem(
            family.decoder.name,
            f"it comes from another checkpoint than {family.encoder.name}; export both again.",
        )


def graph_problems(path: Path, model: Model) -> Iterator[str]:
    """Where the inputs and outputs of the ONNX file at ``path`` are not those of ``model``."""
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
        yield f"1/{model.file} is damaged; export it again."
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
