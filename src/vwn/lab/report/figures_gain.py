"""The figures of the first lines: the speed-up over budgets, and this comparison's gain beside recorded ones."""

from __future__ import annotations

from math import log2
from typing import Any

from vwn.lab.analysis import story
from vwn.lab.analysis.budgets import BudgetPoint, BudgetStudy
from vwn.lab.analysis.estimates import Estimate
from vwn.lab.analysis.wording import LOSS_NAMES, interval, scaled
from vwn.lab.report.draw import tokens_label
from vwn.lab.report.figures import INK_STYLE, PAPER_STYLE, Axis, Figure, LineStyle, Series, arm_styles, padded_range

# The paper's speed-ups, at its last budget.
PAPER_SPEEDUP = {"loss": 2.5, "loss_2": 3.5}
PAPER_TOKENS = "3T"
# Doublings of the axis between the last budget and the paper's.
BREAK = 1.5
MOST_BUDGETS = 6


def budget_figure(report: dict[str, Any], studies: dict[str, BudgetStudy], key: str) -> Figure | None:
    """The speed-up in tokens over the budget, a line for each arm, and the paper's beyond a break of the axis."""
    study, styles, series = studies.get(key), arm_styles(report), []
    if study is None:
        return None
    for name, points in study.arms.items():
        known = [point for point in points if point.speedup.mean is not None]
        if not known:
            continue
        bounds = [point.speedup.interval or (None, None) for point in known]
        series.append(
            Series(
                name,
                "points",
                styles[name],
                x=[log2(point.tokens) for point in known],
                y=[point.speedup.mean for point in known],
                low=[low for low, _ in bounds],
                high=[high for _, high in bounds],
                hover=[_budget_hover(name, point) for point in known],
                hollow=[point.equal["tokens"].speedup_extrapolated for point in known],
            )
        )
    if not series:
        return None
    budgets = [row.tokens for row in study.baseline]
    end = log2(budgets[-1])
    paper = Series(
        "the paper", "mark", PAPER_STYLE, [end + BREAK], [PAPER_SPEEDUP[key]], hover=["the paper, ×8 at 3T tokens"]
    )
    marks = budgets[:: -(-len(budgets) // MOST_BUDGETS)]
    ticks = [(log2(tokens), tokens_label(tokens)) for tokens in marks]
    baseline = str(report.get("baseline"))
    values = [value for one in (*series, paper) for value in one.y]
    return Figure(
        name="speedup-over-budget",
        key=key,
        title=f"Speed-up over budget, {LOSS_NAMES[key]}",
        caption=f"Tokens that {baseline} needs for an arm’s decayed loss, over the arm’s tokens. Bars: 95\u00a0% "
        "interval over seeds (Student’s t). Hollow: extrapolated with the fit E + B·T^−β. "
        f"Beyond the break: the paper’s {PAPER_SPEEDUP[key]}× at {PAPER_TOKENS} tokens.",
        x=Axis("training tokens (logarithmic)", (*ticks, (end + BREAK, PAPER_TOKENS))),
        y=Axis("speed-up in tokens", range=padded_range([*values, 1.0])),
        series=(*series, paper),
        level=1.0,
        level_name=baseline,
        axis_break=end + BREAK / 2,
    )


def seeds_figure(report: dict[str, Any]) -> Figure | None:
    """The best arm's difference to the baseline beside each recorded seed, in both losses; None without records."""
    lead = story.lead_arm(report)
    if lead is None or not story.recorded(report, lead["name"], "loss"):
        return None
    series: list[Series] = []
    labels: dict[float, str] = {}
    style = arm_styles(report)[lead["name"]]
    for place, (key, name) in enumerate(LOSS_NAMES.items()):
        values = story.recorded(report, lead["name"], key)
        if not values or lead[key] is None or lead[key]["difference"]["mean"] is None:
            continue
        labels[float(place)] = name
        apart = [place + 0.06 * (index - (len(values) - 1) / 2) for index in range(len(values))]
        texts = [f"recorded: {value:+.4f}" for value in values]
        series.append(Series("recorded seeds", "ring", PAPER_STYLE, apart, values, hover=texts))
        series.append(_bar("recorded mean", INK_STYLE, place, Estimate.over(values).described()))
        own = report["pairwise"][key][lead["name"]][report["baseline"]]["difference"]
        series.append(_bar(f"{lead['name']}, this result", style, place - 0.3, own))
    return Figure(
        name="gain-over-seeds",
        key="loss",
        title=f"{lead['name']} against {report.get('baseline')}, here and recorded",
        caption=f"Final loss minus {report.get('baseline')}’s. Rings: recorded seeds; bar: 95\u00a0% interval.",
        x=Axis("", tuple(labels.items())),
        y=Axis(
            "difference, nats per token",
            range=padded_range([v for one in series for v in (*one.y, *one.low, *one.high, 0.0)]),
        ),
        series=tuple(series),
        level=0.0,
        level_name=str(report.get("baseline")),
    )


def _bar(name: str, style: LineStyle, place: float, found: dict[str, Any]) -> Series:
    """A mean with its 95 % interval."""
    low, high = found["interval"] or (None, None)
    return Series(name, "points", style, [place], [found["mean"]], [low], [high], [interval(found, "+.4f")])


def _budget_hover(name: str, point: BudgetPoint) -> str:
    mark = ", extrapolated" if point.equal["tokens"].speedup_extrapolated else ""
    return f"{name} at {scaled(point.tokens)} tokens: {interval(point.speedup.described(), '.2f', '×')}{mark}"
