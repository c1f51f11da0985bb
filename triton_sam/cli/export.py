"""``triton-sam export``: checkpoint to ONNX pair."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import MissingExtraError
from ..specs import FAMILIES, Family, family
from .common import CHECKPOINTS, REPOSITORY, Commands, command


def add(commands: Commands) -> None:
    """Add the command."""
    parser = command(
        commands,
        "export",
        _export,
        "turn a checkpoint into an ONNX encoder and decoder in the model repository",
        epilog=(
            "example:\n"
            "  triton-sam export sam2 --variant tiny --checkpoint checkpoints/"
            "sam2.1_hiera_tiny.pt\n\n"
            "The default variant becomes sam2_encoder and sam2_decoder, others lie beside it as\n"
            'sam2_large_encoder and so on; clients choose with variant="large".\n'
            "variants, the default one first:\n"
            f"{_variants()}\n\n"
            "Both files are run and compared with the PyTorch model before they are installed."
        ),
    )
    parser.add_argument("family", choices=list(FAMILIES))
    parser.add_argument("--variant", metavar="NAME", help="one of those listed below")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="PATH",
        help="a file; of sam3 a folder with config.json and model.safetensors (default: the "
        "variant's in checkpoints)",
    )
    parser.add_argument(
        "--model-cfg",
        metavar="NAME",
        help="another configuration than the variant's: its official name, or a YAML file",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=REPOSITORY,
        metavar="DIR",
        help="the model repository (default: %(default)s)",
    )
    parser.add_argument(
        "--default",
        action="store_true",
        help="install the variant as the family's default, which clients get without asking",
    )
    parser.add_argument(
        "--precision",
        choices=["fp32", "fp16"],
        default="fp32",
        help="fp16: files half the size, faster on GPUs; float32 inputs and outputs "
        "(default: %(default)s)",
    )
    parser.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")


def _variants() -> str:
    return "\n".join(f"  {spec.name}  {', '.join(_names(spec))}" for spec in FAMILIES.values())


def _names(spec: Family) -> list[str]:
    return sorted(spec.variants, key=lambda name: name != spec.default_variant)


def _export(args: argparse.Namespace) -> int:
    spec = family(args.family)
    variant = spec.variant(args.variant)
    try:
        from ..export.pipeline import export
    except ModuleNotFoundError as exc:
        raise MissingExtraError(
            f"Exporting needs {exc.name}: pip install 'triton-sam[export]'"
        ) from exc
    export(
        spec,
        variant.name,
        args.checkpoint or CHECKPOINTS / variant.file,
        args.output,
        model_cfg=args.model_cfg,
        device=args.device,
        default=args.default,
        precision=args.precision,
    )
    return 0
