"""``triton-sam install-published``: an ONNX pair that others have exported."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from .. import published
from ..specs import FAMILIES, family
from .common import Commands, add_repository, command

_PUBLISHED = {name: spec.published for name, spec in FAMILIES.items() if spec.published}


def add(commands: Commands) -> None:
    """Add the command."""
    lines = (
        f"  {name}: {pair.repository} ({', '.join(pair.precisions)})"
        for name, pair in _PUBLISHED.items()
    )
    parser = command(
        commands,
        "install-published",
        _install,
        "put an ONNX pair that others publish into the model repository",
        epilog=(
            "example:\n"
            "  triton-sam install-published sam3 --from ~/Downloads/sam3-tracker-ONNX\n\n"
            "pairs on huggingface.co, and the precisions that they come in:\n"
            + "\n".join(lines)
            + "\n\nThe files keep their names in DIR, or in its folder onnx, each with its _data "
            "file beside it.\nThey are checked and copied; DIR is left as it is."
        ),
    )
    parser.add_argument("family", choices=list(_PUBLISHED))
    parser.add_argument(
        "--from",
        dest="folder",
        type=Path,
        required=True,
        metavar="DIR",
        help="the folder with the downloaded files",
    )
    parser.add_argument(
        "--precision", default="fp32", metavar="NAME", help="see below (default: %(default)s)"
    )
    add_repository(parser)


def _install(args: argparse.Namespace) -> int:
    logging.basicConfig(format="triton-sam: %(message)s", level=logging.WARNING)
    published.install(family(args.family), args.folder, args.repository, args.precision)
    for model in family(args.family).models:
        print(args.repository / model.name / "1" / model.file)
    return 0
