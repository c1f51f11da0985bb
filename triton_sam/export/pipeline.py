"""One export from beginning to end: load, trace, prove, install."""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from .. import repository
from ..errors import ExportError, InvalidInputError
from ..specs import Family
from . import onnx
from .memory import give_back_memory, peak_memory_mb
from .parity import Difference, Predictor, Remembering, compare, compare_served
from .precision import halve
from .split import trace_split
from .wrappers import WRAPPERS

Precision = Literal["fp32", "fp16"]

_PACKAGES = ("triton-sam", "torch", "onnx", "onnxruntime")


def export(
    family: Family,
    variant: str,
    checkpoint: Path,
    output: Path,
    *,
    model_cfg: str | None = None,
    device: str = "cpu",
    default: bool = False,
    precision: Precision = "fp32",
) -> list[Difference]:
    """Turn ``checkpoint`` into the ONNX pair of ``family`` in the model repository ``output``.

    The pair is run in ONNX Runtime and compared with the official predictor on the checkpoint, and
    so are the graphs that a server's predictor runs in place of the decoder; outside tolerance
    nothing is installed and :class:`ExportError` is raised. Returns the pair's differences, which
    the manifests also keep.

    ``model_cfg``: another configuration than the variant's. ``device``: the torch device that
    the reference runs on. ``default``: install it under the family's own names whatever the
    variant, so that clients get it without asking for a variant. ``precision``: ``fp16`` for
    weights and arithmetic in half precision, with float32 inputs and outputs; the masks of photos
    must then overlap with the official ones by 0.99.

    Raises :class:`CheckpointError` when the checkpoint cannot be used.
    """
    started = time.monotonic()
    _check_device(device)
    cfg = model_cfg or family.variant(variant).model_cfg
    wrapper = WRAPPERS[family.name]
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
                # As in a repository, so that a predictor can run it.
                folder = Path(scratch) / spec.name / "1"
                folder.mkdir(parents=True)
                with _step(bar, f"trace {spec.name}"):
                    module, examples = modules[spec.name]
                    files[spec.name] = onnx.trace(module, spec, examples, folder)
            # Of the decoder, the last one.
            trace_split(module, family, examples, files[family.decoder.name])
            predictor = Remembering(wrapper.predictor(model.to(device)))
            with _step(bar, "compare with PyTorch"):
                proven = _prove(family, predictor, files, precision, Path(scratch))
            with _step(bar, f"install in {output}"):
                proof = _describe_proof(proven.differences, time.monotonic() - started)
                target = family if default else family.named(variant)
                paths = zip(target.models, proven.files.values(), strict=True)
                named = {spec.name: path for spec, path in paths}
                repository.install(output, target, named, origin | proven.facts | proof)
    return proven.differences


@dataclass(frozen=True)
class _Proven:
    """A pair that may be installed. ``facts``: what the manifests say about its precision."""

    files: dict[str, Path]
    differences: list[Difference]
    facts: dict[str, Any]


def _prove(
    family: Family,
    predictor: Predictor,
    files: dict[str, Path],
    precision: Precision,
    scratch: Path,
) -> _Proven:
    """The float32 pair ``files``, or what became of it in ``precision``, held against PyTorch.

    Raises :class:`ExportError` where masks are too far from the official ones.
    """
    if precision == "fp16":
        half = halve(family, predictor, files, scratch)
        return _Proven(half.files, half.differences, half.as_dict())
    differences = compare(family, predictor, files)
    served = compare_served(family, predictor, scratch)
    _require_parity(differences + served)
    facts = {"precision": "fp32", "predictor_parity": [one.as_dict() for one in served]}
    return _Proven(files, differences, facts)


@contextmanager
def _step(bar: tqdm[Any], title: str) -> Iterator[None]:
    bar.set_postfix_str(title)
    yield
    give_back_memory()
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
        "checkpoint": {"file": checkpoint.name, **repository.describe_checkpoint(checkpoint)},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "opset": onnx.OPSET,
        "ir_version": onnx.IR_VERSION,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in _PACKAGES + WRAPPERS[family.name].PACKAGES},
    }


def _describe_proof(differences: list[Difference], seconds: float) -> dict[str, Any]:
    return {
        "parity": [difference.as_dict() for difference in differences],
        "seconds": round(seconds, 1),
        "peak_memory_mb": peak_memory_mb(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _require_parity(differences: list[Difference]) -> None:
    failed = [difference for difference in differences if not difference.within_tolerance]
    if failed:
        raise ExportError(
            f"The exported model differs from the PyTorch model in {len(failed)} of "
            f"{len(differences)} comparisons; nothing was installed. The first: {failed[0]}."
        )
