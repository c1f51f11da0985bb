"""Which models of a repository can be served: those whose files are there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ..errors import RepositoryError

_WHAT_TO_DO = (
    "Put models there with `triton-sam export`, or let `triton-sam demo` do it with a small one."
)
_FILENAME = re.compile(r'^\s*default_model_filename\s*:\s*"([^"]+)"', re.MULTILINE)
_BACKEND = re.compile(r'^\s*(?:backend|platform)\s*:\s*"([^"]+)"', re.MULTILINE)
_STEP = re.compile(r'\bmodel_name\s*:\s*"([^"]+)"')


@dataclass(frozen=True)
class Models:
    """What to serve: ``names``, and why others are left out (name → reason)."""

    root: Path
    names: tuple[str, ...]
    skipped: dict[str, str]


def find_models(repository: Path) -> Models:
    """The models in ``repository`` whose files are there.

    A repository usually holds the configuration of more models than were exported. Raises
    :class:`RepositoryError` when there is nothing to serve.
    """
    if not repository.is_dir():
        raise RepositoryError(f"There is no model repository at {repository}. {_WHAT_TO_DO}")
    configs = {path.parent.name: path for path in sorted(repository.glob("*/config.pbtxt"))}
    if not configs:
        raise RepositoryError(
            f"The model repository {repository} is empty: no folder in it has a config.pbtxt. "
            f"{_WHAT_TO_DO}"
        )
    texts = {name: path.read_text("utf-8", "replace") for name, path in configs.items()}
    skipped: dict[str, str] = {}
    for name, text in texts.items():
        missing = _missing_file(configs[name].parent, text)
        if missing is not None:
            skipped[name] = f"{missing} is missing"
    whole = {name: text for name, text in texts.items() if name not in skipped}
    skipped.update(_broken_ensembles(whole))
    skipped.update(_lonely_predictors(whole))
    names = tuple(name for name in texts if name not in skipped)
    if not names:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise RepositoryError(
            f"The model repository {repository} has no model to serve ({reasons}). {_WHAT_TO_DO}"
        )
    return Models(repository.resolve(), names, skipped)


def choose(models: Models, patterns: Sequence[str], said_by: str) -> Models:
    """Those of ``models`` that one of ``patterns`` fits, and what they are made of.

    Without patterns all of them. ``said_by``: where the patterns come from, for the message of the
    :class:`RepositoryError` that is raised where they fit none.
    """
    if not patterns:
        return models
    fitting = {n for n in models.names if any(fnmatchcase(n, pattern) for pattern in patterns)}
    needed = {part for name in fitting for part in parts(models.root / name)}
    names = tuple(name for name in models.names if name in fitting | needed)
    if not names:
        raise RepositoryError(
            f"{said_by} is {','.join(patterns)!r}, which fits none of {', '.join(models.names)}."
        )
    return Models(models.root, names, models.skipped)


def _missing_file(folder: Path, config: str) -> str | None:
    """What the model in ``folder`` lacks, as a path inside the repository."""
    versions = [path for path in folder.iterdir() if path.is_dir() and path.name.isdigit()]
    if not versions:
        return f"{folder.name}/1"
    backend = _BACKEND.search(config)
    if backend is None or not backend[1].startswith("onnxruntime"):
        return None
    match = _FILENAME.search(config)
    filename = match[1] if match else "model.onnx"
    if any((version / filename).exists() for version in versions):
        return None
    return f"{folder.name}/{versions[0].name}/{filename}"


def is_predictor(config: str) -> bool:
    """Whether a configuration is that of a predictor, which runs the pair beside it."""
    backend = _BACKEND.search(config)
    return backend is not None and backend[1] == "sam"


def _lonely_predictors(texts: dict[str, str]) -> Iterator[tuple[str, str]]:
    """The predictors among the configurations ``texts`` that lack their pair, and what of it."""
    for name, text in texts.items():
        pair = [name.removesuffix("predictor") + part for part in ("encoder", "decoder")]
        lacking = [model for model in pair if model not in texts]
        if is_predictor(text) and lacking:
            yield name, f"it runs {', '.join(lacking)}"


def _broken_ensembles(texts: dict[str, str]) -> Iterator[tuple[str, str]]:
    """The ensembles among the configurations ``texts`` that lack a part, and which."""
    for name, text in texts.items():
        lacking = [step for step in _STEP.findall(text) if step not in texts]
        if lacking:
            yield name, f"it is made of {', '.join(lacking)}"


def parts(model: Path) -> list[str]:
    """The models that the ensemble in the folder ``model`` is made of; none if it is no ensemble.

    Triton does not start when one of them is missing from what it serves.
    """
    return _STEP.findall((model / "config.pbtxt").read_text("utf-8", "replace"))
