#!/usr/bin/env python3
"""Measure models of every family on the embedded server and write docs/performance.md.

For each model named, FAMILY:VARIANT, its pair is exported into a folder that is deleted
afterwards, `triton-sam benchmark all --embedded` is run on it, and the record is stored as
docs/benchmarks/FAMILY-VARIANT.json. Then the page is written from all records stored. `sam2:demo`
is the model that comes with the package.

A checkpoint that is in the folder of checkpoints is used; for one that is not, random weights in
the same format stand in, which take the same time. Measure on a machine that does nothing else:
reckon with two hours for all of them on two cores, and for SAM 3 with 16 GB of memory while it is
exported and 20 while it is measured. `--page-only` writes the page again from what is stored.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from measure_exports import make_apart

from triton_sam.benchmark.document import render
from triton_sam.benchmark.record import read_record
from triton_sam.files import write_atomically
from triton_sam.specs import FAMILIES

_DOCS = Path(__file__).parent.parent / "docs"
# The time of each, in seconds, and what there is less of than usual: so much that eight rounds of
# an encode fit in, which `compare` needs. SAM 3 encodes for 24 s on two cores.
_MODELS: Mapping[str, tuple[float, Sequence[str]]] = {
    "sam2:demo": (210, ()),
    "sam2:tiny": (600, ()),
    "sam2:base_plus": (1500, ("--megapixels", "12")),
    "sam1:vit_b": (1500, ("--megapixels", "12")),
    "sam3:tracker": (
        2400,
        ("--megapixels", "12", "--masks", "1", "--references", "onnxruntime,pytorch"),
    ),
}
_DEMO = "sam2:demo"
_RANDOM = "Random weights in the official format and size: times are real, masks are not."


def main() -> int:
    """Measure what the command line names, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=_MODELS, default=list(_MODELS), metavar="FAMILY:VARIANT"
    )
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"), metavar="DIR")
    parser.add_argument("--docs", type=Path, default=_DOCS, metavar="DIR")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="of each (default: by its size)"
    )
    parser.add_argument("--page-only", action="store_true")
    args = parser.parse_args()
    (args.docs / "benchmarks").mkdir(parents=True, exist_ok=True)
    for key in () if args.page_only else args.only:
        _measure(key, args.checkpoints.resolve(), args.docs / "benchmarks", args.budget)
    write_page(args.docs)
    return 0


def _measure(key: str, checkpoints: Path, target: Path, budget: float | None) -> None:
    family, variant = key.split(":")
    usual, fewer = _MODELS[key]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = ["--model-type", family, "--embedded", "--budget", f"{budget or usual:g}", *fewer]
        if key == _DEMO:
            options.append("--demo")
        else:
            checkpoint, note = _checkpoint(family, variant, checkpoints, folder)
            _triton_sam(
                folder,
                *("export", family, "--variant", variant, "--default"),
                *("--checkpoint", checkpoint, "--output", "model_repository"),
            )
            options += ["--checkpoint", checkpoint, *note]
        _triton_sam(folder, "benchmark", "all", *options, "-o", "output")
        record = folder / "output" / "benchmark.json"
        write_atomically(target / f"{family}-{variant}.json", record.read_bytes())


def _checkpoint(
    family: str, variant: str, checkpoints: Path, folder: Path
) -> tuple[str, Sequence[str]]:
    """The checkpoint's name in ``folder``, and what to note about it."""
    spec = FAMILIES[family]
    wanted = spec.variant(variant)
    given = checkpoints / wanted.file
    if given.exists():
        (folder / wanted.file).symlink_to(given)
        return wanted.file, ()
    make_apart(spec, wanted, folder / wanted.file)
    return wanted.file, ("--note", _RANDOM)


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
