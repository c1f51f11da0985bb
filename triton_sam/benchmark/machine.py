"""The machine and the versions that a number belongs to, and what the machine can do at best."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

_PACKAGES = (
    "triton-sam",
    "numpy",
    "pillow",
    "tritonclient",
    "grpcio",
    "onnxruntime",
    "onnxruntime-gpu",
    "torch",
)
_SIDE = 2048
_COPY_BYTES = 256 << 20
_REPEATS = 5


def describe() -> dict[str, Any]:
    """Processor, memory, system and how busy the machine is, for the record."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(_memory("MemTotal") / (1 << 30), 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "busy_before": _busy_now(),
        "gpus": _gpus(),
    }


def versions() -> dict[str, str]:
    """Installed packages that matter, with their versions."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def available_memory() -> int:
    """Bytes that programs can still have before the machine swaps or ends one of them."""
    return _memory("MemAvailable")


def _memory(name: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) << 10
    return 0


def _gpus() -> list[str]:
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version"]
    try:
        done = subprocess.run(
            [*command, "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


@dataclass(frozen=True)
class Peak:
    """What the processor was seen to do at best.

    ``gflops``: thousand millions of float32 operations a second in a matrix product.
    ``gbytes``: thousand millions of bytes a second, read and written, in a copy.
    """

    gflops: float
    gbytes: float


def measure_peak() -> Peak:
    """The best of a few runs of numpy, which uses all cores for the product and one to copy."""
    generator = np.random.default_rng(0)
    a, b = generator.random((2, _SIDE, _SIDE), np.float32)
    out = np.empty_like(a)
    product = _fastest(lambda: np.matmul(a, b, out=out))
    source = np.ones(_COPY_BYTES // 4, np.float32)
    target = np.zeros_like(source)
    copy = _fastest(lambda: np.copyto(target, source))
    return Peak(2 * _SIDE**3 / product / 1e9, 2 * _COPY_BYTES / copy / 1e9)


def _fastest(function: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


class Busy:
    """The share of the machine's processors that was at work between two moments, 0 to 1."""

    def __init__(self) -> None:
        self._before = _ticks()

    def share(self) -> float:
        """Since this was made."""
        total, idle = (b - a for a, b in zip(self._before, _ticks(), strict=True))
        return round(1 - idle / total, 3) if total > 0 else 0.0


def _busy_now() -> float:
    """While this process sleeps. The load average still counts what ended a minute ago."""
    busy = Busy()
    time.sleep(1.0)
    return busy.share()


def _ticks() -> tuple[int, int]:
    line = Path("/proc/stat").read_text().splitlines()[0]
    ticks = [int(value) for value in line.split()[1:9]]
    return sum(ticks), ticks[3] + ticks[4]
