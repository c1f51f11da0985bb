"""``triton-sam benchmark``: measure a running server, and compare what was measured."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ..core import Where
from ..errors import InvalidInputError, MissingExtraError
from ..files import write_atomically
from ..specs import FAMILIES
from .common import Commands, add_repository, command

if TYPE_CHECKING:
    from ..benchmark.run import OnProgress
    from ..benchmark.session import Target

SLOWER = 3

_HELP = {
    "encode": "set_image of JPEG photos of several sizes",
    "click": "one and ten prompts about an image that is set",
    "pipeline": "a photo and one mask, a photo and ten masks",
    "hover": "a mouse that moves on whatever the server does; stale positions are cancelled",
    "throughput": "1, 2, 4 … N clients that click at once",
    "all": "all of these",
}
_EPILOG = """\
examples:
  triton-sam benchmark all --embedded --demo
  triton-sam benchmark click --url grpc://localhost:8001 --model-type sam2
  triton-sam benchmark compare before/benchmark.json after/benchmark.json

Beside every number stands a reference that was measured in the same rounds: the same files in ONNX
Runtime in this process, the official PyTorch predictor (with the extra `export`), the pair with
embeddings that travel with every click, and the embedded server's other protocol. Measure on a
machine that does nothing else."""


def add(commands: Commands) -> None:
    """Add the command and those below it."""
    parser = commands.add_parser(
        "benchmark",
        help="measure a running server beside references, or compare two measurements",
        description="Measure a running server as its users feel it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    below = parser.add_subparsers(title="benchmarks", metavar="WHAT", required=True)
    for name, help_line in _HELP.items():
        _add_measurement(below, name, help_line)
    _add_compare(below)
    _add_document(below)


def _add_measurement(commands: Commands, name: str, help_line: str) -> None:
    parser = command(commands, name, _measure, help_line)
    parser.set_defaults(benchmark=name)
    where = parser.add_argument_group("what is measured")
    where.add_argument("--url", help="the server (default: $TRITON_URL, then localhost:8000)")
    where.add_argument("--embedded", action="store_true", help="start a server for the run")
    where.add_argument(
        "--protocol",
        choices=("grpc", "http"),
        default="grpc",
        help="how to reach the embedded server (default: %(default)s)",
    )
    where.add_argument("--model-type", default="sam2", choices=list(FAMILIES))
    where.add_argument("--variant", help="one that is served beside the family's default")
    where.add_argument(
        "--embedding",
        choices=get_args(Where),
        default="auto",
        help="where embeddings are kept (default: on the server where it has the predictor)",
    )
    add_repository(parser, demo=True)
    where.add_argument(
        "--or-demo",
        action="store_true",
        help="as --demo, where the repository has no pair of the family",
    )
    beside = parser.add_argument_group("references")
    beside.add_argument(
        "--references",
        type=_or_none(_references),
        default=("onnxruntime", "pytorch", "inline", "protocol"),
        metavar="NAMES",
        help="of onnxruntime, pytorch, inline (embeddings that travel with every click) and "
        "protocol (the embedded server's other one), with commas; or none (default: all that can "
        "be had here)",
    )
    beside.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="weights of the PyTorch reference (default: those in checkpoints "
        "that the pair was exported from, else of sam2 the pair's own)",
    )
    _add_workload(parser)
    _add_effort(parser)


def _add_workload(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("workload")
    group.add_argument("--image", metavar="FILE", help="a photo of yours; it is resized")
    group.add_argument(
        "--megapixels",
        type=_list(float, 0.01, 80),
        default=(1.0, 12.0),
        metavar="N,…",
        help="sizes of the photos (default: 1,12); clicks are about the first",
    )
    group.add_argument(
        "--prompts",
        type=_list(int, 1, 1000),
        default=(1, 10),
        metavar="N,…",
        help="prompts in one call of click (default: 1,10)",
    )
    group.add_argument(
        "--masks",
        type=_or_none(_list(int, 1, 1000)),
        default=(1, 10),
        metavar="N,…",
        help="clicks on each photo of pipeline, one after the other (default: 1,10); or none",
    )
    group.add_argument(
        "--clients",
        type=_number(int, 1, 256),
        default=8,
        metavar="N",
        help="the most clients at once (default: %(default)s)",
    )
    group.add_argument(
        "--rate",
        type=_number(float, 1, 1000),
        default=60.0,
        metavar="HZ",
        help="mouse events a second of hover (default: %(default)g)",
    )


def _add_effort(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("effort and output")
    group.add_argument(
        "--budget",
        type=_number(float, 0.5, 86400),
        default=255.0,
        metavar="SECONDS",
        help="time for everything once the server runs, about (default: %(default)g)",
    )
    group.add_argument(
        "--precision",
        type=_number(float, 0.1, 50),
        default=2.5,
        metavar="PERCENT",
        help="stop when half of each median's 95 %% interval is below this (default: %(default)g)",
    )
    group.add_argument(
        "--note", metavar="TEXT", help="a line for the record, such as what ran beside"
    )
    group.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("benchmark-output"),
        metavar="DIR",
        help="where to write benchmark.json, the plots and report.html (default: %(default)s)",
    )


def _measure(args: argparse.Namespace) -> int:
    if args.url and args.embedded:
        raise InvalidInputError("--url names a running server and --embedded starts one: choose.")
    if args.or_demo and not args.embedded:
        raise InvalidInputError("--or-demo is about what --embedded serves: give both.")
    from ..benchmark import report, session, table
    from ..benchmark.measure import Plan
    from ..benchmark.run import Workload

    workload = Workload(
        megapixels=args.megapixels,
        image=args.image,
        prompts=args.prompts,
        masks=args.masks,
        clients=args.clients,
        rate_hz=args.rate,
    )
    plan = Plan(budget_s=args.budget, precision=args.precision / 100)
    every = [name for name in session.BENCHMARKS if args.masks or name != "pipeline"]
    benchmarks = every if args.benchmark == "all" else (args.benchmark,)
    with _target(args) as target, _progress() as say:
        record = session.measure(target, benchmarks, workload, plan, _typed(), say)
    print(table.render(record))
    for path in report.write_all(record, args.output):
        print(path, file=sys.stderr)
    return 0


@contextmanager
def _target(args: argparse.Namespace) -> Iterator[Target]:
    """What the command line names; the models may be in a folder that is deleted afterwards."""
    from ..benchmark import stand_in
    from ..benchmark.session import Target
    from ..benchmark.subjects import Which
    from ..core import server_url

    which = Which(args.model_type, args.variant, args.embedding)
    notes = [args.note] if args.note else []
    models = stand_in.StandIn(args.repository)
    with ExitStack() as stack:
        if args.demo or (args.or_demo and not stand_in.has_pair(args.repository, which.family)):
            if args.variant:
                raise InvalidInputError(f"The demo model has no variant {args.variant!r}.")
            models = stack.enter_context(stand_in.stand_in(which.family))
        if models.note:
            notes.append(models.note)
            print(f"note: {models.note}", file=sys.stderr)
        yield Target(
            which=which,
            repository=models.repository,
            url=None if args.embedded else server_url(args.url),
            protocol=args.protocol,
            checkpoint=args.checkpoint or models.checkpoint,
            references=args.references,
            notes=tuple(notes),
        )


def _typed() -> list[str]:
    """The command line as it would be typed again."""
    return ["triton-sam", *sys.argv[1:]]


@contextmanager
def _progress() -> Iterator[OnProgress]:
    """A bar on stderr; a new one for each thing that is measured."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError as exc:
        raise MissingExtraError(
            "Benchmarks need an extra: pip install 'triton-sam[benchmark]'"
        ) from exc
    layout = "{desc:<44} {percentage:3.0f} % |{bar:20}| {elapsed}"
    with tqdm(total=100, bar_format=layout, file=sys.stderr) as bar:

        def say(what: str, share: float) -> None:
            if what != bar.desc:
                bar.reset(100)
                bar.set_description_str(what, refresh=False)
            bar.n = min(100, round(100 * share))
            bar.refresh()

        yield say


def _add_compare(commands: Commands) -> None:
    parser = command(
        commands,
        "compare",
        _compare,
        "say what changed between two measurements beyond noise",
        epilog=(
            "A change is reported when the medians differ by the tolerance and the difference is\n"
            "significant over all series together. Where both files have a reference that ran its\n"
            "models in the same rounds, what those moved by is taken out first.\n\n"
            f"Exit status: 0, or {SLOWER} when something that is no reference became slower."
        ),
    )
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    parser.add_argument(
        "--tolerance",
        type=_number(float, 0, 100),
        default=5.0,
        metavar="PERCENT",
        help="smaller changes are not reported (default: %(default)g)",
    )


def _compare(args: argparse.Namespace) -> int:
    from ..benchmark import compare
    from ..benchmark.record import read_record

    before, after = read_record(args.before), read_record(args.after)
    changes = compare.compare(before, after, args.tolerance / 100)
    if not changes:
        raise InvalidInputError("The two files have no series in common; nothing to compare.")
    print(compare.render(changes))
    for line in compare.circumstances(before, after):
        print(f"note: {line}")
    return SLOWER if compare.slower(changes) else 0


def _add_document(commands: Commands) -> None:
    parser = command(
        commands, "document", _document, "write the page docs/performance.md from measurements"
    )
    parser.add_argument("records", type=Path, nargs="+", metavar="RESULT.json")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("docs/performance.md"), metavar="FILE"
    )


def _document(args: argparse.Namespace) -> int:
    from ..benchmark.document import render
    from ..benchmark.record import read_record

    text = render([(path, read_record(path)) for path in args.records])
    write_atomically(args.output, text.encode())
    print(args.output)
    return 0


def _number(kind: type, low: float, high: float):  # type: ignore[no-untyped-def]
    def parse(text: str):  # type: ignore[no-untyped-def]
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"expected {'a whole number' if kind is int else 'a number'} from {low:g} to "
                f"{high:g}, not {text!r}"
            )
        return value

    return parse


def _list(kind: type, low: float, high: float):  # type: ignore[no-untyped-def]
    one = _number(kind, low, high)
    return lambda text: tuple(one(part) for part in text.split(","))


def _or_none(parse: Callable[[str], tuple[Any, ...]]) -> Callable[[str], tuple[Any, ...]]:
    return lambda text: () if text == "none" else parse(text)


def _references(text: str) -> tuple[str, ...]:
    known = ("onnxruntime", "pytorch", "inline", "protocol")
    names = tuple(text.split(","))
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(
                f"expected {', '.join(known)}, with commas between them, or none; not {name!r}"
            )
    return names
