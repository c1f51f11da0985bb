"""The ONNX pair that others have published on the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from ..errors import InvalidInputError, OfflineError
from ..files import write_atomically
from ..specs import PublishedPair
from .hub import hub_file, list_files
from .remote import RemoteFile
from .transfer import Patience


def published_files(
    pair: PublishedPair,
    precision: str | None,
    checkpoints: Path,
    *,
    offline: bool = False,
    refresh: bool = False,
    patience: Patience | None = None,
) -> list[RemoteFile]:
    """The files of ``pair`` in one ``precision``, each model followed by its external data.

    They go into a folder of the repository's name in ``checkpoints``, below it as on the hub.
    Which files have external data beside them, only the hub knows: its answer is kept there, so
    that it is asked once; ``refresh`` asks again.

    Raises :class:`InvalidInputError` for a precision that is not published, and
    :class:`OfflineError` when the hub would have to be asked.
    """
    name = precision or next(iter(pair.precisions))
    if name not in pair.precisions:
        known = ", ".join(pair.precisions)
        raise InvalidInputError(f"{pair.repository} has no {name!r}; choose one of: {known}.")
    folder = checkpoints / PurePosixPath(pair.repository).name.lower()
    models = _models(pair, name)
    kept = folder / f".files-{name}.json"
    if kept.is_file() and (offline or not refresh):
        found: Mapping[str, int | None] = json.loads(kept.read_text())
    elif offline:
        found = _copied(pair, models, folder)
    else:
        found = _ask(pair, models)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, json.dumps(found, indent=1).encode())
    return [
        hub_file(pair.repository, path, folder / path, nbytes=nbytes, patience=patience)
        for path, nbytes in found.items()
    ]


def _models(pair: PublishedPair, precision: str) -> tuple[str, str]:
    """Paths of the encoder's and the decoder's ONNX file in the repository."""
    suffix = pair.precisions[precision]
    return f"{pair.encoder}{suffix}.onnx", f"{pair.decoder}{suffix}.onnx"


def _ask(pair: PublishedPair, models: tuple[str, str]) -> dict[str, int | None]:
    """Path and size of the models and of the data files beside them."""
    there = list_files(pair.repository, str(PurePosixPath(models[0]).parent))
    missing = [model for model in models if model not in there]
    if missing:
        known = sorted(path for path in there if path.endswith(".onnx"))
        raise InvalidInputError(
            f"{pair.repository} does not hold {' and '.join(missing)}; choose another variant. "
            f"It has {', '.join(known)}."
        )
    return {
        path: nbytes
        for model in models
        for path, nbytes in sorted(there.items())
        if path == model or path.startswith(f"{model}_data")
    }


def _copied(pair: PublishedPair, models: tuple[str, str], folder: Path) -> dict[str, int | None]:
    """What somebody copied here, when the hub was never asked."""
    if not all((folder / model).is_file() for model in models):
        raise OfflineError(
            f"Offline, and the pair {pair.repository} is missing: {' and '.join(models)}, each "
            f"with its _data file where there is one, from https://huggingface.co/"
            f"{pair.repository}/tree/main, to be put below {folder.absolute()}."
        )
    return {
        str(path.relative_to(folder)): None
        for model in models
        for path in sorted((folder / model).parent.glob(f"{Path(model).name}*"))
        if path.name.endswith(".onnx") or "_data" in path.suffix
    }
