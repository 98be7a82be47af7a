"""A comparison written down: `report.json`, `curves.csv`, `report.html`, and a table for the terminal."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from vwn.compare import wording
from vwn.compare.analysis import add_analysis
from vwn.compare.page import render_page

CSV_COLUMNS = ("arm", "m", "n", "r", "seed", "tokens", "seconds", "loss", "loss_2")
TERMINAL_WIDTH = 100
NAME_WIDTH = 16
# Outside Latin-1, which is all that some terminals print.
TERMINAL_CHARACTERS = str.maketrans({"–": "-", "≤": "<=", "×": "x", "’": "'", "\u00a0": " "})


def write_report(report: dict[str, Any], directory: Path) -> None:
    """Analyse `report` (see `add_analysis`) and write report.json, curves.csv and report.html into `directory`.

    The directory is made if needed. Each file appears whole or not at all, replacing an earlier one. The JSON is
    strict: a number that is not finite is null.
    """
    clean = _finite_or_none(report)
    analysed = add_analysis(clean)
    directory.mkdir(parents=True, exist_ok=True)
    _write_whole(directory / "report.json", json.dumps(analysed, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
    _write_whole(directory / "curves.csv", curves_csv(clean))
    _write_whole(directory / "report.html", render_page(analysed))


def curves_csv(report: dict[str, Any]) -> str:
    """Every validation point as one CSV line under `CSV_COLUMNS`; a missing or not finite loss is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for run in _finite_or_none(report)["arms"]:
        arm = [run["name"], run["m"], run["n"], run["r"], run["seed"]]
        writer.writerows([*arm, *(point.get(column) for column in CSV_COLUMNS[5:])] for point in run["curve"])
    return text.getvalue()


def format_table(report: dict[str, Any]) -> str:
    """Headline and one table per measured loss as plain text, at most 100 columns wide, without a final newline."""
    analysed = add_analysis(report)
    baseline = _printable(str(analysed.get("baseline")))
    blocks = []
    for key, name in wording.LOSS_NAMES.items():
        arms = [arm for arm in analysed["summary"] if arm[key] is not None]
        if arms:
            rows = [_cells(arm, key) for arm in arms]
            heads = ["arm", "r", "params", "lr", "tokens/s", "final loss", "vs baseline", "tokens"]
            lines = _aligned([heads if key == "loss" else _short(heads), *rows])
            blocks.append("\n".join([f"{name}, nats per token", *lines]))
    note = (
        f"Mean ± standard deviation over seeds; vs baseline: paired by seed, against {baseline}; tokens: share of "
        f"{baseline}'s tokens after which the loss stays at or below {baseline}'s final loss."
    )
    paragraphs = [note, _printable(wording.headline(analysed))]
    wrapped = [textwrap.fill(text, TERMINAL_WIDTH, break_on_hyphens=False) for text in paragraphs]
    return "\n\n".join([*blocks, *wrapped]).translate(TERMINAL_CHARACTERS)


def _cells(arm: dict[str, Any], key: str) -> list[str]:
    loss, rate, name = arm[key], arm["learning_rate"], _printable(arm["name"])
    difference = "baseline" if arm["is_baseline"] else wording.estimate(loss["difference"], signed=True)
    cells = [
        name if len(name) <= NAME_WIDTH else f"{name[: NAME_WIDTH - 2]}..",
        f"{arm['r']:.4g}",
        wording.scaled(arm["params"]),
        wording.NOTHING if rate is None else f"{rate:.3g}",
        wording.scaled(arm["tokens_per_second"]),
        wording.estimate(loss["final"]),
        difference,
        wording.tokens_needed(loss),
    ]
    return cells if key == "loss" else _short(cells)


def _short(cells: list[str]) -> list[str]:
    """Without what the next-token table already says about the arm."""
    return [cells[0], *cells[5:]]


def _aligned(rows: list[list[str]]) -> list[str]:
    """Lines with the first column to the left, the others to the right."""
    name_width, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        numbers = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        lines.append("  ".join([name.ljust(name_width), *numbers]))
    return lines


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() or character == "\u00a0" else "?" for character in text)


def _finite_or_none(value: Any) -> Any:
    """A copy made of JSON's own types, with numbers that are not finite as None."""
    if isinstance(value, dict):
        return {str(key): _finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_or_none(item) for item in value]
    if isinstance(value, np.generic):
        return _finite_or_none(value.item())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
