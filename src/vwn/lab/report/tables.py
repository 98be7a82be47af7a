"""The tables of a report, as cells for the page and for the README of its results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vwn.lab.analysis import wording
from vwn.lab.analysis.budgets import COSTS, BudgetStudy, Measured
from vwn.lab.analysis.story import baseline_summary
from vwn.lab.analysis.wording import LOSS_NAMES, NOTHING, PERCENT, VERDICT_WORDS, interval
from vwn.lab.report.draw import arm_styles

CONNECTION_NAMES = {"residual": "residual", "ghc": "GHC", "hc": "HC", "mhc": "mHC"}


@dataclass(frozen=True)
class Cell:
    """One cell: its text, notes in small print, and an arm's colour."""

    text: str
    notes: tuple[str, ...] = ()
    colour: str = ""


@dataclass(frozen=True)
class Table:
    """Column titles, and rows whose first cell names the row."""

    name: str
    heads: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def result_table(report: dict[str, Any], key: str) -> Table:
    """Return one row per arm: final loss, paired difference and tokens needed, in the loss `key`."""
    rows = []
    for arm in report["summary"]:
        if arm[key] is not None:
            difference = Cell("baseline") if arm["is_baseline"] else _difference(arm[key])
            final, needed = Cell(wording.estimate(arm[key]["final"])), Cell(wording.tokens_needed(arm[key]))
            rows.append((_arm(report, arm["name"]), final, difference, needed))
    heads = ("Arm", "Final loss", f"Minus {report.get('baseline')}", "Tokens needed")
    return Table(f"Results in {LOSS_NAMES[key]}", heads, tuple(rows))


def budget_table(report: dict[str, Any], studies: dict[str, BudgetStudy], key: str) -> Table:
    """Return one row per arm and budget: gap, the baseline's slope, and difference and speed-up at equal cost."""
    study, rows = studies[key], []
    slopes = {row.tokens: row.slope for row in study.baseline}
    for name, points in study.arms.items():
        for point in points:
            gap, *gaps = (_measured(point.equal[cost].gap, point.equal[cost].reason, "+.4f") for cost in COSTS)
            speedups = (_measured(point.equal[cost].speedup, point.equal[cost].reason, ".2f", "×") for cost in COSTS)
            slope = Cell(wording.fixed(slopes[point.tokens], ".3f"))
            seeds = Cell(str(point.equal["tokens"].gap.over_seeds.n))
            factor = study.tokens_factors[name].get(point.tokens)
            fewer = Cell(NOTHING) if factor is None else _measured(factor, None, ".2f", "×")
            if factor is not None and str(factor.over_seeds.n) != seeds.text:
                fewer = Cell(fewer.text, (*fewer.notes, wording.seeds_text(factor.over_seeds.n)))
            head = (_arm(report, name), Cell(wording.budget(point.tokens)), seeds, gap, slope, fewer)
            rows.append((*head, *speedups, *gaps))
    heads = (
        "Arm",
        "Budget",
        "Seeds",
        "Gap at equal tokens",
        f"Slope of {report.get('baseline')}",
        f"Fewer tokens to {report.get('baseline')}’s loss",
        "Speed-up in tokens",
    )
    more = ("in FLOPs", "in seconds", "Gap at equal FLOPs", "at equal seconds")
    return Table(f"Decayed losses, {LOSS_NAMES[key]}", (*heads, *more), tuple(rows))


def budget_width_table(studies: dict[str, BudgetStudy], key: str) -> Table:
    """Return one row per budget: the log-linear fit of the decayed loss in r."""
    rows = []
    for fit in studies[key].widths:
        slope = interval(fit["slope"], "+.4f") if fit["slope"] else str(fit["reason"])
        words = (wording.budget(fit["tokens"]), slope, wording.fixed(fit["r2"], ".3f"), str(len(fit["seeds"])))
        rows.append(tuple(map(Cell, words)))
    heads = ("Budget", "Nats per doubling of r", "R²", "Seeds")
    return Table(f"Log-linear fit in r, {LOSS_NAMES[key]}", heads, tuple(rows))


def cost_table(report: dict[str, Any]) -> Table:
    """Return one row per arm: geometry, size, compute, speed, memory and learning rate, with factors over the baseline.

    Embedding form and MTP depth have a column only where arms differ in them. The speed is the median step, in older
    results tokens per second.
    """
    summary, baseline = report["summary"], baseline_summary(report)
    options = {
        field: title
        for field, title in (("embedding", "Embedding"), ("mtp", "MTP"))
        if len({arm[field] for arm in summary}) > 1
    }
    stepped = all(arm["step_seconds_median"] is not None for arm in summary)
    pace = "step_seconds_median" if stepped else "tokens_per_second"
    rows = []
    for arm in summary:

        def factor(field: str, arm: dict[str, Any] = arm) -> tuple[str, ...]:
            found = "" if baseline is None or arm["is_baseline"] else wording.ratio(arm[field], baseline[field])
            return (found,) if found else ()

        connection = CONNECTION_NAMES.get(arm["connection"], arm["connection"])
        words = [connection, *(f"{arm[field]:.4g}" for field in ("m", "n", "r")), *(arm[field] for field in options)]
        speed = f"{1000 * arm[pace]:.3g} ms" if stepped else wording.scaled(arm[pace])
        rate = NOTHING if arm["learning_rate"] is None else f"{arm['learning_rate']:.3g}"
        rows.append(
            (
                _arm(report, arm["name"]),
                *(Cell(NOTHING if word is None else str(word)) for word in words),
                *(Cell(wording.scaled(arm[field]), factor(field)) for field in ("params", "flops_per_token")),
                Cell(speed, (*factor(pace), *(("uneven",) if arm["uneven"] else ()))),
                Cell(wording.mebibytes(arm["peak_memory_bytes"]), factor("peak_memory_bytes")),
                Cell(rate),
            )
        )
    heads = ("Arm", "Connection", "m", "n", "r", *options.values(), "Parameters", "FLOPs per token")
    more = ("Median step" if stepped else "Tokens per second", "Peak memory", "Learning rate")
    return Table("Arms and their cost", (*heads, *more), tuple(rows))


def sweep_table(report: dict[str, Any]) -> Table:
    """Return one row per swept arm: the chosen rate, whether it is bracketed by worse ones, and all rates tried."""
    rows = []
    for entry in report["sweep"]:
        if not entry["rates"] or entry["arm"] not in arm_styles(report):
            continue
        tried = tuple(
            f"{r['learning_rate']:.3g}: {'diverged' if r['loss'] is None else format(r['loss'], '.4f')}"
            for r in entry["rates"]
        )
        bracketed = Cell("yes" if entry["bracketed"] else "no, at the edge")
        rows.append((_arm(report, entry["arm"]), Cell(f"{entry['best']:.3g}"), bracketed, Cell("", tried)))
    heads = ("Arm", "Chosen rate", "Bracketed", "Criterion at each rate tried")
    return Table("Learning-rate sweep", heads, tuple(rows))


def pairwise_table(report: dict[str, Any], key: str) -> Table:
    """Return every arm against every other: the row's final loss minus the column's, paired by seed."""
    found = report["pairwise"][key]
    rows = [
        (_arm(report, name), *(Cell(NOTHING) if other == name else _difference(found[name][other]) for other in found))
        for name in found
    ]
    return Table(f"Row minus column, final {LOSS_NAMES[key]}", ("Arm", *found), tuple(rows))


def equal_cost_table(report: dict[str, Any], key: str) -> Table:
    """Return one row per arm but the baseline: the difference at equal tokens, training FLOPs and training time."""
    rows = []
    for arm in report["summary"]:
        if arm[key] is not None and not arm["is_baseline"]:
            equal = (_equal(arm[key][f"equal_{cost}"], arm["name"], report.get("baseline")) for cost in COSTS[1:])
            rows.append((_arm(report, arm["name"]), _difference(arm[key]), *equal))
    heads = ("Arm", "Equal tokens", "Equal training FLOPs", "Equal training time")
    return Table(f"At equal cost, {LOSS_NAMES[key]}", heads, tuple(rows))


def markdown(table: Table) -> str:
    """Return the table for a README."""
    lines = [" | ".join(table.heads), " | ".join("---" for _ in table.heads)]
    for row in table.rows:
        texts = [f"{cell.text} ({', '.join(cell.notes)})" if cell.notes else cell.text for cell in row]
        lines.append(" | ".join(text.replace("|", "\\|") for text in texts))
    return "\n".join(f"| {line} |" for line in lines)


def settings(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """List nested settings as `outer.inner` names with their values in words."""
    found: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict):
            found += settings(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            found.append((name, ", ".join(map(str, value)) or NOTHING))
        else:
            found.append((name, "none" if value is None else str(value)))
    return found


def _arm(report: dict[str, Any], name: str) -> Cell:
    return Cell(name, colour=f"var(--{arm_styles(report)[name].colour})")


def _difference(found: dict[str, Any]) -> Cell:
    reason = found["reason"] if found["verdict"] == "unknown" else None
    return Cell(wording.estimate(found["difference"], signed=True), (reason or VERDICT_WORDS[found["verdict"]],))


def _equal(found: dict[str, Any], arm: str, baseline: str | None) -> Cell:
    if found["difference"]["mean"] is None:
        return Cell(NOTHING, () if found["status"] == "compared" else (found["status"],))
    shares = [(baseline, found["baseline_share"]), (arm, found["arm_share"])]
    early = [
        f"{name} read at {100 * share:.0f}{PERCENT}" for name, share in shares if share is not None and share < 0.995
    ]
    return Cell(wording.estimate(found["difference"], signed=True), (VERDICT_WORDS[found["verdict"]], *early))


def _measured(found: Measured, reason: str | None, form: str, unit: str = "") -> Cell:
    bound = () if found.at_least is None else (f"≥ {found.at_least:{form}}{unit}",)
    if found.over_seeds.mean is None:
        return Cell(*bound) if bound else Cell(NOTHING, (reason,) if reason else ())
    return Cell(found.text(form, unit), ("extrapolated", *bound) if found.extrapolated else ())
