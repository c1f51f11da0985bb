#!/usr/bin/env python3
"""Measure live hovering under load: the last mask of every session, and clicks in between.

Without --url it starts an embedded server on --repository, or on the demo model. Prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

from triton_sam.demo import demo_repository
from triton_sam.hover_load import measure_hover_load
from triton_sam.server import EmbeddedServer


def main() -> None:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="a running server, such as grpc://localhost:8001")
    parser.add_argument("--repository", type=Path, help="what the embedded server serves")
    parser.add_argument("--model-type", default="sam2")
    parser.add_argument("--sessions", type=int, default=20)
    parser.add_argument("--hovers", type=int, default=50, help="positions of each stroke")
    parser.add_argument("--rate", type=float, default=60.0, metavar="HZ")
    parser.add_argument("--strokes", type=int, default=5)
    parser.add_argument("--embedding", choices=("auto", "server", "client"), default="auto")
    args = parser.parse_args()
    with _server(args.url, args.repository) as server:
        load = asyncio.run(
            measure_hover_load(
                args.url or server.url,
                args.model_type,
                sessions=args.sessions,
                hovers=args.hovers,
                rate_hz=args.rate,
                strokes=args.strokes,
                embedding=args.embedding,
            )
        )
    ratios = {"settle_ratio": load.settle_ratio, "tail_ratio": load.tail_ratio}
    figures = {**asdict(load), **ratios}
    print(json.dumps({k: round(v, 2) for k, v in figures.items()}, indent=2))


def _server(url: str | None, repository: Path | None) -> AbstractContextManager[EmbeddedServer]:
    server = EmbeddedServer(repository or demo_repository())
    return nullcontext(server) if url else server


if __name__ == "__main__":
    main()
