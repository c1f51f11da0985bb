"""What the commands share: the parser, the repository options and how values are read."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeAlias, cast

REPOSITORY = Path("model_repository")
CHECKPOINTS = Path("checkpoints")


class Parser(argparse.ArgumentParser):
    """One line on a wrong command line, instead of the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"  # the type has no public name


def command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int],
    help: str,
    epilog: str = "",
) -> argparse.ArgumentParser:
    """Add a command; ``help`` is its line in the list of commands, ``run`` carries it out."""
    parser = commands.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_repository(parser: argparse.ArgumentParser, demo: bool = False) -> None:
    """The option ``--repository``, and with ``demo`` the option to serve the demo model."""
    parser.add_argument(
        "--repository",
        type=Path,
        default=REPOSITORY,
        metavar="DIR",
        help="the model repository (default: %(default)s)",
    )
    if demo:
        parser.add_argument(
            "--demo", action="store_true", help="serve the demo model instead of a repository"
        )


def add_key_file(parser: argparse.ArgumentParser) -> None:
    """The option ``--key-file``."""
    parser.add_argument(
        "--key-file",
        type=Path,
        metavar="FILE",
        help="the admin key's file (default: $TRITON_SAM_ADMIN_KEY, then the file that "
        "$TRITON_SAM_ADMIN_KEY_FILE names)",
    )


def served_repository(args: argparse.Namespace) -> Path:
    """The repository that the options of :func:`add_repository` name."""
    if not args.demo:
        return cast(Path, args.repository)
    from ..demo import demo_repository

    return demo_repository()


def numbers(count: int, form: str) -> Callable[[str], list[float]]:
    """A reader for ``count`` numbers with commas between them; ``form`` says it in errors."""

    def parse(text: str) -> list[float]:
        try:
            values = [float(part) for part in text.split(",")]
        except ValueError:
            values = []
        if len(values) != count:
            raise argparse.ArgumentTypeError(f"expected {form} in pixels, not {text!r}")
        return values

    return parse
