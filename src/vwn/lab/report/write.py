"""A comparison written down: `report.json`, `curves.csv`, `report.html`, `figures/`, and text for the terminal."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from vwn.lab.analysis import story, wording
from vwn.lab.analysis.analyse import add_analysis
from vwn.lab.analysis.budgets import budget_studies
from vwn.lab.analysis.verdicts import verdicts
from vwn.lab.report import tables
from vwn.lab.report.draw import draw
from vwn.lab.report.figures import NAMES, Figure
from vwn.lab.report.figures_arms import FIGURES_OVER_ARMS, sweep_figure
from vwn.lab.report.figures_gain import budget_figure, seeds_figure
from vwn.lab.report.figures_training import fewer_tokens_figure, training_figures
from vwn.lab.report.page import first_lines, is_measured, render_page

CSV_COLUMNS = ("arm", "m", "n", "r", "seed", "tokens", "seconds", "loss", "loss_2")
TERMINAL_WIDTH = 100
BAR, LABEL = 50, 20
# Outside Latin-1, which is all that some terminals print.
TERMINAL_CHARACTERS = str.maketrans(
    {"–": "-", "−": "-", "≤": "<=", "≥": ">=", "×": "x", "’": "'", "\u00a0": " ", "β": "beta"}
)
# What stands between these lines of a README is made from report.json.
README_TABLES = re.compile(r"(<!-- made by vwn report -->\n).*?(\n<!-- end -->)", re.DOTALL)


def write_report(report: dict[str, Any], directory: Path) -> None:
    """Analyse `report` (see `add_analysis`); write report.json, curves.csv, report.html and figures/*.svg.

    `directory` is made if needed. Each file appears whole or not at all, replacing an earlier one; a figure of an
    earlier report that this one does not have is removed. The JSON is strict: a number that is not finite is null.
    """
    clean = _finite_or_none(report)
    analysed = add_analysis(clean)
    drawn = {figure.identifier: (figure, draw(figure)) for figure in report_figures(analysed)}
    folder = directory / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    _write_whole(directory / "report.json", json.dumps(analysed, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
    _write_whole(directory / "curves.csv", curves_csv(clean))
    _write_whole(directory / "report.html", render_page(analysed, drawn))
    for name, (_, svg) in drawn.items():
        _write_whole(folder / f"{name}.svg", svg)
    for name in {f"{name}{part}.svg" for name in NAMES for part in ("", "-2")} - {f"{name}.svg" for name in drawn}:
        (folder / name).unlink(missing_ok=True)


def renew(directory: Path) -> None:
    """Make everything in `directory` again from its report.json, and the tables that its README.md marks."""
    report = json.loads((directory / "report.json").read_text(encoding="utf-8"))
    write_report(report, directory)
    readme = directory / "README.md"
    if readme.exists():
        text = readme.read_text(encoding="utf-8")
        made = readme_tables(add_analysis(report))
        _write_whole(readme, README_TABLES.sub(lambda match: f"{match[1]}{made}{match[2]}", text))


def readme_tables(report: dict[str, Any]) -> str:
    """The results of an analysed report as Markdown tables."""
    shown = [tables.result_table(report, key) for key in wording.LOSS_NAMES if is_measured(report, key)]
    studies = budget_studies(report)
    if studies:
        shown += [tables.budget_table(report, studies, key) for key in studies]
    else:
        shown += [tables.equal_cost_table(report, key) for key in wording.LOSS_NAMES if is_measured(report, key)]
    shown.append(tables.cost_table(report))
    return "\n\n".join(f"{table.name}:\n\n{tables.markdown(table)}" for table in shown)


def report_figures(report: dict[str, Any]) -> list[Figure]:
    """The figures that the data of an analysed report has, in the page's order."""
    studies = budget_studies(report)
    found: list[Figure | None] = [budget_figure(report, studies, key) for key in wording.LOSS_NAMES]
    found += [fewer_tokens_figure(report), seeds_figure(report)]
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
    """One table per measured loss, the verdicts, and last a sentence and a picture of what was gained.

    Plain text of at most 100 columns, without a final newline. A name that leaves no room for its numbers stands on a
    line of its own.
    """
    analysed = add_analysis(report)
    baseline = _printable(str(analysed.get("baseline")))
    blocks = []
    for key, name in wording.LOSS_NAMES.items():
        arms = [arm for arm in analysed["summary"] if arm[key] is not None]
        if arms:
            rows = [_cells(arm, key) for arm in arms]
            heads = ["arm", "r", "params", "lr", "final loss", f"minus {baseline}", "tokens"]
            lines = _aligned([heads if key == "loss" else _short(heads), *rows])
            blocks.append("\n".join([f"{name}, nats per token", *lines]))
    found = [f"{verdict.title}: {verdict.word}" for verdict in verdicts(analysed) if verdict.word]
    if found:
        blocks.append("\n".join(["verdicts (numbers in report.html)", *found]))
    sentences = first_lines(analysed, budget_studies(analysed))
    blocks += [_wrapped(_printable(sentence)) for sentence in sentences]
    blocks += [bars] if (bars := _bars(analysed)) else []
    return "\n\n".join(blocks).translate(TERMINAL_CHARACTERS)


def _bars(report: dict[str, Any]) -> str:
    """The tokens that the best arm needs to the baseline's final loss, as bars; empty without one, and with budgets."""
    lead = story.lead_arm(report)
    shares = {} if lead is None else {name: lead[key] for key, name in wording.LOSS_NAMES.items() if lead[key]}
    shares = {name: loss["tokens_fraction"]["mean"] for name, loss in shares.items()}
    if lead is None or report["budgets"] or not any(shares.values()):
        return ""
    baseline = _printable(str(report.get("baseline")))
    rows = [(baseline[:LABEL], 1.0), *shares.items()]
    width = max(len(name) for name, _ in rows)
    lines = []
    for name, share in rows:
        filled = "" if share is None else "#" * min(BAR, round(BAR * share))
        lines.append(f"{name.ljust(width)}  {filled} {'not reached' if share is None else f'{100 * share:.0f} %'}")
    title = f"tokens that {_printable(lead['name'])} needs for {baseline}'s final loss"
    return "\n".join([_wrapped(title), *lines])


def _wrapped(text: str) -> str:
    return textwrap.fill(text, TERMINAL_WIDTH, break_on_hyphens=False)


def _cells(arm: dict[str, Any], key: str) -> list[str]:
    loss, rate = arm[key], arm["learning_rate"]
    difference = "baseline" if arm["is_baseline"] else wording.estimate(loss["difference"], signed=True)
    cells = [
        _printable(arm["name"]),
        f"{arm['r']:.4g}",
        wording.scaled(arm["params"]),
        wording.NOTHING if rate is None else f"{rate:.3g}",
        wording.estimate(loss["final"]),
        difference,
        wording.tokens_needed(loss),
    ]
    return cells if key == "loss" else _short(cells)


def _short(cells: list[str]) -> list[str]:
    """Without what the next-token table already says about the arm."""
    return [cells[0], *cells[4:]]


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
