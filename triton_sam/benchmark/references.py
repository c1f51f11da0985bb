"""What the served path is held against in the same run."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InvalidInputError, SamError
from ..images import ImageSource, load_image
from ..repository import describe_checkpoint, read_manifest
from ..specs import Family
from .machine import available_memory
from .server_stats import Watch
from .subjects import Subject, Which, open_client, served

ONNXRUNTIME = "ONNX Runtime, in process"
PYTORCH = "official PyTorch predictor"
NAMES = ("onnxruntime", "pytorch", "inline", "protocol")

_CHECKPOINTS = Path("checkpoints")

_log = logging.getLogger(__name__)


# Bytes of memory for each byte of the files, and beside them. ONNX Runtime keeps the weights twice,
# as they came and as it reads them, and what a run needs; PyTorch keeps the weights alone.
_MEMORY = {"onnxruntime": 4, "pytorch": 2}
_MEMORY_BESIDE = 1 << 30


class Unavailable(SamError):
    """A reference that cannot be had here; the message says why."""


def model_files(root: Path, family: Family) -> dict[str, Path]:
    """The ONNX file of each model of ``family``. Raises :class:`Unavailable` without them."""
    files = {model.name: root / model.name / "1" / model.file for model in family.models}
    missing = [str(path) for path in files.values() if not path.is_file()]
    if missing:
        raise Unavailable(f"{missing[0]} is not there; name the repository with --repository.")
    return files


def memory_needed(name: str, files: Mapping[str, Path]) -> int:
    """About how many bytes of memory the reference ``name`` takes for these models."""
    if name not in _MEMORY:
        return 0
    # Weights may lie beside the graph: model.onnx_data.
    parts = [part for path in files.values() for part in path.parent.glob(f"{path.name}*")]
    return _MEMORY_BESIDE + _MEMORY[name] * sum(part.stat().st_size for part in parts)


def require_memory(needed: int, free: int) -> None:
    """Raises :class:`Unavailable` where less than ``needed`` bytes are ``free``."""
    if needed > free:
        raise Unavailable(
            f"it takes about {needed / 1e9:.1f} GB of memory, and {max(free, 0) / 1e9:.1f} GB "
            "are free."
        )


def _known_files(root: Path, family: Family) -> dict[str, Path]:
    try:
        return model_files(root, family)
    except Unavailable:
        return {}


@contextmanager
def onnxruntime(root: Path, which: Which) -> Iterator[Subject]:
    """The same client over the same files in this process, without a server."""
    if importlib.util.find_spec("onnxruntime") is None:
        raise Unavailable("onnxruntime is not installed: pip install 'triton-sam[benchmark]'.")
    from ..export.parity import OnnxRuntimeTransport

    transport = OnnxRuntimeTransport(model_files(root, which.family))
    client, timed = open_client(replace(which, embedding="client"), transport)
    with client:
        yield Subject(ONNXRUNTIME, "reference", client, timed)


@contextmanager
def pytorch(root: Path, which: Which, checkpoint: Path | None = None) -> Iterator[Subject]:
    """Meta's predictor with the pair's own weights, or those of ``checkpoint``."""
    if importlib.util.find_spec("torch") is None:
        raise Unavailable("torch is not installed: pip install 'triton-sam[export]'.")
    predictor = OfficialPredictor(root, which, checkpoint)
    yield Subject(PYTORCH, "reference", predictor, full_size_only=True)


class OfficialPredictor:
    """The official image predictor behind the client's methods."""

    def __init__(self, root: Path, which: Which, checkpoint: Path | None) -> None:
        self._predictor = _build_predictor(root, which, checkpoint)

    def set_image(self, image: ImageSource) -> None:
        """Decode and encode; the predictor takes an RGB array."""
        self._predictor.set_image(np.array(load_image(image)))

    def predict(self, point_coords: Any, point_labels: Any) -> Any:
        """Masks at image size and low-resolution logits: the predictor gives both, always."""
        return self._predictor.predict(
            point_coords=np.asarray(point_coords),
            point_labels=np.asarray(point_labels),
            multimask_output=False,
        )

    segment = predict

    def close(self) -> None:
        """Let the model go."""
        self._predictor = None


def _build_predictor(root: Path, which: Which, checkpoint: Path | None) -> Any:
    family = which.family
    manifest = read_manifest(root, family.encoder.name) or {}
    cfg = manifest.get("model_cfg") or family.variant(which.variant).model_cfg
    try:
        from ..export.wrappers import WRAPPERS
    except ImportError as exc:
        raise Unavailable(f"{exc}: pip install 'triton-sam[export]'.") from exc
    if family.name not in WRAPPERS:
        raise Unavailable(f"there is no exporter for {family.title} yet.")
    wrapper = WRAPPERS[family.name]
    with tempfile.TemporaryDirectory() as folder:
        weights = checkpoint or _checkpoint_of(manifest)
        if weights is None:
            weights = _weights_of_pair(root, family, cfg, Path(folder) / "pair.pt")
        return wrapper.predictor(wrapper.build_model(cfg, weights))


def _checkpoint_of(manifest: Mapping[str, Any]) -> Path | None:
    """What the pair was exported from, where it is still in the folder of checkpoints."""
    described = manifest.get("checkpoint")
    if not described:
        return None
    path = _CHECKPOINTS / described["file"]
    known = path.exists() and describe_checkpoint(path)["sha256"] == described["sha256"]
    return path if known else None


def _weights_of_pair(root: Path, family: Family, cfg: str, path: Path) -> Path:
    from ..export import checkpoints, sam2
    from ..export.wrappers import WRAPPERS

    if WRAPPERS[family.name] is not sam2:
        raise Unavailable(
            f"the weights of a {family.title} pair cannot be read back; name those that it was "
            "exported from with --checkpoint."
        )
    files = model_files(root, family)
    encoder, decoder = files[family.encoder.name], files[family.decoder.name]
    try:
        return checkpoints.checkpoint_from_pair(encoder, decoder, cfg, path)
    except (RuntimeError, KeyError, ValueError, InvalidInputError) as exc:
        raise Unavailable(
            f"the pair's weights cannot be read back ({exc}); name them with --checkpoint."
        ) from exc


@contextmanager
def open_references(
    names: Sequence[str],
    which: Which,
    root: Path,
    url: str,
    other_urls: Sequence[str],
    watch: Watch | None,
    checkpoint: Path | None = None,
) -> Iterator[tuple[list[Subject], list[str]]]:
    """The references that can be had, and for each of the others a line that says why not.

    One for which there is too little memory is left out: the system would end this program, or
    the server. ``names``: of :data:`NAMES`; ``inline`` is the pair with inline embeddings, where
    the subject leaves them there, and ``protocol`` the subject over another protocol.
    ``url`` and ``other_urls``: the address that is measured, and others of the same server.
    ``root``: the repository with the models that the server has.
    """
    inline = replace(which, embedding="client")
    makers: dict[str, list[Any]] = {
        "onnxruntime": [lambda: onnxruntime(root, which)],
        "pytorch": [lambda: pytorch(root, which, checkpoint)],
        "inline": [
            lambda: served(url, inline, watch, "reference")
            for _ in range(which.embedding != "client")
        ],
        "protocol": [lambda u=u: served(u, which, watch, "reference") for u in other_urls],
    }
    found, reasons = [], []
    free = available_memory()
    with ExitStack() as stack:
        for name in names:
            for make in makers[name]:
                try:
                    needed = memory_needed(name, _known_files(root, which.family))
                    require_memory(needed, free)
                    found.append(stack.enter_context(make()))
                    free -= needed  # a model that was not run yet has not taken it
                except Unavailable as exc:
                    reasons.append(f"No reference {name}: {exc}")
                    _log.info(reasons[-1])
        yield found, reasons
