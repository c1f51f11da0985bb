"""NVIDIA's ``perf_analyzer`` as a second opinion on our own times, where it is installed."""

from __future__ import annotations

import csv
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..protocol import Call
from ..specs import Family
from ..transport import Endpoint, Transport, open_transport
from .statistics import percentiles
from .subjects import OPTIONS

PROGRAM = "perf_analyzer"
_GRACE_S = 60.0


@dataclass(frozen=True)
class CrossCheck:
    """The same request timed by both: percentiles in seconds."""

    model: str
    theirs: dict[str, float]
    ours: dict[str, float]


def cross_check(url: str, family: Family, seconds: float) -> CrossCheck | None:
    """Time the decoder with one client, first by us and then by them; ``None`` without them."""
    program = shutil.which(PROGRAM)
    if program is None:
        return None
    transport = open_transport(url, OPTIONS)
    try:
        ours = _time_calls(transport, family, seconds)
    finally:
        transport.close()
    theirs = run(program, Endpoint.parse(url), family, seconds)
    return None if theirs is None else CrossCheck(family.decoder.name, theirs, ours)


def shapes(family: Family) -> dict[str, tuple[int, ...]]:
    """The shape of each of the decoder's inputs for one image and one prompt.

    All of them, also those that are optional: ``perf_analyzer`` leaves none out. Where the
    decoder leaves an axis open the encoder's output of the same name tells its length.
    """
    encoded = {tensor.name: tensor.dims for tensor in family.encoder.outputs}
    return {
        tensor.name: tuple(
            1 if length == -1 else length for length in encoded.get(tensor.name, tensor.dims)
        )
        for tensor in family.decoder.inputs
    }


def _time_calls(transport: Transport, family: Family, seconds: float) -> dict[str, float]:
    """Zeros, as ``perf_analyzer --input-data zero`` sends them."""
    model = family.decoder
    inputs = {
        name: np.zeros(shape, model.input(name).dtype) for name, shape in shapes(family).items()
    }
    call = Call(model.name, inputs, tuple(tensor.name for tensor in model.outputs))
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(times) < 3:
        started = time.perf_counter()
        transport.infer(call)
        times.append(time.perf_counter() - started)
    return percentiles(times)


def command(
    program: str, endpoint: Endpoint, family: Family, seconds: float, out: Path
) -> list[str]:
    """The command line; shapes are given because every leading axis is open."""
    given: list[str] = []
    for name, shape in shapes(family).items():
        given += ["--shape", f"{name}:{','.join(map(str, shape))}"]
    protocol = "grpc" if endpoint.grpc else "http"
    return [
        *(program, "-m", family.decoder.name, "-u", endpoint.address, "-i", protocol),
        *("--concurrency-range", "1:1", "--input-data", "zero", *given),
        # Three windows, stable or not: how sure the numbers are our own samples tell.
        *("--stability-percentage", "100", "--max-trials", "3"),
        *("--measurement-interval", str(round(seconds * 1000 / 3)), "-f", str(out)),
    ]


def run(
    program: str, endpoint: Endpoint, family: Family, seconds: float
) -> dict[str, float] | None:
    """Its percentiles in seconds, or ``None`` when it fails, which is not ours to mend."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.csv"
        try:
            done = subprocess.run(
                command(program, endpoint, family, seconds, out),
                capture_output=True,
                timeout=10 * seconds + _GRACE_S,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode != 0 or not out.is_file():
            return None
        return read_percentiles(out.read_text())


def read_percentiles(text: str) -> dict[str, float] | None:
    """The first row of its CSV, whose times are in microseconds."""
    row = next(csv.DictReader(text.splitlines()), None)
    if row is None:
        return None
    names = {f"p{q}": f"p{q} latency" for q in (50, 90, 95, 99)}
    return {ours: float(row[theirs]) / 1e6 for ours, theirs in names.items() if theirs in row}
