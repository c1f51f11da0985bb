"""``triton-sam``: a shell over the package. Data go to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, cast

from . import __version__
from .errors import MissingExtraError, RepositoryError, SamError
from .repository import check, write_configs
from .specs import FAMILIES, family

if TYPE_CHECKING:
    from PIL.Image import Image

    from .server import EmbeddedServer

_REPOSITORY = Path("model_repository")
_CHECKPOINTS = Path("checkpoints")


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


class _Parser(argparse.ArgumentParser):
    """One line on a wrong command line, instead of the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets ``run`` to the function that carries it out."""
    parser = _Parser(
        prog="triton-sam",
        description="Serve Segment Anything on NVIDIA Triton, with the official masks.",
        epilog="Start with: triton-sam demo",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_add_demo, _add_segment, _add_serve, _add_export, _add_configure, _add_check):
        add(commands)
    return parser


_Commands = argparse._SubParsersAction  # the type has no public name


def _command(
    commands: _Commands[_Parser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    help: str,
    epilog: str = "",
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_repository(parser: argparse.ArgumentParser, demo: bool = False) -> None:
    parser.add_argument(
        "--repository",
        type=Path,
        default=_REPOSITORY,
        metavar="DIR",
        help="the model repository (default: %(default)s)",
    )
    if demo:
        parser.add_argument(
            "--demo", action="store_true", help="serve the demo model instead of a repository"
        )


def _add_segment(commands: _Commands[_Parser]) -> None:
    parser = _command(
        commands,
        "segment",
        _segment,
        "cut an object out of an image with clicks and a box",
        epilog=(
            "examples:\n"
            "  triton-sam segment photo.jpg --point 520,375 -o out.png\n"
            "  triton-sam segment photo.jpg --box 80,60,410,390 --background 300,100 -o out.png\n"
            "  triton-sam segment photo.jpg --point 520,375 --embedded --demo -o out.png\n\n"
            "Coordinates are pixels of the image as you see it, from its top left corner. The\n"
            "score, the area and the bounding box are printed as JSON."
        ),
    )
    parser.add_argument("image", help="JPEG, PNG, WebP, TIFF … file")
    parser.add_argument(
        "--point",
        type=_numbers(2, "X,Y"),
        action="append",
        default=[],
        metavar="X,Y",
        help="a point on the object; may be given several times",
    )
    parser.add_argument(
        "--background",
        type=_numbers(2, "X,Y"),
        action="append",
        default=[],
        metavar="X,Y",
        help="a point that is not on the object; may be given several times",
    )
    parser.add_argument(
        "--box", type=_numbers(4, "X0,Y0,X1,Y1"), metavar="X0,Y0,X1,Y1", help="a box around it"
    )
    parser.add_argument(
        "--multimask",
        action="store_true",
        help="let the model propose three masks and keep the one that it scores best",
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="PNG", help="write the image with the mask over it"
    )
    parser.add_argument("--mask", type=Path, metavar="PNG", help="write the mask, 0 and 255")
    parser.add_argument(
        "--url",
        help="the server: localhost:8000, http://…, https://…, grpc://…, grpcs://… "
        "(default: $TRITON_URL, then localhost:8000)",
    )
    parser.add_argument("--model-type", default="sam2", choices=list(FAMILIES))
    parser.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument(
        "--embedded", action="store_true", help="start a server for this one command"
    )
    _add_repository(parser, demo=True)


def _numbers(count: int, form: str) -> Callable[[str], list[float]]:
    def parse(text: str) -> list[float]:
        try:
            values = [float(part) for part in text.split(",")]
        except ValueError:
            values = []
        if len(values) != count:
            raise argparse.ArgumentTypeError(f"expected {form} in pixels, not {text!r}")
        return values

    return parse


def _segment(args: argparse.Namespace) -> int:
    from .images import load_image

    image = load_image(args.image)  # a wrong file is said before a server is started
    if not args.embedded:
        return _segment_at(args, image, args.url)
    with _embedded_server(args) as server:
        return _segment_at(args, image, server.http_url)


def _embedded_server(args: argparse.Namespace) -> EmbeddedServer:
    from .server import EmbeddedServer

    return EmbeddedServer(_served_repository(args))


def _served_repository(args: argparse.Namespace) -> Path:
    if not args.demo:
        return cast(Path, args.repository)
    from .demo import demo_repository

    return demo_repository()


def _segment_at(args: argparse.Namespace, image: Image, url: str | None) -> int:
    from .client import SAM2TritonClient
    from .pictures import draw_prompts, write_png

    points = args.point + args.background
    labels = [1] * len(args.point) + [0] * len(args.background)
    with SAM2TritonClient(url, args.model_type, timeout_s=args.timeout) as client:
        client.set_image(image)
        result = client.segment(
            points or None, labels or None, box=args.box, multimask_output=args.multimask
        )
    best = int(result.scores[0].argmax())
    if args.output is not None:
        write_png(draw_prompts(result.overlay(image), points, labels, args.box), args.output)
    if args.mask is not None:
        result.to_png(args.mask)
    summary = {
        "score": round(float(result.scores[0, best]), 4),
        "area": int(result.area[0, best]),
        "bbox": [int(value) for value in result.bbox[0, best]],
        "size": list(image.size),
    }
    print(json.dumps(summary))
    return 0


def _add_demo(commands: _Commands[_Parser]) -> None:
    parser = _command(
        commands,
        "demo",
        _demo,
        "segment a real photo with the demo model on an embedded server",
        epilog=(
            "The first run downloads the server (about 90 MB) into the user's cache folder.\n"
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
    from .demo import run

    run(args.output)
    return 0


def _add_serve(commands: _Commands[_Parser]) -> None:
    parser = _command(
        commands,
        "serve",
        _serve,
        "serve a model repository on this machine's processor, without Docker or a GPU",
        epilog="Ctrl-C or SIGTERM stops it. Port 0 takes a free one.",
    )
    _add_repository(parser, demo=True)
    parser.add_argument("--host", default="127.0.0.1", help="address (default: %(default)s)")
    for name, port in (("http", 8000), ("grpc", 8001), ("metrics", 8002)):
        parser.add_argument(
            f"--{name}-port", type=_port, default=port, metavar="PORT", help="default: %(default)s"
        )
    parser.add_argument("--log-file", type=Path, metavar="FILE", help="keep the server's log")


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, not {text!r}")
    return int(text)


def _serve(args: argparse.Namespace) -> int:
    from .server import EmbeddedServer

    # The default action of SIGTERM would not run `with`'s exit.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    server = EmbeddedServer(
        _served_repository(args),
        host=args.host,
        http_port=args.http_port,
        grpc_port=args.grpc_port,
        metrics_port=args.metrics_port,
        log_file=args.log_file,
    )
    with server:
        print(f"http     {server.http_url}\ngrpc     {server.grpc_url}")
        print(f"metrics  {server.metrics_url}\nCtrl-C stops the server.", flush=True)
        try:
            return server.wait()
        except KeyboardInterrupt:
            return 0


def _add_export(commands: _Commands[_Parser]) -> None:
    parser = _command(
        commands,
        "export",
        _export,
        "turn a checkpoint into an ONNX encoder and decoder in the model repository",
        epilog=(
            "example:\n"
            "  triton-sam export sam2 --variant tiny --checkpoint checkpoints/"
            "sam2.1_hiera_tiny.pt\n\n"
            "Both files are run and compared with the PyTorch model before they are installed."
        ),
    )
    parser.add_argument("family", choices=list(FAMILIES))
    parser.add_argument("--variant", metavar="NAME", help="tiny, small, base_plus, large or demo")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="default: the variant's file in checkpoints"
    )
    parser.add_argument("--model-cfg", metavar="YAML", help="default: the variant's configuration")
    parser.add_argument(
        "--output",
        type=Path,
        default=_REPOSITORY,
        metavar="DIR",
        help="the model repository (default: %(default)s)",
    )
    parser.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")


def _export(args: argparse.Namespace) -> int:
    spec = family(args.family)
    variant = spec.variant(args.variant)
    try:
        from .export.pipeline import export
    except ModuleNotFoundError as exc:
        raise MissingExtraError(
            f"Exporting needs {exc.name}: pip install 'triton-sam[export]'"
        ) from exc
    export(
        spec,
        variant.name,
        args.checkpoint or _CHECKPOINTS / variant.file,
        args.output,
        model_cfg=args.model_cfg,
        device=args.device,
    )
    return 0


def _add_configure(commands: _Commands[_Parser]) -> None:
    parser = _command(
        commands, "configure", _configure, "write each model's config.pbtxt into the repository"
    )
    _add_repository(parser)


def _configure(args: argparse.Namespace) -> int:
    for path in write_configs(args.repository):
        print(path)
    return 0


def _add_check(commands: _Commands[_Parser]) -> None:
    parser = _command(
        commands,
        "check",
        _check,
        "say what is missing, stale or mismatched in the model repository",
        epilog="Exit status: 0 when all is right, 1 when not.",
    )
    _add_repository(parser)


def _check(args: argparse.Namespace) -> int:
    problems = check(args.repository)
    for problem in problems:
        print(problem)
    if problems:
        raise RepositoryError(f"{len(problems)} problems in {args.repository}.")
    print(f"{args.repository}: all models are there and as the table says.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
