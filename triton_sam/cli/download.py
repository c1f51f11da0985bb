"""``triton-sam download``: checkpoints and published models."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import MissingExtraError
from ..specs import FAMILIES, family
from .common import CHECKPOINTS, Commands, command

# What others publish in ONNX, by the name of the command's argument.
_PUBLISHED = {f"{n}-onnx": f.published for n, f in FAMILIES.items() if f.published}


def add(commands: Commands) -> None:
    """Add the command."""
    parser = command(
        commands,
        "download",
        _download,
        "fetch a checkpoint, or the published SAM 3 pair, and check its hash",
        epilog=(
            "examples:\n"
            "  triton-sam download sam2 --variant large\n"
            "  triton-sam download sam3-onnx --variant fp16\n\n"
            "What is there and right is not fetched again; what was cut off goes on from there.\n\n"
            "environment:\n"
            "  TRITON_SAM_MIRROR    takes the place of https://dl.fbaipublicfiles.com/\n"
            "  HF_ENDPOINT          takes the place of https://huggingface.co\n"
            "  HF_TOKEN             for the gated sam3 (or: hf auth login)\n"
            "  TRITON_SAM_OFFLINE   1: as --offline (HF_HUB_OFFLINE too)\n"
            "  HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE as everywhere"
        ),
    )
    parser.add_argument("model", choices=[*FAMILIES, *_PUBLISHED])
    parser.add_argument("--variant", metavar="NAME", help=_variants())
    parser.add_argument(
        "--output",
        type=Path,
        default=CHECKPOINTS,
        metavar="DIR",
        help="where the files go (default: %(default)s)",
    )
    parser.add_argument(
        "--offline", action="store_true", help="fetch nothing; say what is missing and from where"
    )
    parser.add_argument("--force", action="store_true", help="fetch again what is right already")


def _variants() -> str:
    known = {
        n: [v.name for v in f.variants.values() if v.url or v.hub] for n, f in FAMILIES.items()
    }
    known |= {name: list(pair.precisions) for name, pair in _PUBLISHED.items()}
    return "; ".join(f"{name}: {', '.join(names)}" for name, names in known.items())


def _download(args: argparse.Namespace) -> int:
    try:
        from .. import downloads
    except ModuleNotFoundError as exc:
        raise MissingExtraError(
            f"Downloading needs {exc.name}: pip install 'triton-sam[download]'"
        ) from exc
    offline = args.offline or downloads.is_offline()
    if args.model in _PUBLISHED:
        files = downloads.published_files(
            _PUBLISHED[args.model], args.variant, args.output, offline=offline, refresh=args.force
        )
    else:
        files = downloads.checkpoint_files(family(args.model), args.variant, args.output)
    fetched = downloads.Store(offline=offline, force=args.force).ensure(files)
    for file in files:
        size = downloads.readable(file.target.stat().st_size)
        print(f"{file.target}: {size}, {'fetched' if file.target in fetched else 'was there'}")
    return 0
