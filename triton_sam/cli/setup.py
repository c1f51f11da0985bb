"""``triton-sam setup``: from nothing to models that can be served."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import InvalidInputError, MissingExtraError, RepositoryError, SamError
from ..specs import FAMILIES, Family
from .common import CHECKPOINTS, Commands, add_repository, command

_ALL = "all"


def add(commands: Commands) -> None:
    """Add the command."""
    parser = command(
        commands,
        "setup",
        _setup,
        "download, configure, export and verify a family, as far as it is not done",
        epilog=(
            "examples:\n"
            "  triton-sam setup sam2 --variant large      # beside the default variant\n"
            "  triton-sam setup sam1 --precision fp16     # half the size, faster on GPUs\n"
            "  triton-sam setup sam3                      # the published pair, no token needed\n"
            "  triton-sam setup sam3 --from checkpoint    # Meta's gated checkpoint\n"
            "  triton-sam setup all                       # the default of each family\n\n"
            "Each step is skipped when its result is right already, by hash: a second run takes\n"
            "seconds. `triton-sam download --help` tells about mirrors, tokens and offline use."
        ),
    )
    parser.add_argument("model", choices=[*FAMILIES, _ALL])
    parser.add_argument(
        "--variant", metavar="NAME", help="as for `triton-sam download` (default: the family's)"
    )
    parser.add_argument(
        "--from",
        dest="road",
        choices=["checkpoint", "onnx"],
        help="export a checkpoint, or take the pair that others exported (default: onnx where "
        "the family has one)",
    )
    parser.add_argument(
        "--precision",
        choices=["fp32", "fp16"],
        help="of the weights (default: fp32); what else a pair is published in is its variants",
    )
    parser.add_argument(
        "--default",
        action="store_true",
        help="install the variant as the family's default, which clients get without asking",
    )
    parser.add_argument(
        "--checkpoints",
        type=Path,
        default=CHECKPOINTS,
        metavar="DIR",
        help="where downloads go (default: %(default)s)",
    )
    add_repository(parser)
    parser.add_argument("--offline", action="store_true", help="download nothing")
    parser.add_argument("--force", action="store_true", help="do again what is right already")


def _setup(args: argparse.Namespace) -> int:
    if args.model != _ALL:
        _set_up(FAMILIES[args.model], args)
        return 0
    if args.variant or args.road or args.default:
        raise InvalidInputError(
            "--variant, --from and --default are of one family; name it instead of `all`."
        )
    failed = {}
    for name, family in FAMILIES.items():
        try:
            _set_up(family, args)
        except SamError as exc:
            failed[name] = exc
    if failed:
        reasons = " ".join(f"{name}: {exc}" for name, exc in failed.items())
        raise RepositoryError(f"{len(failed)} of {len(FAMILIES)} were not set up. {reasons}")
    return 0


def _set_up(family: Family, args: argparse.Namespace) -> None:
    try:
        from ..downloads import Store, is_offline
        from ..setup import Road, Setup
    except ModuleNotFoundError as exc:
        raise MissingExtraError(
            f"Setting up needs {exc.name}: pip install 'triton-sam[export]'"
        ) from exc
    road: Road = args.road or ("onnx" if family.published else "checkpoint")
    if road == "onnx" and args.variant and args.precision:
        raise InvalidInputError(
            "The variants of a published pair are its precisions; give --variant or --precision."
        )
    setup = Setup(
        family,
        args.repository,
        args.checkpoints,
        args.variant if road == "checkpoint" else None,
        road,
        args.default,
        args.precision or (args.variant if road == "onnx" else None) or "fp32",
        Store(offline=args.offline or is_offline(), force=args.force),
    )
    for step in setup.run():
        state = "was right" if step.skipped else "done"
        print(
            f"{step.seconds:8.1f} s  {family.name}  {step.name:<9}  {state:<9}  {step.detail}",
            flush=True,
        )
