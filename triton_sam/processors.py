"""How an inference uses this machine: its threads and its memory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


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


def session_options(*, on_cpu: bool = True) -> Any:
    """ONNX Runtime's options for whatever runs a model of ours, on a CPU or not."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors: its warnings are about how a graph was exported
    # Threads would look for work for as long again as a run took, on processors that others need.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # With plans for the memory of each shape SAM 3's encoder takes 11.7 GB of a CPU's instead of
    # 7.4 and is 5 % slower; SAM 2.1's is 1 % faster.
    options.enable_mem_pattern = not on_cpu
    return options
