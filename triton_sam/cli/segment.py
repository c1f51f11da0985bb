"""``triton-sam segment``: one object of one image."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import PromptError
from ..specs import FAMILIES
from .common import Commands, add_repository, command, numbers, served_repository

if TYPE_CHECKING:
    from PIL.Image import Image


def add(commands: Commands) -> None:
    """Add the command."""
    parser = command(
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
        type=numbers(2, "X,Y"),
        action="append",
        default=[],
        metavar="X,Y",
        help="a point on the object; may be given several times",
    )
    parser.add_argument(
        "--background",
        type=numbers(2, "X,Y"),
        action="append",
        default=[],
        metavar="X,Y",
        help="a point that is not on the object; may be given several times",
    )
    parser.add_argument(
        "--box", type=numbers(4, "X0,Y0,X1,Y1"), metavar="X0,Y0,X1,Y1", help="a box around it"
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
    parser.add_argument(
        "--variant", metavar="NAME", help="a variant that is served beside the family's default"
    )
    parser.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument(
        "--embedded", action="store_true", help="start a server for this one command"
    )
    add_repository(parser, demo=True)


def _segment(args: argparse.Namespace) -> int:
    from ..images import load_image

    if not (args.point or args.background or args.box):
        raise PromptError("Say where the object is: --point X,Y, --box X0,Y0,X1,Y1, or several.")
    image = load_image(args.image)  # a wrong file is said before a server is started
    if not args.embedded:
        return _segment_at(args, image, args.url)
    from ..server import EmbeddedServer

    with EmbeddedServer(served_repository(args)) as server:
        return _segment_at(args, image, server.http_url)


def _segment_at(args: argparse.Namespace, image: Image, url: str | None) -> int:
    from ..client import SAM2TritonClient
    from ..pictures import draw_prompts, write_png

    points = args.point + args.background
    labels = [1] * len(args.point) + [0] * len(args.background)
    with SAM2TritonClient(
        url, args.model_type, variant=args.variant, timeout_s=args.timeout
    ) as client:
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
