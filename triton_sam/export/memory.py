"""The memory of this process: how much it took, and giving back what it no longer uses."""

from __future__ import annotations

import ctypes
import resource
from contextlib import suppress


def peak_memory_mb() -> int:
    """Largest resident size of this process so far (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def give_back_memory() -> None:
    """Give memory that is free back to the system.

    glibc keeps it for the thread that asked for it, so that another thread takes as much again: of
    SAM 3's pair 3.5 GB after its sessions are gone. Elsewhere this does nothing.
    """
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
