"""``triton-sam serve``: the embedded server."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from ..server.control import MODES, read_key
from .common import Commands, add_key_file, add_repository, command, served_repository


def add(commands: Commands) -> None:
    """Add the command."""
    parser = command(
        commands,
        "serve",
        _serve,
        "serve a model repository on this machine's processor, without Docker or a GPU",
        epilog=(
            "Ctrl-C or SIGTERM stops it. Port 0 takes a free one.\n\n"
            "With --model-control explicit, `triton-sam reload` swaps a model while the server\n"
            "runs. Whoever may do that runs code on the server, so it takes a key, on both sides\n"
            "from --key-file or $TRITON_SAM_ADMIN_KEY (openssl rand -hex 32 makes one). Processes\n"
            "of this machine can see it in the server's command line."
        ),
    )
    add_repository(parser, demo=True)
    parser.add_argument(
        "--models",
        nargs="+",
        default=(),
        metavar="PATTERN",
        help="serve some only, such as '*_predictor': predictors run without their pair, for half "
        "of the memory",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address (default: %(default)s)")
    for name, port in (("http", 8000), ("grpc", 8001), ("metrics", 8002)):
        parser.add_argument(
            f"--{name}-port", type=_port, default=port, metavar="PORT", help="default: %(default)s"
        )
    parser.add_argument("--log-file", type=Path, metavar="FILE", help="keep the server's log")
    parser.add_argument(
        "--model-control",
        choices=MODES,
        default="none",
        help="whether models can be loaded anew while it runs (default: %(default)s)",
    )
    add_key_file(parser)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, not {text!r}")
    return int(text)


def _serve(args: argparse.Namespace) -> int:
    from ..server import EmbeddedServer

    # The default action of SIGTERM would not run `with`'s exit.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    server = EmbeddedServer(
        served_repository(args),
        models=args.models,
        host=args.host,
        http_port=args.http_port,
        grpc_port=args.grpc_port,
        metrics_port=args.metrics_port,
        log_file=args.log_file,
        model_control=args.model_control,
        admin_key=read_key(args.key_file),
    )
    with server:
        print(f"http     {server.http_url}\ngrpc     {server.grpc_url}")
        print(f"metrics  {server.metrics_url}\nCtrl-C stops the server.", flush=True)
        try:
            return server.wait()
        except KeyboardInterrupt:
            return 0
