#!/usr/bin/env python3
"""Show that `triton-sam benchmark compare` tells a slower build from the same one.

The demo model's clicks are measured three times, one run after the other: a copy of this package,
the same copy again, and a copy in which the server takes a tenth longer for every answer. Between
the first two `compare` has to report no change, and of the third that it is slower. The records
stay in the folder of `--output`. Measure on a machine that does nothing else; it takes three times
the budget. Exit status: 0 when both came out as they should.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import triton_sam
from triton_sam.cli.benchmark import SLOWER

_PACKAGE = Path(triton_sam.__file__).parent
# Every request to the predictor, from its arrival to its answer.
_SLOWED = """

def _slowed(self: Predictor, request: Request) -> None:
    begun = time.perf_counter()

    def reply(answer: Arrays | PredictorError) -> None:
        time.sleep({share} * (time.perf_counter() - begun))
        request.reply(answer)

    _submit(self, replace(request, reply=reply))


_submit = Predictor.submit
Predictor.submit = _slowed
"""


def main() -> int:
    """Measure and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=150, help="seconds of each (default: 150)")
    parser.add_argument(
        "--slower", type=float, default=10, metavar="PERCENT", help="default: %(default)s"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("sensitivity-output"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        build, slow = Path(name) / "build", Path(name) / "slow"
        copy_package(build)
        copy_package(slow, args.slower / 100)
        runs = (("one", build), ("two", build), ("slowed", slow))
        one, two, slowed = (
            _measure(folder, (args.output / title).resolve(), args.budget) for title, folder in runs
        )
        same, found = _compare(build, one, two), _compare(build, one, slowed)
    ended = {0: "no change", SLOWER: "slower"}
    print(f"The same build: {ended[same]}. The slowed one: {ended[found]}.")
    return 0 if (same, found) == (0, SLOWER) else 1


def copy_package(folder: Path, slower: float = 0) -> None:
    """Put the package into ``folder``; ``slower``: by which share its predictor takes longer."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(_PACKAGE, folder / _PACKAGE.name, ignore=ignored)
    if slower:
        with (folder / _PACKAGE.name / "predictor/service.py").open("a") as file:
            file.write(_SLOWED.format(share=slower))


def _measure(build: Path, output: Path, budget: float) -> Path:
    workload = ["--megapixels", "1", "--prompts", "1", "--references", "onnxruntime"]
    options = ["--embedded", "--demo", *workload, "--precision", "0.5", "--budget", f"{budget:g}"]
    done = _triton_sam(build, "click", *options, "-o", str(output))
    if done:
        raise SystemExit(done)
    return output / "benchmark.json"


def _compare(build: Path, before: Path, after: Path) -> int:
    status = _triton_sam(build, "compare", str(before), str(after))
    if status not in (0, SLOWER):
        raise SystemExit(status)
    return status


def _triton_sam(build: Path, *arguments: str) -> int:
    """``triton-sam benchmark`` of the package in ``build``; its exit status."""
    command = [sys.executable, "-m", "triton_sam.cli", "benchmark", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(build)}
    return subprocess.run(command, cwd=build, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
