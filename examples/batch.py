#!/usr/bin/env python3
"""Segment a folder of images: a grid of clicks each, the masks as PNG files and a JSON line each.

    python examples/batch.py photos masks --url grpc://localhost:8001

Several images are under way at once, so that decoding files, encoding and decoding masks overlap.
What is done already is skipped, so that a batch that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path

import numpy as np

from triton_sam import AsyncSAM2TritonClient, SamError

IMAGES = ("*.jpg", "*.jpeg", "*.png", "*.tif", "*.tiff", "*.webp")
AT_ONCE = 4


def grid(height: int, width: int, side: int = 3) -> np.ndarray:
    """Clicks on a grid, one prompt each: (side * side, 1, 2)."""
    steps = (np.arange(side) + 0.5) / side
    x, y = np.meshgrid(steps * width, steps * height)
    return np.stack([x, y], axis=-1).reshape(-1, 1, 2)


async def segment(client: AsyncSAM2TritonClient, image: Path, mask: Path) -> None:
    """Write the mask with the best score of all clicks."""
    embedding = await client.encode(image)
    clicks = grid(*embedding.original_size)
    found = await client.segment(clicks, np.ones(clicks.shape[:2]), embedding=embedding)
    best = int(found.scores[:, 0].argmax())
    await asyncio.to_thread(found.to_png, mask, prompt=best)
    summary = {
        "image": str(image),
        "mask": str(mask),
        "click": clicks[best, 0].round(1).tolist(),
        "score": round(float(found.scores[best, 0]), 4),
        "bbox": found.bbox[best, 0].tolist(),
    }
    print(json.dumps(summary), flush=True)


async def main(source: Path, target: Path, url: str | None) -> int:
    """Segment what is not segmented yet; the number of images that failed."""
    target.mkdir(parents=True, exist_ok=True)
    images = sorted(path for pattern in IMAGES for path in source.glob(pattern))
    slots = asyncio.Semaphore(AT_ONCE)
    async with AsyncSAM2TritonClient(url) as client:

        async def one(image: Path) -> bool:
            mask = target / f"{image.stem}.png"
            async with slots:
                if mask.exists():
                    return True
                try:
                    await segment(client, image, mask)
                except SamError as exc:
                    print(f"{image}: {exc}", file=sys.stderr)
                    return False
                return True

        done = await asyncio.gather(*map(one, images))
    return done.count(False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a folder of images")
    parser.add_argument("target", type=Path, help="where the masks go")
    parser.add_argument("--url", help="default: $TRITON_URL, then localhost:8000")
    args = parser.parse_args()
    sys.exit(min(asyncio.run(main(args.source, args.target, args.url)), 1))
