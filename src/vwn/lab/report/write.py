"""A comparison written down: `report.json`, `curves.csv`, `report.html`, `figures/`, and a table for the terminal."""

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

from vwn.lab.analysis import wording
from vwn.lab.analysis.analyse import add_analysis
from vwn.lab.report.draw_files import draw_files
from vwn.lab.report.figures import NAMES, Figure
from vwn.lab.report.figures_arms import FIGURES_OVER_ARMS, sweep_figure
from vwn.lab.report.figures_training import training_figures
from vwn.lab.report.page import is_measured, render_page
from vwn.lab.report.verdicts import verdicts

CSV_COLUMNS = ("arm", "m", "n", "r", "seed", "tokens", "seconds", "loss", "loss_2")
TERMINAL_WIDTH = 100
# Outside Latin-1, which is all that some terminals print.
TERMINAL_CHARACTERS = str.maketrans({"–": "-", "≤": "<=", "×": "x", "’": "'", "\u00a0": " "})


def write_report(report: dict[str, Any], directory: Path, images: bool = True) -> None:
    """Analyse `report` (see `add_analysis`); write report.json, curves.csv, report.html and, with `images`, figures/.

    `directory` is made if needed. Each file appears whole or not at all, replacing an earlier one; a figure of an
    earlier report that this one does not have is removed. The JSON is strict: a number that is not finite is null.
    """
    clean = _finite_or_none(report)
    analysed = add_analysis(clean)
    figures = report_figures(analysed)
    directory.mkdir(parents=True, exist_ok=True)
    _write_whole(directory / "report.json", json.dumps(analysed, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
    _write_whole(directory / "curves.csv", curves_csv(clean))
    _write_whole(directory / "report.html", render_page(analysed, figures))
    if images:
        _write_images(figures, directory / "figures")


def _write_images(figures: list[Figure], folder: Path) -> None:
    drawn = draw_files(figures)
    folder.mkdir(exist_ok=True)
    for name, content in drawn.items():
        _write_whole(folder / name, content)
    for name in {f"{name}.{form}" for name in NAMES for form in ("png", "svg")} - drawn.keys():
        (folder / name).unlink(missing_ok=True)


def report_figures(report: dict[str, Any]) -> list[Figure]:
    """The figures that the data of an analysed report has, in the page's order."""
    found: list[Figure | None] = []
    for key in wording.LOSS_NAMES:
        if is_measured(report, key):
            found += training_figures(report, key)
            found += [make(report, key) for make in FIGURES_OVER_ARMS]
    found.append(sweep_figure(report))
    return [figure for figure in found if figure is not None and not figure.is_empty]


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
    """One table per measured loss, the headline and the verdicts as plain text, at most 100 columns wide.

    Without a final newline. A name that leaves no room for its numbers stands on a line of its own.
    """
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
    blocks += [_wrapped(note), _wrapped(_printable(wording.headline(analysed)))]
    found = [_wrapped(_printable(f"{v.title}: {v.word}. {v.text}"), hanging="  ") for v in verdicts(analysed)]
    if found:
        blocks.append("\n".join(["verdicts", *found]))
    return "\n\n".join(blocks).translate(TERMINAL_CHARACTERS)


def _wrapped(text: str, hanging: str = "") -> str:
    return textwrap.fill(text, TERMINAL_WIDTH, subsequent_indent=hanging, break_on_hyphens=False)


def _cells(arm: dict[str, Any], key: str) -> list[str]:
    loss, rate = arm[key], arm["learning_rate"]
    difference = "baseline" if arm["is_baseline"] else wording.estimate(loss["difference"], signed=True)
    cells = [
        _printable(arm["name"]),
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
    widths = [max(map(len, column)) for column in zip(*(row[1:] for row in rows), strict=True)]
    room = TERMINAL_WIDTH - sum(width + 2 for width in widths)
    name_width = max((len(row[0]) for row in rows if len(row[0]) <= room), default=0)
    lines = []
    for name, *cells in rows:
        numbers = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        if len(name) > room:
            lines.append(name if len(name) <= TERMINAL_WIDTH else f"{name[: TERMINAL_WIDTH - 2]}..")
            name = ""
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


def _write_whole(path: Path, content: str | bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
