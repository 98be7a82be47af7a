"""The tables of a report, as cells for the page and the README of its results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vwn.lab.analysis import wording
from vwn.lab.analysis.budgets import COSTS, BudgetPoint, BudgetStudy
from vwn.lab.analysis.runs import judged_points
from vwn.lab.analysis.story import baseline_summary
from vwn.lab.analysis.wording import LOSS_NAMES, NOTHING, PERCENT, PLUS_MINUS, VERDICT_WORDS, interval
from vwn.lab.report.figures import arm_styles

CONNECTION_NAMES = {"residual": "residual", "ghc": "GHC", "hc": "HC", "mhc": "mHC"}


@dataclass(frozen=True)
class Cell:
    """One cell: its text, a spread that a narrow page sets below it, notes in small print, and an arm's colour."""

    text: str
    spread: str = ""
    notes: tuple[str, ...] = ()
    colour: str = ""


@dataclass(frozen=True)
class Table:
    """Column titles, and rows whose first cell names the row."""

    name: str
    heads: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def cells(words: tuple[str, ...]) -> tuple[Cell, ...]:
    """Plain cells."""
    return tuple(map(Cell, words))


def result_table(report: dict[str, Any], key: str) -> Table:
    """One row per arm: final loss, paired difference and tokens needed, in the loss `key`."""
    baseline = report.get("baseline")
    rows = [
        (_arm(report, arm["name"]), _number(wording.estimate(arm[key]["final"])), *_against(arm[key]))
        for arm in report["summary"]
        if arm[key] is not None
    ]
    return Table(
        f"Results in {LOSS_NAMES[key]}", ("Arm", "Final loss", f"Minus {baseline}", "Tokens needed"), tuple(rows)
    )


def run_table(report: dict[str, Any], key: str) -> Table:
    """One row per arm and seed, in the loss `key`."""
    baseline = report.get("baseline")
    heads = ("Arm", "Seed", "Final loss", f"Minus {baseline}", "Tokens needed", "Share", "Seconds")
    rows = [
        (_arm(report, run["name"]), *map(_number, _run_cells(run, run["paired"][key], baseline)))
        for run in report["arms"]
        if run["paired"][key] is not None
    ]
    return Table(f"Every run, {LOSS_NAMES[key]}", heads, tuple(rows))


def budget_table(report: dict[str, Any], studies: dict[str, BudgetStudy], key: str) -> Table:
    """One row per arm and budget: gap, the baseline's slope, and difference and speed-up at equal cost."""
    study, rows = studies[key], []
    slopes = {row.tokens: row.slope for row in study.baseline}
    for name, points in study.arms.items():
        for point in points:
            slope = wording.fixed(slopes[point.tokens], ".3f")
            speedups = (_budget_speedup(point, cost) for cost in COSTS)
            about = (Cell(wording.scaled(point.tokens)), _budget_gap(point, "tokens"), Cell(slope), *speedups)
            rows.append((_arm(report, name), *about, *(_budget_gap(point, cost) for cost in COSTS[1:])))
    heads = ("Arm", "Budget", "Gap at equal tokens", f"Slope of {report.get('baseline')}", "Speed-up in tokens")
    more = ("in FLOPs", "in seconds", "Gap at equal FLOPs", "at equal seconds")
    return Table(f"Decayed losses, {LOSS_NAMES[key]}", (*heads, *more), tuple(rows))


def budget_width_table(studies: dict[str, BudgetStudy], key: str) -> Table:
    """One row per budget: the log-linear fit of the decayed loss in r."""
    rows = [
        cells(
            (
                wording.scaled(fit["tokens"]),
                interval(fit["slope"], "+.4f") if fit["slope"] else str(fit["reason"]),
                wording.fixed(fit["r2"], ".3f"),
                wording.seeds_text(len(fit["seeds"])),
            )
        )
        for fit in studies[key].widths
    ]
    return Table(
        f"Log-linear fit in r, {LOSS_NAMES[key]}", ("Budget", "Nats per doubling of r", "R²", "Seeds"), tuple(rows)
    )


def cost_table(report: dict[str, Any]) -> Table:
    """One row per arm: geometry, size, compute, speed, memory and learning rate, with factors over the baseline.

    Embedding form and MTP depth have a column only where arms differ in them. The speed is the median step, in older
    results tokens per second.
    """
    summary, baseline = report["summary"], baseline_summary(report)
    options = [field for field in ("embedding", "mtp") if len({arm[field] for arm in summary}) > 1]
    titles = {"embedding": "Embedding", "mtp": "MTP"}
    stepped = all(arm["step_seconds_median"] is not None for arm in summary)
    speed = "Median step" if stepped else "Tokens per second"
    heads = ("Arm", "Connection", "m", "n", "r", *(titles[o] for o in options), "Parameters", "FLOPs per token", speed)
    rows = []
    for arm in summary:
        connection = CONNECTION_NAMES.get(arm["connection"], arm["connection"])
        words = [connection, *(f"{arm[field]:.4g}" for field in ("m", "n", "r")), *(arm[field] for field in options)]

        def cell(field: str, text: str, arm: dict[str, Any] = arm) -> Cell:
            factor = "" if baseline is None or arm["is_baseline"] else wording.ratio(arm[field], baseline[field])
            uneven = ("uneven",) if arm["uneven"] and field in ("step_seconds_median", "tokens_per_second") else ()
            return Cell(text, notes=(*((factor,) if factor else ()), *uneven))

        pace = cell("tokens_per_second", wording.scaled(arm["tokens_per_second"]))
        if stepped:
            pace = cell("step_seconds_median", f"{1000 * arm['step_seconds_median']:.3g} ms")
        rate = Cell(NOTHING if arm["learning_rate"] is None else f"{arm['learning_rate']:.3g}")
        costs = [cell(field, wording.scaled(arm[field])) for field in ("params", "flops_per_token")]
        memory = cell("peak_memory_bytes", wording.mebibytes(arm["peak_memory_bytes"]))
        plain = (Cell(NOTHING if word is None else str(word)) for word in words)
        rows.append((_arm(report, arm["name"]), *plain, *costs, pace, memory, rate))
    return Table("Arms and their cost", (*heads, "Peak memory", "Learning rate"), tuple(rows))


def sweep_table(report: dict[str, Any]) -> Table:
    """One row per arm: the chosen rate, whether worse ones lie on both sides of it, and every rate tried."""
    rows = []
    for entry in report["sweep"]:
        if entry["arm"] not in arm_styles(report):
            continue
        tried = [
            f"{r['learning_rate']:.3g}: {'diverged' if r['loss'] is None else format(r['loss'], '.4f')}"
            for r in entry["rates"]
        ]
        bracketed = ("yes" if entry["bracketed"] else "no, at the edge") if tried else "not swept"
        last = Cell("", notes=tuple(tried)) if tried else Cell(NOTHING)
        rows.append((_arm(report, entry["arm"]), *cells((f"{entry['best']:.3g}", bracketed)), last))
    return Table(
        "Learning-rate sweep", ("Arm", "Chosen rate", "Bracketed", "Criterion at each rate tried"), tuple(rows)
    )


def pairwise_table(report: dict[str, Any], key: str) -> Table:
    """Every arm against every other: the row's final loss minus the column's, paired by seed."""
    found = report["pairwise"][key]
    rows = [
        (_arm(report, name), *(Cell(NOTHING) if other == name else _pair(found[name][other]) for other in found))
        for name in found
    ]
    return Table(f"Row minus column, final {LOSS_NAMES[key]}", ("Arm", *found), tuple(rows))


def equal_cost_table(report: dict[str, Any], key: str) -> Table:
    """One row per arm but the baseline: the difference at equal tokens, training FLOPs and training time."""
    rows = []
    for arm in report["summary"]:
        loss = arm[key]
        if loss is None or arm["is_baseline"]:
            continue
        equal = (_equal(loss[field], arm["name"], report.get("baseline")) for field in ("equal_flops", "equal_seconds"))
        tokens = _number(wording.estimate(loss["difference"], signed=True), VERDICT_WORDS[loss["verdict"]])
        rows.append((_arm(report, arm["name"]), tokens, *equal))
    heads = ("Arm", "Equal tokens", "Equal training FLOPs", "Equal training time")
    return Table(f"At equal cost, {LOSS_NAMES[key]}", heads, tuple(rows))


def markdown(table: Table) -> str:
    """The table for a README."""
    lines = [" | ".join(table.heads), " | ".join("---" for _ in table.heads)]
    for row in table.rows:
        notes = [f" ({', '.join(cell.notes)})" if cell.notes else "" for cell in row]
        texts = [f"{cell.text}{cell.spread}{note}" for cell, note in zip(row, notes, strict=True)]
        lines.append(" | ".join(text.replace("|", "\\|") for text in texts))
    return "\n".join(f"| {line} |" for line in lines)


def settings(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as `outer.inner` names with their values in words."""
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
    return Cell(name, colour=arm_styles(report)[name].css)


def _number(value: str, *notes: str) -> Cell:
    mean, separator, spread = value.partition(PLUS_MINUS)
    return Cell(mean, f"{separator}{spread}", tuple(note for note in notes if note))


def _pair(found: dict[str, Any]) -> Cell:
    reason = found["reason"] if found["verdict"] == "unknown" else None
    return _number(wording.estimate(found["difference"], signed=True), reason or VERDICT_WORDS[found["verdict"]])


def _equal(found: dict[str, Any], arm: str, baseline: str | None) -> Cell:
    if found["difference"]["mean"] is None:
        return _number(NOTHING, "" if found["status"] == "compared" else found["status"])
    shares = [(baseline, found["baseline_share"]), (arm, found["arm_share"])]
    early = [
        f"{name} read at {100 * share:.0f}{PERCENT}" for name, share in shares if share is not None and share < 0.995
    ]
    return _number(wording.estimate(found["difference"], signed=True), VERDICT_WORDS[found["verdict"]], *early)


def _against(loss: dict[str, Any]) -> list[Cell]:
    if loss["verdict"] == "baseline":
        return [Cell("baseline"), _number(wording.tokens_needed(loss))]
    speedup, bound = loss["speedup"]["mean"], "≥ " if loss["tokens_at_most"] else ""
    gain = "" if speedup is None else f"speed-up {bound}{speedup:.2f}×"
    difference = _number(wording.estimate(loss["difference"], signed=True), VERDICT_WORDS[loss["verdict"]])
    return [difference, _number(wording.tokens_needed(loss), gain)]


def _run_cells(run: dict[str, Any], pair: dict[str, Any], baseline: str | None) -> list[str]:
    share, bound = pair["tokens_fraction"], "≤ " if pair["tokens_at_most"] else ""
    points = judged_points(run)
    seconds = points[-1].get("seconds") if points else None
    missing = "not reached" if pair["tokens_defined"] else NOTHING
    difference = wording.fixed(pair["difference"], "+.4f") if pair["status"] == "compared" else pair["status"]
    return [
        str(run["seed"]),
        wording.fixed(pair["final"], ".4f"),
        "baseline" if run["name"] == baseline else difference,
        missing if pair["tokens"] is None else bound + wording.scaled(pair["tokens"]),
        NOTHING if share is None else f"{bound}{100 * share:.1f}{PERCENT}",
        wording.fixed(seconds, ",.0f"),
    ]


def _budget_gap(point: BudgetPoint, cost: str) -> Cell:
    found = point.equal[cost]
    mark = "extrapolated" if found.difference_extrapolated else ""
    if found.difference.mean is None:
        return _number(NOTHING, found.reason or "")
    return _interval(interval(found.difference.described(), "+.4f"), mark)


def _budget_speedup(point: BudgetPoint, cost: str) -> Cell:
    found = point.equal[cost]
    if found.speedup.mean is None:
        return _number(NOTHING, found.reason or "")
    return _interval(
        interval(found.speedup.described(), ".2f", "×"), "extrapolated" if found.speedup_extrapolated else ""
    )


def _interval(value: str, mark: str) -> Cell:
    mean, _, rest = value.partition(" (")
    return Cell(mean, notes=(rest.removesuffix(")"), *((mark,) if mark else ())))
