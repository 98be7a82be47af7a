"""The figures of a report: loss over tokens, tokens saved over budgets, gain of each arm, loss over the width."""

from __future__ import annotations

from math import log2
from typing import Any

import matplotlib
import numpy as np

from vwn.lab.analysis import story
from vwn.lab.analysis.budgets import BudgetStudy, budget_studies
from vwn.lab.analysis.curves import mean_curve
from vwn.lab.analysis.runs import has_loss, measured_losses, read_curve, runs_by_arm
from vwn.lab.analysis.wording import LOSS_NAMES, budget, interval
from vwn.lab.report.draw import STYLE, Figure, LineStyle, arm_styles, padded_range

NAMES = ("speedup-over-budget", "fewer-tokens", "loss-over-tokens", "gain", "loss-over-width")
INK, PAPER = LineStyle("ink"), LineStyle("muted", (0, (5, 2)))
# The share of the tokens whose steep start is left out of the range: it would flatten everything of interest.
FOCUS_FROM = 0.25
# The least share of a figure's height that is kept free below the arrow, for its text.
ARROW_ROOM = 0.2
# How many times fewer tokens the paper's widest model needs, at its last budget.
PAPER_SPEEDUP = {"loss": 2.5, "loss_2": 3.5}
PAPER_TOKENS = "3T"
# Nats per doubling of r: the paper's fit, next-token loss of MoE-A0.8B at m = 8 after 500 B tokens.
PAPER_SLOPE = -0.0069
# Doublings of the axis between the last budget and the paper's.
BREAK = 1.5
MOST_BUDGETS = 6


def report_figures(report: dict[str, Any]) -> list[Figure]:
    """Return the figures that the data of an analysed report has, in the page's order."""
    studies, lead = budget_studies(report), story.lead_arm(report)
    with matplotlib.rc_context(STYLE):
        found = [budget_figure(report, studies, key) for key in LOSS_NAMES]
        if lead is not None and len(report["summary"]) > 2:
            found.append(loss_figure(report, "loss", "fewer-tokens", (str(report.get("baseline")), lead["name"])))
        for key in measured_losses(report):
            found += [make(report, key) for make in (loss_figure, gain_figure, width_law_figure)]
    return [figure for figure in found if figure is not None]


def loss_figure(
    report: dict[str, Any], key: str, name: str = "loss-over-tokens", only: tuple[str, ...] | None = None
) -> Figure | None:
    """Show validation loss (`"loss"` or `"loss_2"`, nats per token) over training tokens; a dotted line at the target.

    Of two arms, an arrow shows how many tokens the better one saves. None without two points.
    """
    styles, baseline = arm_styles(report), str(report.get("baseline"))
    arms = {
        arm: [curve for run in runs if has_loss(run, key) and not (curve := read_curve(run, key)).is_empty]
        for arm, runs in runs_by_arm(report).items()
        if only is None or arm in only
    }
    curves = [curve for of_arm in arms.values() for curve in of_arm]
    if not any(np.isfinite(curve.losses).sum() > 1 for curve in curves):
        return None
    target = mean_curve(arms.get(baseline, [])).final_loss
    several = any(len(of_arm) > 1 for of_arm in arms.values())
    caption = "Thick: mean over seeds; faint: each seed." if several else ""
    figure = Figure(
        name, key, f"Validation {LOSS_NAMES[key]}", caption, "training tokens", "validation loss, nats per token"
    )
    for arm, of_arm in arms.items():
        for curve in of_arm if len(of_arm) > 1 else []:
            figure.line(arm, styles[arm], curve.tokens, curve.losses, linewidth=0.5, alpha=0.4, marker=None)
        if of_arm:
            mean = mean_curve(of_arm)
            points = zip(mean.tokens, mean.losses, strict=True)
            hover = [f"{arm} at {budget(tokens)} tokens: {loss:.4f}" for tokens, loss in points]
            figure.line(arm, styles[arm], mean.tokens, mean.losses, hover)
    start = FOCUS_FROM * max(curve.tokens[-1] for curve in curves)
    values = np.concatenate([curve.losses[curve.tokens >= start] for curve in curves])
    limits = padded_range([*values, *([] if target is None else [target])])
    if target is not None:
        figure.level(f"{baseline}’s final loss", target)
        if len(arms) == 2 and limits and (saved := _saved(report, key)):
            start, end, text = saved
            figure.arrow(start, end, target, text)
            limits = min(limits[0], target - ARROW_ROOM / (1 - ARROW_ROOM) * (limits[1] - target)), limits[1]
    figure.axes.set(xlim=(0, None), ylim=limits)
    figure.axes.xaxis.set_major_formatter(lambda value, _: budget(value))
    figure.axes.locator_params(axis="x", nbins=5)
    return figure


def _saved(report: dict[str, Any], key: str) -> tuple[float, float, str] | None:
    """Find where the baseline reaches its final loss and where the best arm does, if earlier in every seed."""
    lead = story.lead_arm(report)
    share = None if lead is None or lead[key] is None else lead[key]["tokens_fraction"]["mean"]
    if lead is None or share is None or share >= 1:
        return None
    pairs = [run["paired"][key] for run in report["arms"] if run["name"] == lead["name"]]
    reached = [(pair["tokens"], pair["tokens_fraction"]) for pair in pairs if pair and pair["tokens_fraction"]]
    tokens = float(np.mean([tokens for tokens, _ in reached]))
    needed = float(np.mean([tokens / fraction for tokens, fraction in reached]))
    bound = "at least " if lead[key]["tokens_at_most"] else ""
    return needed, tokens, f"{lead['name']}: {bound}{100 * (1 - share):.0f}\u00a0% fewer tokens"


def budget_figure(report: dict[str, Any], studies: dict[str, BudgetStudy], key: str) -> Figure | None:
    """Show how many times fewer tokens each arm needs for the baseline's loss, and the paper's number."""
    study, styles, baseline = studies.get(key), arm_styles(report), str(report.get("baseline"))
    arms = {} if study is None else study.tokens_factors
    known = {arm: {t: found for t, found in of_arm.items() if found.over_seeds.mean} for arm, of_arm in arms.items()}
    known = {arm: of_arm for arm, of_arm in known.items() if of_arm}
    if study is None or not known:
        return None
    budgets = [row.tokens for row in study.baseline]
    papers = log2(budgets[-1]) + BREAK
    ticks = [(log2(tokens), budget(tokens)) for tokens in budgets[:: -(-len(budgets) // MOST_BUDGETS)]]
    figure = Figure(
        name="speedup-over-budget",
        key=key,
        title=f"Tokens saved over budget, {LOSS_NAMES[key]}",
        caption=f"{baseline}’s tokens over those after which an arm has the same decayed loss, as the paper counts. "
        "Seeds with smaller budgets count where all come to that loss. "
        "Bars: 95\u00a0% interval over three seeds or more (Student’s t), the range of two, none for one. "
        "A long bar goes on beyond the edge. "
        "Hollow: extrapolated with the arm’s fit E + B·T^−β. "
        f"Beyond the break: the paper’s {PAPER_SPEEDUP[key]}× at {PAPER_TOKENS} tokens.",
        x=f"training tokens of {baseline} (logarithmic)",
        y=f"times fewer tokens to {baseline}’s loss",
        ticks=[*ticks, (papers, PAPER_TOKENS)],
    )
    drawn, bounds = [1.0, PAPER_SPEEDUP[key]], [1.0]
    for place, (arm, of_arm) in enumerate(known.items()):
        aside = 0.1 * (place - (len(known) - 1) / 2)  # so that the bars of two arms do not cover each other
        points = [*of_arm.values()]
        x = np.array([log2(tokens) + aside for tokens in of_arm])
        y = np.array([point.over_seeds.mean for point in points])
        hollow = np.array([point.extrapolated for point in points])
        notes = [f"{point.text('.2f', '×')}{', extrapolated' if point.extrapolated else ''}" for point in points]
        hover = [f"{arm} at {budget(tokens)} tokens: {note}" for tokens, note in zip(of_arm, notes, strict=True)]
        figure.bars(styles[arm], x, [point.bounds for point in points])
        figure.line(arm, styles[arm], x, y, hover, markersize=4.5, markevery=None)
        inside: Any = {"color": figure.axes.get_facecolor(), "markeredgewidth": 0, "markersize": 2.7, "zorder": 3}
        figure.axes.plot(x[hollow], y[hollow], marker=styles[arm].marker, linestyle="none", **inside)
        drawn += y.tolist()
        bounds += [bound for point in points for bound in point.bounds or ()]
    star: Any = {"marker": "*", "markersize": 9, "linestyle": "none"}
    figure.line("the paper", PAPER, [papers], [PAPER_SPEEDUP[key]], [f"the paper, ×8 at {PAPER_TOKENS} tokens"], **star)
    figure.level(baseline, 1.0)
    figure.cut_axis(papers - BREAK / 2)
    figure.axes.set_ylim(padded_range(drawn, bounds))
    return figure


def gain_figure(report: dict[str, Any], key: str) -> Figure | None:
    """Show each arm's final loss minus the baseline's; None without a difference."""
    styles, baseline = arm_styles(report), str(report.get("baseline"))
    arms = [arm for arm in report["summary"] if not arm["is_baseline"] and arm[key] is not None]
    known = [(arm["name"], arm[key]["difference"]) for arm in arms if arm[key]["difference"]["mean"] is not None]
    if not known:
        return None
    figure = Figure(
        name="gain",
        key=key,
        title=f"Final {LOSS_NAMES[key]} against {baseline}",
        caption=f"Below the dotted line: better than {baseline}. Bars: 95\u00a0% interval (Student’s t).",
        x="",
        y=f"final loss minus {baseline}’s, nats per token",
        ticks=[(float(place), "") for place in range(len(known))],
    )
    for place, (name, found) in enumerate(known):
        figure.bars(styles[name], [place], [found["interval"]])
        hover = [f"{name}: {interval(found, '+.4f')}"]
        figure.line(name, styles[name], [place], [found["mean"]], hover, markersize=4.5, markevery=None)
    figure.level(baseline, 0.0)
    bounds = [bound for _, found in known for bound in found["interval"] or ()]
    figure.axes.set_ylim(padded_range([0.0, *(found["mean"] for _, found in known)], bounds))
    return figure


def width_law_figure(report: dict[str, Any], key: str) -> Figure | None:
    """Show the final loss over log2 r with the fitted line, beside the paper's slope; None without a fit."""
    fit, styles = report["scaling"][key], arm_styles(report)
    if fit is None or fit["slope"] is None:
        return None
    slope, x, level = fit["slope"], np.log2(fit["widths"]), float(np.mean(fit["losses"]))
    r2 = "" if fit["r2"] is None else f", R² {fit['r2']:.3f}"
    figure = Figure(
        name="loss-over-width",
        key=key,
        title=f"Final {LOSS_NAMES[key]} over the virtual width",
        caption=f"{interval(slope, '+.4f')} per doubling of r{r2}. The baseline is not in the fit. The paper’s "
        "slope is drawn through the same centre.".replace("-", "−"),
        x="virtual width factor r (logarithmic)",
        y="final loss, nats per token",
        ticks=sorted({log2(r): f"{r:.4g}" for r in fit["widths"]}.items()),
    )
    ends = np.array([x.min(), x.max()])
    line, law = (level + per_doubling * (ends - x.mean()) for per_doubling in (slope["mean"], PAPER_SLOPE))
    figure.line(f"the paper’s slope, {PAPER_SLOPE}".replace("-", "−"), PAPER, ends, law)
    figure.line("least-squares fit", INK, ends, line)
    for name, place, loss, r in zip(fit["arms"], x, fit["losses"], fit["widths"], strict=True):
        figure.line(name, styles[name], [place], [loss], [f"{name}, r = {r:.4g}: {loss:.4f}"], markersize=4.5)
    figure.axes.set_ylim(padded_range([*line, *law, *fit["losses"]]))
    return figure
