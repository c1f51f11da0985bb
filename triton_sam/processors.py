"""How many threads an inference is to use on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def default_threads() -> int:
    """``TRITON_SAM_THREADS``, or one for each core that this process may use.

    The number is always given to ONNX Runtime: left to itself it counts the cores of the machine
    and binds its threads to them, also where a container may use fewer.
    """
    wanted = os.environ.get("TRITON_SAM_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    count = len(cores(Path("/sys/devices/system/cpu"), os.sched_getaffinity(0)))
    return max(1, min(count, cpu_quota(Path("/sys/fs/cgroup/cpu.max"), count)))


def cores(root: Path, allowed: Iterable[int]) -> set[str]:
    """The physical cores behind the logical processors ``allowed``."""
    siblings = set()
    for number in allowed:
        file = root / f"cpu{number}" / "topology" / "thread_siblings_list"
        siblings.add(file.read_text().strip() if file.exists() else str(number))
    return siblings


def cpu_quota(file: Path, default: int) -> int:
    """How many processors a container's limit amounts to; ``default`` without a limit."""
    quota, _, period = (file.read_text() if file.exists() else "").partition(" ")
    return -(-int(quota) // int(period)) if quota.isdigit() else default
