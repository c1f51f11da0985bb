"""The ONNX pair that others publish for a family, installed under the family's own config."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from . import repository as model_repository
from .errors import CheckpointError, InvalidInputError, MissingExtraError
from .specs import Family, Model, PublishedPair

logger = logging.getLogger(__name__)

# What every ONNX Runtime in a Triton container since 2024 loads.
_MAX_IR, _MAX_OPSET = 10, 20


def install(spec: Family, folder: Path, repository: Path, precision: str = "fp32") -> None:
    """Install the pair in ``folder`` into the model repository ``repository``.

    ``folder``: the published files as they were downloaded, or the folder in it where they lie;
    ``precision``: which of them, a key of ``spec.published.precisions``. They stay where they
    are. In the repository each model gets the file names of the table and its weights in one file;
    float16 inputs and outputs are cast to the table's float32.

    Nothing is installed unless both models are whole and have the inputs and outputs of the
    table. Raises :class:`InvalidInputError` for a precision that there is none of,
    :class:`CheckpointError` for files that are missing, damaged or of another model, and
    :class:`MissingExtraError` when the ``onnx`` package is not installed.
    """
    pair = _published(spec, precision)
    sources = {
        model.name: _find(folder, f"{path}{pair.precisions[precision]}.onnx")
        for model, path in zip(spec.models, (pair.encoder, pair.decoder), strict=True)
    }
    repository.mkdir(parents=True, exist_ok=True)
    # On the file system of the repository, so that installing is a rename.
    with tempfile.TemporaryDirectory(prefix=".published-", dir=repository) as scratch:
        files, described = {}, {}
        for model in spec.models:
            target = Path(scratch) / model.name / model.file
            target.parent.mkdir()
            described[model.name] = _prepare(sources[model.name], model, target)
            files[model.name] = target
        origin = {"repository": pair.repository, "precision": precision, "models": described}
        manifest = {"family": spec.name, "variant": precision, "published": origin}
        model_repository.install(repository, spec, files, manifest)


def _published(spec: Family, precision: str) -> PublishedPair:
    if spec.published is None:
        raise InvalidInputError(
            f"Nobody publishes an ONNX pair of {spec.title} that is known here."
        )
    if precision not in spec.published.precisions:
        known = ", ".join(spec.published.precisions)
        raise InvalidInputError(
            f"{spec.published.repository} has no precision {precision!r}; choose one of: {known}."
        )
    return spec.published


def _find(folder: Path, path: str) -> Path:
    """The file that is at ``path`` in the published repository."""
    candidates = (folder / path, folder / PurePosixPath(path).name)
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise CheckpointError(f"No {PurePosixPath(path).name} in {folder}; download it first.")


def _prepare(source: Path, model: Model, target: Path) -> dict[str, Any]:
    """Write ``source`` as ``target``, fit for the table; what the manifest says about it."""
    try:
        from onnx import save_model

        from . import graphs
    except ImportError as exc:
        raise MissingExtraError(
            "Reading an ONNX file needs the onnx package: pip install 'triton-sam[server]'"
        ) from exc
    proto = graphs.read_graph(source)
    _warn_of_newer_formats(source, proto)
    data = graphs.gather_data(proto.graph, source.parent, model.data_file)
    widened = graphs.widen_borders(proto.graph)
    save_model(proto, str(target))
    problem = next(model_repository.graph_problems(target, model.without_ours()), None)
    if problem is not None:
        raise CheckpointError(f"{source} is not {model.name} as the table has it: {problem}")
    _join(data, target.with_name(model.data_file), graphs.align)
    return {
        "files": {path.name: model_repository.describe_file(path) for path in (source, *data)},
        "widened": widened,
        "ir_version": proto.ir_version,
        "opsets": {opset.domain or "ai.onnx": opset.version for opset in proto.opset_import},
    }


def _warn_of_newer_formats(source: Path, proto: Any) -> None:
    opset = max((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), default=0)
    if proto.ir_version > _MAX_IR or opset > _MAX_OPSET:
        logger.warning(
            "%s has IR %d and opset %d; servers older than the one that this project names load up "
            "to IR %d and opset %d.",
            source.name,
            proto.ir_version,
            opset,
            _MAX_IR,
            _MAX_OPSET,
        )


def _join(sources: list[Path], target: Path, align: Any) -> None:
    """Copy ``sources`` one after the other into ``target``.

    Copies, since readers of ONNX files refuse data behind links, symbolic or hard.
    """
    if not sources:
        return
    with target.open("wb") as file:
        for source in sources:
            file.seek(align(file.tell()))
            with source.open("rb") as part:
                shutil.copyfileobj(part, file, 1 << 22)
