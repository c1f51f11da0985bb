"""``triton-sam configure`` and ``check``: what is in the model repository."""

from __future__ import annotations

import argparse
import os

from ..aliases import check_aliases, write_aliases
from ..errors import RepositoryError
from ..repository import check, write_configs
from .common import Commands, add_repository, command

_INSTANCES = "TRITON_SAM_INSTANCES"


def add_configure(commands: Commands) -> None:
    """Add the command."""
    parser = command(
        commands,
        "configure",
        _configure,
        "write each model's config.pbtxt into the repository",
        epilog=(
            "More instances answer more requests at once and take that many times the memory.\n"
            "Each GPU that the server sees gets N of every model. On a processor one is best:\n"
            "it uses all cores."
        ),
    )
    add_repository(parser)
    parser.add_argument(
        "--aliases",
        action="store_true",
        help="also serve the encoders that are there as sam2.1_large_encoder, sam2_encoder_jpeg "
        "and sam3_tracker_encoder_fp16, which some clients ask for",
    )
    parser.add_argument(
        "--instances",
        type=_count,
        default=os.environ.get(_INSTANCES) or None,
        metavar="N",
        help=f"how many of each model on a GPU (default: ${_INSTANCES}, then as it was, then 1)",
    )


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 64:
        raise argparse.ArgumentTypeError(f"expected a number of instances, 1 to 64, not {text!r}")
    return int(text)


def _configure(args: argparse.Namespace) -> int:
    for path in write_configs(args.repository, instances=args.instances):
        print(path)
    if args.aliases:
        written = write_aliases(args.repository)
        if not written:
            raise RepositoryError(
                f"No encoder in {args.repository} that an alias stands for; export one first."
            )
        for folder in written:
            print(folder)
    return 0


def add_check(commands: Commands) -> None:
    """Add the command."""
    parser = command(
        commands,
        "check",
        _check,
        "say what is missing, stale or mismatched in the model repository",
        epilog="Exit status: 0 when all is right, 1 when not.",
    )
    add_repository(parser)


def _check(args: argparse.Namespace) -> int:
    problems = [*check(args.repository), *check_aliases(args.repository)]
    for problem in problems:
        print(problem)
    if problems:
        raise RepositoryError(f"{len(problems)} problems in {args.repository}.")
    print(f"{args.repository}: all models are there and as the table says.")
    return 0
