"""``triton-sam reload``: swap a model on a running server."""

from __future__ import annotations

import argparse
import os

from ..server.control import read_key
from ..specs import FAMILIES, family
from ..specs.predictor import predictor_model
from .common import Commands, add_key_file, command


def add(commands: Commands) -> None:
    """Add the command."""
    parser = command(
        commands,
        "reload",
        _reload,
        "load a family's models anew on a running server, without a failed request",
        epilog=(
            "example:\n"
            "  triton-sam export sam2 --variant large --default\n"
            "  triton-sam reload sam2\n\n"
            "The server has to run in explicit model control (`triton-sam serve --model-control\n"
            "explicit`, or TRITON_SAM_MODEL_CONTROL=explicit with docker compose) and to have\n"
            "been given the same key. The old model answers until the new one is ready, and goes\n"
            "on when that cannot be loaded; for that time both take memory. A model whose files\n"
            "have not changed stays as it is. Embeddings of the old encoder do not fit a decoder\n"
            "of another checkpoint: call set_image again."
        ),
    )
    parser.add_argument(
        "names",
        nargs="+",
        metavar="FAMILY",
        help=f"{', '.join(FAMILIES)}, or the name of one model",
    )
    parser.add_argument(
        "--variant", metavar="NAME", help="a variant that lies beside the family's default"
    )
    parser.add_argument(
        "--url",
        help="the server's HTTP address (default: $TRITON_URL, then localhost:8000)",
    )
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS")
    add_key_file(parser)


def _reload(args: argparse.Namespace) -> int:
    from ..admin import ready_models, reload

    url = args.url or os.environ.get("TRITON_URL") or "localhost:8000"
    key = read_key(args.key_file)
    ready = ready_models(url, key, timeout_s=args.timeout)
    models = [model for name in args.names for model in _models(name, args.variant, ready)]
    for done in reload(models, url, key, timeout_s=args.timeout):
        versions = ", ".join(done.versions)
        print(f"{done.model}  version {versions}  ready after {done.seconds:.2f} s", flush=True)
    return 0


def _models(name: str, variant: str | None, ready: list[str]) -> list[str]:
    if name not in FAMILIES and variant is None:
        return [name]
    spec = family(name).named(variant)
    predictor = predictor_model(spec).name
    # The encoder first: it is the larger one, so that a failure leaves the pair as it was.
    pair = [model.name for model in spec.models]
    return [*pair, predictor] if predictor in ready else pair
