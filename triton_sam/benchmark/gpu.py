"""What the GPUs of this machine did meanwhile, as ``nvidia-smi`` says it."""

from __future__ import annotations

import subprocess
import threading
from typing import Any

_QUERY = "--query-gpu=name,utilization.gpu,memory.used,power.draw"
_PERIOD_MS = 200


class GpuSampler:
    """Samples every GPU five times a second; use it as a context manager.

    Without ``nvidia-smi`` it finds nothing.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None
        self._rows: dict[str, list[tuple[float, float, float]]] = {}

    def __enter__(self) -> GpuSampler:
        command = ["nvidia-smi", _QUERY, "--format=csv,noheader,nounits", f"-lms={_PERIOD_MS}"]
        try:
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        except OSError:
            return self
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._process is not None and self._thread is not None:
            self._process.terminate()
            self._process.wait()
            self._thread.join()
            if self._process.stdout is not None:
                self._process.stdout.close()

    def summary(self) -> list[dict[str, Any]]:
        """For each model of GPU: utilisation in percent, memory in MiB, power in watts."""
        return [_summary(name, rows) for name, rows in self._rows.items()]

    def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            name, *values = (part.strip() for part in line.split(","))
            try:
                utilisation, memory, power = (float(value) for value in values)
            except ValueError:  # "[N/A]" where the GPU does not tell
                continue
            self._rows.setdefault(name, []).append((utilisation, memory, power))


def _summary(name: str, rows: list[tuple[float, float, float]]) -> dict[str, Any]:
    utilisation, memory, power = zip(*rows, strict=True)
    return {
        "name": name,
        "utilisation_mean": round(sum(utilisation) / len(rows), 1),
        "utilisation_max": max(utilisation),
        "memory_max_mib": max(memory),
        "power_mean_w": round(sum(power) / len(rows), 1),
    }
