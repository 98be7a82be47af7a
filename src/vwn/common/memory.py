"""Memory of this process: what the C library keeps, and the peak."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import platform
import resource
import sys
from pathlib import Path

import torch


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next step, in a process that does nothing but train.

    By default it returns the memory to the system, which clears and maps it again in every step: up to a third of a
    connection's time on a CPU. Other C libraries have no such setting. Python's collections, which Trainer asks for,
    pass over what is there already.
    """
    gc.freeze()
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((-1, 2**31 - 1), (-2, 64 << 20), (-3, 32 << 20)):  # trim, top pad, mmap thresholds
            mallopt(option, value)


class PeakMemory:
    """Measure the peak memory from now on: the GPU's if there is one, else this process's."""

    def __init__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            gc.collect()
            if platform.libc_ver()[0] == "glibc":  # or the peak would start at what earlier runs of this process needed
                ctypes.CDLL(None).malloc_trim(0)
            with contextlib.suppress(OSError):  # resets the peak on Linux; elsewhere it covers the whole process
                Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> int:
        """Return the peak so far, in bytes."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status")
        if status.exists():
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
            return int(lines["VmHWM"].split()[0]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
