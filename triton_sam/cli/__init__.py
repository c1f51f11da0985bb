"""``triton-sam``: a shell over the package. Data go to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from .. import __version__
from ..errors import SamError
from . import (
    benchmark,
    demo,
    download,
    export,
    published,
    reload,
    repository,
    segment,
    serve,
    setup,
    smoke,
)
from .common import Parser

_COMMANDS = (
    demo.add,
    segment.add,
    serve.add,
    reload.add,
    smoke.add,
    setup.add,
    download.add,
    export.add,
    published.add,
    repository.add_configure,
    repository.add_check,
    benchmark.add,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0, 1 for an error, 2 for a wrong command line."""
    args = build_parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except SamError as exc:
        return _fail(str(exc))
    except BrokenPipeError:
        # Whoever read our output has seen enough; the interpreter must not flush into it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as exc:
        return _fail(f"{exc.strerror or exc}: {exc.filename}" if exc.filename else str(exc))
    except KeyboardInterrupt:
        return 130


def _fail(message: str) -> int:
    print(f"triton-sam: {message}", file=sys.stderr)
    return 1


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets ``run`` to the function that carries it out."""
    parser = Parser(
        prog="triton-sam",
        description="Serve Segment Anything on NVIDIA Triton, with the official masks.",
        epilog="Start with: triton-sam demo",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in _COMMANDS:
        add(commands)
    return parser
