#!/usr/bin/env python3
"""Compress an exported demo model into the package's assets.

Run it after `triton-sam export sam2 --variant demo`. The weights have bfloat16 precision in
float32 tensors: half of their bytes are zeros, which is what makes the files small.
"""

from __future__ import annotations

import argparse
import lzma
import sys
from pathlib import Path

from triton_sam.files import write_atomically
from triton_sam.repository import check, graph_files
from triton_sam.specs import FAMILIES, MANIFEST_FILE

_FAMILY = FAMILIES["sam2"]
_ASSETS = Path(__file__).parent.parent / "triton_sam" / "assets"

# Positions modulo 4, the size of a float32, tell more than the bytes just before.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 2, "pb": 2}]


def main() -> int:
    """Check the repository named on the command line and pack its two models."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repository", type=Path, default=Path("model_repository"), metavar="DIR")
    args = parser.parse_args()
    problems = check(args.repository, [_FAMILY])
    if problems:
        parser.error(str(problems[0]))
    for model in _FAMILY.models:
        folder = args.repository / model.name / "1"
        files = {f"{model.name}.onnx.xz": folder / model.file}
        files |= {f"{model.name}-{n}.xz": folder / n for n in graph_files(_FAMILY, model)}
        for name, file in files.items():
            packed = lzma.compress(file.read_bytes(), filters=_FILTERS)
            write_atomically(_ASSETS / name, packed)
            print(f"{name}: {len(packed) / 1e6:.2f} MB")
        write_atomically(_ASSETS / f"{model.name}.json", (folder / MANIFEST_FILE).read_bytes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
