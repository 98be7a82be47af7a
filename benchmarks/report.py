"""What every benchmark shares: options, where and with what it was run, a table on the terminal, a JSON file."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from vwn.common.provenance import provenance

FOLDER = Path(__file__).parent
NOT_MEASURED = "not measured"
SHOWN_VARIABLES = ("TRITON_INTERPRET", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF")


def parser(name: str, text: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    p = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=(text or "").split("\n")[0])
    p.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs; the times mean nothing")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--backend", default="auto", help="of our ops: auto, reference, compiled or triton")
    p.add_argument("--shapes", type=shapes, help="connections to measure, such as 2x3,4x16")
    p.add_argument("--commit", help="to record where there is no checkout to ask")
    p.add_argument("--out", type=Path, help=f"JSON file; by default {FOLDER.name}/results/{name}-DEVICE.json")
    p.set_defaults(name=name)
    return p


def shapes(text: str) -> list[tuple[int, int]]:
    """``"2x3,4x16"`` to ``[(2, 3), (4, 16)]``."""
    pairs = [tuple(int(size) for size in pair.split("x")) for pair in text.split(",")]
    return [(m, n) for m, n in pairs]


class Report:
    """Rows of a benchmark: shown as they come, and written to the JSON file each time, so that none is lost.

    Args:
        options: as parsed.
        notes: what was measured and how, by name.
        columns: of the table: the row's key and its format, such as ``{"median_ms": "10.3f"}``.
    """

    def __init__(self, options: argparse.Namespace, notes: Mapping[str, str], columns: Mapping[str, str]) -> None:
        if options.device == "cuda" and not torch.cuda.is_available():
            raise SystemExit("there is no GPU that PyTorch can use; run with --device cpu")
        suffix = "-quick" if options.quick else ""
        self._path = options.out or FOLDER / "results" / f"{options.name}-{options.device}{suffix}.json"
        self._columns = {key: (int("".join(filter(str.isdigit, f.split(".")[0]))), f) for key, f in columns.items()}
        self.rows: list[dict[str, Any]] = []
        self._content = {
            "benchmark": options.name,
            "quick": options.quick,
            "device": options.device,
            **_origin(options),
            "notes": dict(notes),
            "rows": self.rows,
        }
        machine, versions = self._content["machine"], self._content["versions"]
        print(self._content["command"])
        print(", ".join(f"{k} {v}" for k, v in (machine | versions).items() if v is not None))
        for name, note in notes.items():
            print(f"{name}: {note}")
        print("\n" + "  ".join(f"{key.replace('_', ' '):>{width}}" for key, (width, _) in self._columns.items()))

    def add(self, row: Mapping[str, Any]) -> None:
        """Show a row and write it. A row with the key ``"not measured"`` says why."""
        self.rows.append(dict(row))
        cells = [self._cell(row, key) for key in self._columns]
        print("  ".join(cells) + (f"  {NOT_MEASURED}: {row[NOT_MEASURED]}" if NOT_MEASURED in row else ""), flush=True)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self._content, indent=1, ensure_ascii=False) + "\n")

    def extend(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """:meth:`add` each."""
        for row in rows:
            self.add(row)

    def done(self) -> None:
        """Say where the file is."""
        print(f"\nwritten to {self._path}")

    def _cell(self, row: Mapping[str, Any], key: str) -> str:
        width, form = self._columns[key]
        value = row.get(key)
        if value is None:
            return f"{'-':>{width}}"
        text = f"{value[0]}x{value[1]}" if isinstance(value, (list, tuple)) else format(value, form)
        return f"{text:>{width}}"


def _origin(options: argparse.Namespace) -> dict[str, Any]:
    """Command, date, versions, commit and machine; results that were written before do not make the tree dirty."""
    found = provenance()
    versions = found.pop("versions")
    versions.pop("commit")
    for package in ("triton", "hyper-connections", "liger-kernel"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    variables = [f"{name}={os.environ[name]}" for name in SHOWN_VARIABLES if name in os.environ]
    command = [*variables, "python", "-m", f"benchmarks.{options.name}", *sys.argv[1:]]
    changes = _git("status", "--porcelain", "--", ":/", f":(exclude){FOLDER / 'results'}")
    return {
        "command": shlex.join(command),
        "date": found.pop("created"),
        "commit": options.commit or _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "versions": versions,
        "machine": found["machine"] | {"interpreted": os.environ.get("TRITON_INTERPRET") == "1"},
    }


def _git(*command: str) -> str | None:
    try:
        found = subprocess.run(["git", *command], cwd=FOLDER, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return None if found.returncode else found.stdout.strip()
