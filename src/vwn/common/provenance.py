"""What a result was made with and on: command, versions, commit, machine, peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import gc
import os
import platform
import resource
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def provenance() -> dict[str, Any]:
    """Command, time, versions, commit and machine, for a run's directory and every report."""
    program = Path(sys.argv[0]).name
    program = "vwn" if program == "__main__.py" else program  # python -m vwn
    return {
        "command": shlex.join([program, *sys.argv[1:]]),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": machine(),
    }


def versions() -> dict[str, str | None]:
    """Versions of what decides a run's numbers, and the commit if run from a checkout."""
    import vwn

    found: dict[str, str | None] = {"vwn": vwn.__version__, "commit": _commit(), "python": platform.python_version()}
    for package in ("torch", "transformers", "accelerate", "datasets", "tokenizers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def machine() -> dict[str, Any]:
    """Processor, cores, threads, GPU and system."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "os": f"{platform.system()} {platform.machine()}",
    }


def keep_freed_memory() -> None:
    """Have the C library keep what one step frees for the next, for a process that does nothing but train.

    By default glibc hands it back to the system, which clears and maps it anew at every step: up to a
    third of a connection's time on a CPU. Elsewhere there is nothing to ask.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((-1, 2**31 - 1), (-2, 64 << 20), (-3, 32 << 20)):  # trim, top pad, mmap thresholds
            mallopt(option, value)


def give_back_memory() -> None:
    """Hand what is free back to the system, also after :func:`keep_freed_memory`."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


class PeakMemory:
    """Peak memory from now on: of the GPU where there is one, else of this process."""

    def __init__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            give_back_memory()  # else the mark would start at what earlier runs of this process had needed
            with contextlib.suppress(OSError):  # Linux starts the high-water mark afresh; elsewhere it is the process's
                Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> int:
        """Bytes."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status")
        if status.exists():
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
            return int(lines["VmHWM"].split()[0]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    here = Path(__file__)
    try:
        tracked = subprocess.run(
            ["git", "ls-files", "--error-unmatch", here.name], cwd=here.parent, capture_output=True
        )
        if tracked.returncode:  # installed, perhaps inside somebody else's checkout
            return None
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here.parent, capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None
