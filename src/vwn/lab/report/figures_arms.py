"""Figures over arms: the speed-up over budgets, the gain of each arm, and the loss over the virtual width."""

from __future__ import annotations

from math import log2
from typing import Any

import numpy as np

from vwn.lab.analysis import story
from vwn.lab.analysis.budgets import BudgetPoint, BudgetStudy
from vwn.lab.analysis.wording import LOSS_NAMES, budget, interval
from vwn.lab.report.figures import INK_STYLE, PAPER_STYLE, Axis, Figure, LineStyle, Series, arm_styles, padded_range

# The paper's speed-ups, at its last budget.
PAPER_SPEEDUP = {"loss": 2.5, "loss_2": 3.5}
PAPER_TOKENS = "3T"
# Doublings of the axis between the last budget and the paper's.
BREAK = 1.5
MOST_BUDGETS = 6
# Of the law's lines, so that the band of a line that turns about its centre has a waist.
LAW_POINTS = 33


def budget_figure(report: dict[str, Any], studies: dict[str, BudgetStudy], key: str) -> Figure | None:
    """The speed-up in tokens over the budget, a line for each arm, and the paper's beyond a break of the axis."""
    study, styles = studies.get(key), arm_styles(report)
    if study is None:
        return None
    series = [_budget_series(name, styles[name], points) for name, points in study.arms.items()]
    series = [one for one in series if len(one.x)]
    if not series:
        return None
    budgets = [row.tokens for row in study.baseline]
    end, baseline = log2(budgets[-1]), str(report.get("baseline"))
    hover = [f"the paper, ×8 at {PAPER_TOKENS} tokens"]
    series.append(Series("the paper", "mark", PAPER_STYLE, [end + BREAK], [PAPER_SPEEDUP[key]], hover=hover))
    ticks = [(log2(tokens), budget(tokens)) for tokens in budgets[:: -(-len(budgets) // MOST_BUDGETS)]]
    return Figure(
        name="speedup-over-budget",
        key=key,
        title=f"Speed-up over budget, {LOSS_NAMES[key]}",
        caption=f"{story.budget_growth(report, study, key)} Speed-up: tokens that {baseline} needs for an arm’s "
        "decayed loss, over the arm’s tokens. Bars: 95\u00a0% interval over three seeds or more (Student’s t), the "
        "range of two, none for one. Hollow: extrapolated with the fit E + B·T^−β. "
        f"Beyond the break: the paper’s {PAPER_SPEEDUP[key]}× at {PAPER_TOKENS} tokens.",
        x=Axis("training tokens (logarithmic)", (*ticks, (end + BREAK, PAPER_TOKENS))),
        y=Axis("speed-up in tokens", range=padded_range([*(value for one in series for value in one.y), 1.0])),
        series=tuple(series),
        level=1.0,
        level_name=baseline,
        axis_break=end + BREAK / 2,
    )


def gain_figure(report: dict[str, Any], key: str) -> Figure | None:
    """Each arm's final loss minus the baseline's, beside recorded seeds; None without a difference."""
    styles, baseline, series = arm_styles(report), str(report.get("baseline")), []
    arms = [arm for arm in report["summary"] if not arm["is_baseline"] and arm[key] is not None]
    for place, arm in enumerate(arms):
        name, found = arm["name"], arm[key]["difference"]
        known = story.recorded(report, name, key)
        if found["mean"] is None:
            continue
        low, high = found["interval"] or (None, None)
        hover = [f"{name}: {interval(found, '+.4f')}"]
        series.append(Series(name, "points", styles[name], [place], [found["mean"]], [low], [high], hover))
        apart = [place + 0.3 + 0.05 * index for index in range(len(known))]
        texts = [f"recorded: {value:+.4f}" for value in known]
        series.append(Series("recorded seeds", "ring", PAPER_STYLE, apart, known, hover=texts))
    if not series:
        return None
    values = [0.0, *(value for one in series for value in one.y)]
    bounds = [value for one in series for value in (*one.low, *one.high)]
    rings = " Rings: recorded seeds." if any(one.role == "ring" and len(one.x) for one in series) else ""
    return Figure(
        name="gain",
        key=key,
        title=f"Final {LOSS_NAMES[key]} against {baseline}",
        caption=f"Below the dotted line: better than {baseline}. Bars: 95\u00a0% interval (Student’s t).{rings}",
        x=Axis("", tuple((float(place), "") for place in range(len(arms)))),
        y=Axis(f"final loss minus {baseline}’s, nats per token", range=padded_range(values, bounds)),
        series=tuple(one for one in series if len(one.x)),
        level=0.0,
        level_name=baseline,
    )


def width_law_figure(report: dict[str, Any], key: str) -> Figure | None:
    """Final loss over log2 r with the fitted line, beside the paper's slope (figures 6 and 7); None without a fit."""
    fit = report["scaling"][key]
    if fit is None or fit["slope"] is None:
        return None
    paper, slope, styles = report["scaling"]["paper"]["slope"], fit["slope"], arm_styles(report)
    x, level = np.log2(fit["widths"]), float(np.mean(fit["losses"]))
    ends = np.linspace(x.min(), x.max(), LAW_POINTS)
    line, law = ((level + b * (ends - x.mean())).tolist() for b in (slope["mean"], paper))
    low: list[float] = []
    high: list[float] = []
    if slope["interval"] is not None:
        edges = np.stack([level + b * (ends - x.mean()) for b in slope["interval"]])
        low, high = edges.min(axis=0).tolist(), edges.max(axis=0).tolist()
    series = [
        Series(f"the paper’s slope, {paper}".replace("-", "−"), "mean", PAPER_STYLE, ends.tolist(), law),
        Series("least-squares fit", "mean", INK_STYLE, ends.tolist(), line, low, high),
    ]
    series += [
        Series(name, "points", styles[name], [place], [loss], hover=[f"{name}, r = {r:.4g}: {loss:.4f}"])
        for name, place, loss, r in zip(fit["arms"], x.tolist(), fit["losses"], fit["widths"], strict=True)
    ]
    r2 = "" if fit["r2"] is None else f", R² {fit['r2']:.3f}"
    band = " Band: 95\u00a0% interval of the slope over seeds (Student’s t), turned about the centre." if low else ""
    return Figure(
        name="loss-over-width",
        key=key,
        title=f"Final {LOSS_NAMES[key]} over the virtual width",
        caption=f"{interval(slope, '+.4f')} per doubling of r{r2}.{band} The baseline is not in the fit. The paper’s "
        "slope is drawn through the same centre.".replace("-", "−"),
        x=Axis(
            "virtual width factor r (logarithmic)", tuple(sorted({log2(r): f"{r:.4g}" for r in fit["widths"]}.items()))
        ),
        y=Axis("final loss, nats per token", range=padded_range([v for one in series for v in one.y], [*low, *high])),
        series=tuple(series),
    )


def _budget_series(name: str, style: LineStyle, points: list[BudgetPoint]) -> Series:
    known = [point for point in points if point.speedup.over_seeds.mean is not None]
    bounds = [point.speedup.bounds or (None, None) for point in known]
    hover = [
        f"{name} at {budget(point.tokens)} tokens: {point.speedup.text('.2f', '×')}"
        f"{', extrapolated' if point.speedup.extrapolated else ''}"
        for point in known
    ]
    return Series(
        name,
        "points",
        style,
        x=[log2(point.tokens) for point in known],
        y=[point.speedup.over_seeds.mean for point in known],
        low=[low for low, _ in bounds],
        high=[high for _, high in bounds],
        hover=hover,
        hollow=[point.speedup.extrapolated for point in known],
    )
