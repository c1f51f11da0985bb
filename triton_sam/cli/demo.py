"""``triton-sam demo``: a first mask."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import Commands, command


def add(commands: Commands) -> None:
    """Add the command."""
    parser = command(
        commands,
        "demo",
        _demo,
        "segment a real photo with the demo model on an embedded server",
        epilog=(
            "The first run downloads the server (about 100 MB) into the user's cache folder.\n"
            "The demo model is small and was trained on synthetic scenes; it is not Meta's."
        ),
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo-output"),
        metavar="DIR",
        help="where to write the pictures (default: %(default)s)",
    )


def _demo(args: argparse.Namespace) -> int:
    from ..demo import run

    run(args.output)
    return 0
