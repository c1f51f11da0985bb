"""``triton-sam smoke``: whether a running server segments."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..specs import FAMILIES
from .common import Commands, command

_SPECULATIVE = "speculative"


def add(commands: Commands) -> None:
    """Add the command."""
    parser = command(
        commands,
        "smoke",
        _smoke,
        "segment a photo on a running server and check the answers",
        epilog=(
            "Looks at finite values, repeated calls, several masks, refinement, and whether the\n"
            "masks hold the points. Start a server first: triton-sam serve, or docker compose up.\n"
            "Exit status: 0 when all is right, 1 when not."
        ),
    )
    parser.add_argument(
        "model",
        choices=[*FAMILIES, _SPECULATIVE],
        help="a family, or sessions that cancel what is superseded",
    )
    parser.add_argument(
        "--model-type",
        choices=list(FAMILIES),
        default="sam2",
        help="whose models `speculative` asks (default: %(default)s)",
    )
    parser.add_argument(
        "--url",
        help="the server: localhost:8000, http://…, https://…, grpc://…, grpcs://… "
        "(default: $TRITON_URL, then localhost:8000)",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="PNG",
        help="the picture to look at (default: smoke-output/MODEL.png)",
    )
    parser.add_argument(
        "--any-weights",
        action="store_true",
        help="report, and do not require, what only a trained model can pass",
    )
    parser.add_argument(
        "--variant", metavar="NAME", help="a variant that is served beside the family's default"
    )
    parser.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS")


def _smoke(args: argparse.Namespace) -> int:
    if args.model == _SPECULATIVE:
        from .. import smoke_speculative

        smoke_speculative.run(args.url, args.model_type, args.variant, args.timeout)
        return 0
    from ..client import SAM2TritonClient
    from ..smoke import run

    output = args.output or Path("smoke-output") / f"{args.model}.png"
    with SAM2TritonClient(
        args.url, args.model, variant=args.variant, timeout_s=args.timeout
    ) as client:
        run(client, output, any_weights=args.any_weights)
    return 0
