#!/usr/bin/env python3
"""Export every SAM 2.1 variant and print a Markdown table of time, memory, sizes and parity.

A checkpoint that is in checkpoints/ is used; for one that is not, a file with random weights in
the same format stands in: it has the same size and takes the same time. Each export runs in a
process of its own, into a repository that is deleted afterwards.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from triton_sam.export.checkpoints import make_checkpoint
from triton_sam.specs import FAMILIES, Variant

_FAMILY = FAMILIES["sam2"]
_COLUMNS = (
    "variant",
    "weights",
    "parameters",
    "encoder",
    "decoder",
    "time",
    "peak memory",
    "largest logit difference",
    "smallest mask IoU",
)


def main() -> int:
    """Measure the variants named on the command line and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [name for name, variant in _FAMILY.variants.items() if variant.url]
    parser.add_argument("variants", nargs="*", default=known, metavar="VARIANT", help=f"of {known}")
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"), metavar="DIR")
    args = parser.parse_args()
    print(f"| {' | '.join(_COLUMNS)} |")
    print("|---|---|" + "---:|" * (len(_COLUMNS) - 2), flush=True)
    for name in args.variants:
        print(_measure(_FAMILY.variant(name), args.checkpoints), flush=True)
    return 0


def _measure(variant: Variant, checkpoints: Path) -> str:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, weights = checkpoints / variant.file, "Meta's"
        if not checkpoint.is_file():
            checkpoint, weights = Path(folder) / variant.file, "random"
            make_checkpoint(variant.model_cfg, checkpoint)
        command = [sys.executable, "-m", "triton_sam.cli", "export", _FAMILY.name]
        command += ["--variant", variant.name, "--checkpoint", str(checkpoint)]
        subprocess.run([*command, "--output", folder], check=True)
        manifests = [_manifest(Path(folder), model.name) for model in _FAMILY.models]
    return _row(variant.name, weights, *manifests)


def _manifest(root: Path, model: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((root / model / "1/export.json").read_text())
    return content


def _row(name: str, weights: str, encoder: dict[str, Any], decoder: dict[str, Any]) -> str:
    parity = encoder["parity"]
    cells = [
        f"`{name}`",
        weights,
        f"{encoder['parameters'] / 1e6:.1f} M",
        f"{encoder['bytes'] / 1e6:.0f} MB",
        f"{decoder['bytes'] / 1e6:.0f} MB",
        f"{encoder['seconds']:.0f} s",
        f"{encoder['peak_memory_mb'] / 1e3:.1f} GB",
        f"{max(case['max_difference'] / case['max_logit'] for case in parity):.1e}",
        f"{min(case['mask_iou'] for case in parity):.5f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
