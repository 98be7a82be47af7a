"""A comparison written down: `report.json`, `curves.csv`, `report.html`, `figures/`, and text for the terminal."""

from __future__ import annotations

import csv
import io
import re
import textwrap
from pathlib import Path
from typing import Any

from vwn.common.files import finite, write_json, write_text
from vwn.lab.analysis import story, wording
from vwn.lab.analysis.analyse import add_analysis
from vwn.lab.analysis.budgets import budget_studies
from vwn.lab.analysis.runs import measured_losses
from vwn.lab.report import tables
from vwn.lab.report.charts import NAMES, report_figures
from vwn.lab.report.page import render_page

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
    clean = finite(report)
    analysed = add_analysis(clean)
    drawn = {figure.identifier: figure for figure in report_figures(analysed)}
    folder = directory / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(directory / "report.json", analysed)
    write_text(directory / "curves.csv", curves_csv(clean))
    write_text(directory / "report.html", render_page(analysed, drawn))
    for name, figure in drawn.items():
        write_text(folder / f"{name}.svg", figure.svg)
    for name in {f"{name}{part}" for name in NAMES for part in ("", "-2")} - drawn.keys():
        (folder / f"{name}.svg").unlink(missing_ok=True)


def renew(report: dict[str, Any], directory: Path) -> None:
    """Write `report` into `directory`, and the tables that its README.md marks."""
    write_report(report, directory)
    readme = directory / "README.md"
    if readme.exists():
        text = readme.read_text(encoding="utf-8")
        made = readme_tables(add_analysis(report))
        write_text(readme, README_TABLES.sub(lambda match: f"{match[1]}{made}{match[2]}", text))


def readme_tables(report: dict[str, Any]) -> str:
    """Return the results of an analysed report as Markdown tables."""
    measured = measured_losses(report)
    studies = budget_studies(report)
    shown = [tables.result_table(report, key) for key in measured]
    shown += [tables.budget_table(report, studies, key) for key in studies if len(studies[key].baseline) > 1]
    shown += [tables.equal_cost_table(report, key) for key in measured if not studies]
    shown.append(tables.cost_table(report))
    return "\n\n".join(f"{table.name}:\n\n{tables.markdown(table)}" for table in shown)


def curves_csv(report: dict[str, Any]) -> str:
    """Return every validation point as one CSV line under `CSV_COLUMNS`; a missing loss is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for run in report["arms"]:
        arm = [run["name"], run["m"], run["n"], run["r"], run["seed"]]
        writer.writerows([*arm, *(point.get(column) for column in CSV_COLUMNS[5:])] for point in run["curve"])
    return text.getvalue()


def format_table(report: dict[str, Any]) -> str:
    """Return one table per measured loss, and last a sentence and a picture of what was gained.

    Plain text of at most 100 columns, without a final newline.
    """
    analysed = add_analysis(report)
    baseline = wording.printable(str(analysed.get("baseline")))
    blocks = []
    for key, name in wording.LOSS_NAMES.items():
        arms = [arm for arm in analysed["summary"] if arm[key] is not None]
        if arms:
            lines = _aligned(["arm", "final loss", f"minus {baseline}", "tokens"], [_cells(arm, key) for arm in arms])
            blocks.append("\n".join([f"{name}, nats per token", *lines]))
    sentences = story.first_lines(analysed, budget_studies(analysed))
    blocks += [_wrapped(wording.printable(sentence)) for sentence in sentences]
    blocks += [bars] if (bars := _bars(analysed)) else []
    return "\n\n".join(blocks).translate(TERMINAL_CHARACTERS)


def _bars(report: dict[str, Any]) -> str:
    """Draw the tokens that the best arm needs to the baseline's final loss; empty without one, and with budgets."""
    lead = story.lead_arm(report)
    shares = {} if lead is None else {name: lead[key] for key, name in wording.LOSS_NAMES.items() if lead[key]}
    shares = {name: loss["tokens_fraction"]["mean"] for name, loss in shares.items()}
    if lead is None or report["budgets"] or not any(shares.values()):
        return ""
    baseline = wording.printable(str(report.get("baseline")))
    rows = [(baseline[:LABEL], 1.0), *shares.items()]
    width = max(len(name) for name, _ in rows)
    lines = []
    for name, share in rows:
        filled = "" if share is None else "#" * min(BAR, round(BAR * share))
        lines.append(f"{name.ljust(width)}  {filled} {'not reached' if share is None else f'{100 * share:.0f} %'}")
    title = f"tokens that {wording.printable(lead['name'])} needs for {baseline}'s final loss"
    return "\n".join([_wrapped(title), *lines])


def _wrapped(text: str) -> str:
    return textwrap.fill(text, TERMINAL_WIDTH, break_on_hyphens=False)


def _cells(arm: dict[str, Any], key: str) -> list[str]:
    loss = arm[key]
    difference = "baseline" if arm["is_baseline"] else wording.estimate(loss["difference"], signed=True)
    return [wording.printable(arm["name"]), wording.estimate(loss["final"]), difference, wording.tokens_needed(loss)]


def _aligned(heads: list[str], rows: list[list[str]]) -> list[str]:
    """Return lines with the first column to the left and cut to the terminal, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*(row[1:] for row in (heads, *rows)), strict=True)]
    room = TERMINAL_WIDTH - sum(width + 2 for width in widths)
    room = min(room, max(len(row[0]) for row in (heads, *rows)))
    lines = []
    for name, *cells in (heads, *rows):
        shown = name if len(name) <= room else f"{name[: room - 2]}.."
        numbers = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        lines.append("  ".join([shown.ljust(room), *numbers]))
    return lines
