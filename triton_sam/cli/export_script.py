"""The scripts ``export_sam1_to_onnx.py`` and so on: `triton-sam export` under its older names."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..specs import Family, Variant, family
from . import main
from .common import REPOSITORY


def run(family_name: str, predictor: str) -> int:
    """Parse the arguments that scripts of this name have and run `triton-sam export`.

    ``predictor``: the official predictor, which knows one size of images.
    """
    spec = family(family_name)
    parser = _parser(spec)
    args = parser.parse_args()
    if args.image_size != spec.image.size:
        parser.error(
            f"--image-size {args.image_size}: {predictor}, which the masks are held "
            f"against, and the served contract know only {spec.image.size}"
        )
    variant = _find_variant(spec, args.checkpoint, args.model_cfg)
    if variant is None:
        files = ", ".join(variant.file for variant in spec.variants.values())
        parser.error(
            f"--model-cfg is needed: {args.checkpoint.name} is none of the known files ({files})"
        )
    command = ["export", spec.name, "--variant", variant.name, "--checkpoint", str(args.checkpoint)]
    command += ["--output", str(args.output_dir), "--device", args.device, "--default"]
    if args.model_cfg:
        command += ["--model-cfg", args.model_cfg]
    return main(command)


def _parser(spec: Family) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=f"Export a {spec.title} checkpoint to the ONNX pair of the model repository. "
        f"The same as `triton-sam export {spec.name}`, with the arguments that scripts of this "
        "name have."
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="PATH")
    parser.add_argument(
        "--model-cfg",
        metavar="NAME",
        help="configuration, as `triton-sam export` takes it (default: told by the checkpoint's "
        "file name)",
    )
    parser.add_argument("--output-dir", type=Path, default=REPOSITORY, metavar="DIR")
    parser.add_argument(
        "--image-size",
        type=int,
        default=spec.image.size,
        help="only %(default)s: the official image predictor has its feature sizes built in",
    )
    parser.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    return parser


def _find_variant(spec: Family, checkpoint: Path, model_cfg: str | None) -> Variant | None:
    for variant in spec.variants.values():
        # Configurations are named with and without their folder.
        if model_cfg and Path(model_cfg).name == Path(variant.model_cfg).name:
            return variant
        if not model_cfg and checkpoint.name == variant.file:
            return variant
    return spec.variant() if model_cfg or len(spec.variants) == 1 else None
