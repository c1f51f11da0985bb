#!/usr/bin/env python3
"""Export a SAM 2.1 checkpoint to the ONNX pair of the model repository.

The same as `triton-sam export sam2`, with the arguments that scripts of this name have.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from triton_sam import cli
from triton_sam.specs import FAMILIES, Variant

_FAMILY = FAMILIES["sam2"]


def main() -> int:
    """Parse the arguments and run `triton-sam export sam2`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--model-cfg",
        metavar="YAML",
        help="configuration of the sam2 package (default: told by the checkpoint's file name)",
    )
    parser.add_argument("--output-dir", type=Path, default=Path("model_repository"), metavar="DIR")
    parser.add_argument(
        "--image-size",
        type=int,
        default=_FAMILY.image.size,
        help="only %(default)s: the official image predictor has its feature sizes built in",
    )
    parser.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    args = parser.parse_args()
    if args.image_size != _FAMILY.image.size:
        parser.error(
            f"--image-size {args.image_size}: SAM2ImagePredictor, which the masks are held "
            f"against, and the served contract know only {_FAMILY.image.size}"
        )
    variant = _find_variant(args.checkpoint, args.model_cfg)
    if variant is None:
        files = ", ".join(variant.file for variant in _FAMILY.variants.values())
        parser.error(
            f"--model-cfg is needed: {args.checkpoint.name} is none of the known files ({files})"
        )
    command = ["export", "sam2", "--variant", variant.name, "--checkpoint", str(args.checkpoint)]
    command += ["--output", str(args.output_dir), "--device", args.device]
    if args.model_cfg:
        command += ["--model-cfg", args.model_cfg]
    return cli.main(command)


def _find_variant(checkpoint: Path, model_cfg: str | None) -> Variant | None:
    for variant in _FAMILY.variants.values():
        # Configurations are named with and without their folder.
        if model_cfg and Path(model_cfg).name == Path(variant.model_cfg).name:
            return variant
        if not model_cfg and checkpoint.name == variant.file:
            return variant
    return _FAMILY.variant() if model_cfg else None


if __name__ == "__main__":
    sys.exit(main())
