"""One export from beginning to end: load, trace, prove, install."""

from __future__ import annotations

import platform
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .. import repository
from ..errors import ExportError, InvalidInputError
from ..specs import Family
from . import onnx, sam2
from .parity import Difference, compare

_PACKAGES = ("triton-sam", "torch", "onnx", "onnxruntime", "sam2")

# Each family's wrapper: build_model, modules and predictor.
_WRAPPERS = {"sam2": sam2}


def export(
    family: Family,
    variant: str,
    checkpoint: Path,
    output: Path,
    *,
    model_cfg: str | None = None,
    device: str = "cpu",
) -> list[Difference]:
    """Turn ``checkpoint`` into the ONNX pair of ``family`` in the model repository ``output``.

    The pair is run in ONNX Runtime and compared with the official predictor on the checkpoint;
    outside tolerance nothing is installed and :class:`ExportError` is raised. Returns the
    differences, which the manifests also keep.

    ``model_cfg``: another configuration than the variant's. ``device``: the torch device that
    the reference runs on. Raises :class:`CheckpointError` when the checkpoint cannot be used.
    """
    started = time.monotonic()
    _check_device(device)
    cfg = model_cfg or family.variant(variant).model_cfg
    wrapper = _WRAPPERS[family.name]
    with tqdm(total=5, desc=f"{family.name} {variant}", unit="step") as bar:
        with _step(bar, f"load {checkpoint.name}"):
            model = wrapper.build_model(cfg, checkpoint)
            origin = _describe(family, variant, cfg, checkpoint, model)
        output.mkdir(parents=True, exist_ok=True)
        # On the file system of the repository, so that installing is a rename.
        with tempfile.TemporaryDirectory(prefix=".export-", dir=output) as scratch:
            files = {}
            modules = wrapper.modules(model, family)
            for spec in family.models:
                module, examples = modules[spec.name]
                files[spec.name] = Path(scratch) / f"{spec.name}.onnx"
                with _step(bar, f"trace {spec.name}"):
                    onnx.trace(module, spec, examples, files[spec.name])
            with _step(bar, "compare with PyTorch"):
                differences = compare(family, wrapper.predictor(model.to(device)), files)
                _require_parity(differences)
            with _step(bar, f"install in {output}"):
                proof = _describe_proof(differences, time.monotonic() - started)
                repository.install(output, family, files, origin | proof)
    return differences


@contextmanager
def _step(bar: tqdm[Any], title: str) -> Iterator[None]:
    bar.set_postfix_str(title)
    yield
    bar.update()


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as exc:
        raise InvalidInputError(
            f"Device {device!r} is not available to this torch ({torch.__version__}); try cpu."
        ) from exc


def _describe(
    family: Family, variant: str, cfg: str, checkpoint: Path, model: torch.nn.Module
) -> dict[str, Any]:
    return {
        "family": family.name,
        "variant": variant,
        "model_cfg": cfg,
        "checkpoint": {
            "file": checkpoint.name,
            "sha256": repository.sha256(checkpoint),
            "bytes": checkpoint.stat().st_size,
        },
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "opset": onnx.OPSET,
        "ir_version": onnx.IR_VERSION,
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in _PACKAGES},
    }


def _describe_proof(differences: list[Difference], seconds: float) -> dict[str, Any]:
    return {
        "parity": [difference.as_dict() for difference in differences],
        "seconds": round(seconds, 1),
        "peak_memory_mb": _peak_memory_mb(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _require_parity(differences: list[Difference]) -> None:
    failed = [difference for difference in differences if not difference.within_tolerance]
    if failed:
        raise ExportError(
            f"The exported model differs from the PyTorch model in {len(failed)} of "
            f"{len(differences)} comparisons; nothing was installed. The first: {failed[0]}."
        )


def _peak_memory_mb() -> int:
    """Largest resident size of this process so far (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
