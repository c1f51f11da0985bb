"""Cold start: from nothing to the first mask."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable

from ..server import EmbeddedServer
from ..transport import open_transport
from .operations import Source, own
from .subjects import OPTIONS, Which, open_client

_IMPORTS = """
import time
started = time.process_time()
import numpy, tritonclient.http
between = time.process_time()
import triton_sam
print(between - started, time.process_time() - between)
"""


def import_times() -> dict[str, float]:
    """Seconds of processor time that importing takes in a fresh interpreter.

    First what ``triton_sam`` rests on, then what it takes beyond that.
    """
    done = subprocess.run(
        [sys.executable, "-c", _IMPORTS], capture_output=True, text=True, check=True
    )
    steps = ("import numpy, tritonclient", "import triton_sam beyond them")
    return dict(zip(steps, map(float, done.stdout.split()), strict=True))


def cold_start(
    url: str, which: Which, source: Source, patience_s: float = math.inf
) -> dict[str, float]:
    """Seconds of a new client's first steps on a server that runs: first photo, click, second.

    ``patience_s``: where the first photo takes longer there is no second one.
    """
    file, other = own(source.file(-900)), own(source.file(-901))
    first, second = source.clicks(1, -900), source.clicks(1, -901)
    steps: dict[str, float] = {}
    client, _ = open_client(which, open_transport(url, OPTIONS))
    with client:
        steps["first set_image"] = _seconds(lambda: client.set_image(file))
        steps["first click"] = _seconds(lambda: client.predict(first.points, first.labels))
        if steps["first set_image"] < patience_s:
            steps["second set_image"] = _seconds(lambda: client.set_image(other))
        steps["second click"] = _seconds(lambda: client.predict(second.points, second.labels))
    return steps


def start_timed(server: EmbeddedServer) -> float:
    """Start ``server``; the seconds until every model was ready."""
    return _seconds(server.start)


def _seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started
