#!/usr/bin/env python3
"""Measure models of every family on the embedded server and write docs/performance.md.

Two steps, so that nothing is exported while the machine has to be quiet:

    python scripts/measure_performance.py --prepare       # 15 minutes, 16 GB of memory for SAM 3
    python scripts/measure_performance.py                 # 45 minutes, on a machine left alone

The first exports the pair of each model, FAMILY:VARIANT, into the folder of models; what is there
is left alone. A checkpoint that is in the folder of checkpoints is used; for one that is not,
random weights in the same format stand in, which take the same time. The second runs `triton-sam
benchmark all --embedded` on each pair, stores the record as docs/benchmarks/FAMILY-VARIANT.json and
writes the page from all records stored. `sam2:demo` is the model that comes with the package.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from measure_exports import make_apart

from triton_sam.benchmark.document import render
from triton_sam.benchmark.record import read_record
from triton_sam.benchmark.stand_in import has_pair
from triton_sam.files import write_atomically
from triton_sam.specs import FAMILIES

_DOCS = Path(__file__).parent.parent / "docs"
# Seconds of the whole run, and what there is less of than usual: so that the two subjects that
# `compare` needs get eight rounds of an encode. SAM 3 encodes for 24 s on two cores.
_MODELS: Mapping[str, tuple[float, Sequence[str]]] = {
    "sam2:demo": (270, ("--megapixels", "1,12,48")),
    "sam2:tiny": (270, ()),
    "sam2:base_plus": (420, ("--megapixels", "12", "--masks", "1")),
    "sam1:vit_b": (510, ("--megapixels", "12", "--masks", "1")),
    "sam3:tracker": (
        1000,
        ("--megapixels", "12", "--masks", "none", "--references", "onnxruntime,pytorch"),
    ),
}
_DEMO = "sam2:demo"
_RANDOM = "Random weights in the official format and size: times are real, masks are not."


def main() -> int:
    """Prepare or measure what the command line names, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=_MODELS, default=list(_MODELS), metavar="FAMILY:VARIANT"
    )
    parser.add_argument(
        "--models",
        type=Path,
        default=Path("measured-models"),
        metavar="DIR",
        help="where the exported pairs lie (default: %(default)s)",
    )
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"), metavar="DIR")
    parser.add_argument("--docs", type=Path, default=_DOCS, metavar="DIR")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="of each (default: by its size)"
    )
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument("--prepare", action="store_true", help="export what is missing, then end")
    steps.add_argument("--page-only", action="store_true", help="write the page, then end")
    args = parser.parse_args()
    if args.prepare:
        for key in args.only:
            _prepare(key, args.models, args.checkpoints.resolve())
        return 0
    (args.docs / "benchmarks").mkdir(parents=True, exist_ok=True)
    for key in () if args.page_only else args.only:
        _measure(key, args.models, args.docs / "benchmarks", args.budget)
    write_page(args.docs)
    return 0


def _folder(key: str, models: Path) -> Path:
    return models / key.replace(":", "-")


def _is_prepared(key: str, folder: Path) -> bool:
    spec = FAMILIES[key.partition(":")[0]]
    return key == _DEMO or has_pair(folder / "model_repository", spec)


def _prepare(key: str, models: Path, checkpoints: Path) -> None:
    folder = _folder(key, models)
    if _is_prepared(key, folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    name, _, variant = key.partition(":")
    spec = FAMILIES[name]
    wanted = spec.variant(variant)
    checkpoint, given = folder / wanted.file, checkpoints / wanted.file
    if given.exists():
        checkpoint.unlink(missing_ok=True)
        checkpoint.symlink_to(given)
    elif not checkpoint.exists():
        make_apart(spec, wanted, checkpoint)
    _triton_sam(
        folder,
        *("export", name, "--variant", variant, "--default"),
        *("--checkpoint", wanted.file, "--output", "model_repository"),
    )


def _measure(key: str, models: Path, target: Path, budget: float | None) -> None:
    name, _, variant = key.partition(":")
    usual, fewer = _MODELS[key]
    folder = _folder(key, models)
    if not _is_prepared(key, folder):
        raise SystemExit(f"{folder} has no pair of {key}: run this with --prepare first.")
    folder.mkdir(parents=True, exist_ok=True)
    options = ["--model-type", name, "--embedded", "--budget", f"{budget or usual:g}", *fewer]
    if key == _DEMO:
        options.append("--demo")
    else:
        checkpoint = FAMILIES[name].variant(variant).file
        options += ["--checkpoint", checkpoint]
        if not (folder / checkpoint).is_symlink():  # made by --prepare, not given
            options += ["--note", _RANDOM]
    _triton_sam(folder, "benchmark", "all", *options, "-o", "output")
    record = folder / "output" / "benchmark.json"
    write_atomically(target / f"{name}-{variant}.json", record.read_bytes())


def _triton_sam(folder: Path, *arguments: str) -> None:
    """Run a command in ``folder``, so that no path of this machine gets into the record."""
    command = [sys.executable, "-m", "triton_sam.cli", *arguments]
    subprocess.run(command, cwd=folder, check=True)


def write_page(docs: Path) -> None:
    """Write the page from every stored record."""
    stored = sorted((docs / "benchmarks").glob("*.json"))
    text = render([(path, read_record(path)) for path in stored])
    write_atomically(docs / "performance.md", text.encode())


if __name__ == "__main__":
    sys.exit(main())
