#!/usr/bin/env python3
"""Fetch the published SAM 3 pair in ONNX, which needs no token.

The same as `triton-sam download sam3-onnx`.
"""

from __future__ import annotations

import argparse
import sys

from triton_sam import cli
from triton_sam.specs import FAMILIES

_PUBLISHED = FAMILIES["sam3"].published


def main() -> int:
    """Parse the arguments and run `triton-sam download sam3-onnx`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--variant",
        default="fp32",
        choices=list(_PUBLISHED.precisions if _PUBLISHED else ()),
        help="precision of the weights (default: %(default)s)",
    )
    parser.add_argument("--output", default="checkpoints", metavar="DIR")
    parser.add_argument("--offline", action="store_true")
    parser.add_argument("--force", action="store_true")
    args = parser.parse_args()
    command = ["download", "sam3-onnx", "--variant", args.variant, "--output", args.output]
    command += [f"--{name}" for name in ("offline", "force") if getattr(args, name)]
    return cli.main(command)


if __name__ == "__main__":
    sys.exit(main())
