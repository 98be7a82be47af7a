"""Provenance of a result: command, versions, commit, machine."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def provenance() -> dict[str, Any]:
    """Return command, time, versions, commit and machine, for a run's directory and every report."""
    program = Path(sys.argv[0]).name
    program = "vwn" if program == "__main__.py" else program  # python -m vwn
    return {
        "command": shlex.join([program, *sys.argv[1:]]),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": machine(),
    }


def versions() -> dict[str, str | None]:
    """Return the versions that decide a run's numbers, and the commit if run from a checkout."""
    import vwn

    found: dict[str, str | None] = {"vwn": vwn.__version__, "commit": _commit(), "python": platform.python_version()}
    for package in ("torch", "transformers", "accelerate", "datasets", "tokenizers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def machine() -> dict[str, Any]:
    """Return processor, cores, threads, GPU and system."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "os": f"{platform.system()} {platform.machine()}",
    }


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
