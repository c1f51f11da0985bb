#!/usr/bin/env python3
"""Export a SAM 2.1 checkpoint to the ONNX pair of the model repository."""

from __future__ import annotations

import sys

from triton_sam.cli import export_script

if __name__ == "__main__":
    sys.exit(export_script.run("sam2", "SAM2ImagePredictor"))
