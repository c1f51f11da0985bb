#!/usr/bin/env python3
"""Live masks: a pointer crosses a photo at 60 Hz, and a click commits what it found.

    python examples/hover.py photo.jpg --url grpc://localhost:8001

In a program of your own, `hover.move` goes where the mouse events come from: it may be called from
any thread and returns at once.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from triton_sam import Hover, SpeculativeSAM2Client

RATE_HZ = 60


async def move_pointer(hover: Hover) -> None:
    """Cross the image from left to right in a second, as a hand would."""
    height, width = hover.embedding.original_size
    for step in range(RATE_HZ):
        hover.move(width * (step + 0.5) / RATE_HZ, height / 2)
        await asyncio.sleep(1 / RATE_HZ)
    hover.finish()  # the iteration below ends with the mask of the last position


async def main(image: Path, url: str | None, output: Path) -> None:
    """Hover, click, and write the overlay of the click to ``output``."""
    async with SpeculativeSAM2Client(url) as client, client.hover(image) as hover:
        moving = asyncio.create_task(move_pointer(hover))
        async for found in hover:
            area = int(found.segmentation.area[0, 0])
            print(f"x {found.x:6.1f}  {area:8d} pixels  after {1e3 * found.latency_s:6.1f} ms")
        await moving
        print(hover.status)

        height, width = hover.embedding.original_size
        clicked = await hover.click(width / 2, height / 2)
        clicked.segmentation.overlay(image).save(output)
        print(f"The click's mask: {output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("image", type=Path)
    parser.add_argument("--url", help="default: $TRITON_URL, then localhost:8000")
    parser.add_argument("-o", "--output", type=Path, default=Path("hover.png"))
    args = parser.parse_args()
    asyncio.run(main(args.image, args.url, args.output))
