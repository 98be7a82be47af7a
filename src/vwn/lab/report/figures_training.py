"""Figures over training tokens: loss and gap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vwn.lab.analysis import story
from vwn.lab.analysis.curves import Curve, mean_curve
from vwn.lab.analysis.runs import has_loss, read_curve, runs_by_arm
from vwn.lab.analysis.wording import LOSS_NAMES, interval
from vwn.lab.report.figures import Arrow, Axis, Figure, LineStyle, Series, arm_styles, padded_range

# The share of the tokens whose steep start is left out of the range: it would flatten everything of interest.
FOCUS_FROM = 0.25
TOKENS = Axis("training tokens")
# Of more arms the bands would hide each other.
MOST_BANDS = 2
# The least share of a figure's height that is kept free below the arrow, for its text.
ARROW_ROOM = 0.2


def fewer_tokens_figure(report: dict[str, Any]) -> Figure | None:
    """Show the best arm against the baseline alone, for the first lines; None where `loss_figure` is that already."""
    lead = story.lead_arm(report)
    if lead is None or len(report["summary"]) < 3:
        return None
    return replace(loss_figure(report, "loss", (str(report.get("baseline")), lead["name"])), name="fewer-tokens")


def loss_figure(report: dict[str, Any], key: str, only: tuple[str, ...] | None = None) -> Figure:
    """Show validation loss (`"loss"` or `"loss_2"`, nats per token) over training tokens; a dotted line at the target.

    Of two arms, an arrow shows how many tokens the better one saves.
    """
    styles, baseline = arm_styles(report), str(report.get("baseline"))
    arms = {
        name: [read_curve(run, key) for run in runs if has_loss(run, key)]
        for name, runs in runs_by_arm(report).items()
        if only is None or name in only
    }
    target = mean_curve(arms.get(baseline, [])).final_loss
    series: list[Series] = []
    for name, curves in arms.items():
        series += _arm_series(name, [curve for curve in curves if not curve.is_empty], styles[name])
    several = any(one.role == "seed" for one in series)
    arrow = None if target is None or len(arms) != 2 else _saved(report, key, target)
    dotted = "" if target is None else f"Dotted: {baseline}’s final loss."
    return Figure(
        name="loss-over-tokens",
        key=key,
        title=f"Validation {LOSS_NAMES[key]}",
        caption=f"{'Thick: mean over seeds; faint: each seed. ' if several else ''}{dotted}".strip(),
        x=TOKENS,
        y=Axis("validation loss, nats per token", range=_with_room(_focus(series, [target]), arrow)),
        series=tuple(series),
        level=target,
        level_name=f"{baseline}’s final loss",
        arrow=arrow,
    )


def gap_figure(report: dict[str, Any], key: str) -> Figure:
    """Each arm's validation loss minus the baseline's of the same seed, with the 95 % band over seeds of few arms."""
    styles, baseline = arm_styles(report), str(report.get("baseline"))
    arms = [arm for arm in report["summary"] if arm[key] is not None and arm[key]["gap_curve"]]
    series = [_gap_series(arm["name"], styles[arm["name"]], arm[key]["gap_curve"]) for arm in arms]
    if len(series) > MOST_BANDS:
        series = [replace(one, low=(), high=()) for one in series]
    has_bands = any(value is not None for one in series for value in one.low)
    band = " Band: 95\u00a0% interval over seeds (Student’s t)." if has_bands else ""
    return Figure(
        name="gap-over-tokens",
        key=key,
        title=f"Difference to {baseline}, {LOSS_NAMES[key]}",
        caption=f"Below the dotted line: better than {baseline} after as many tokens.{band}",
        x=TOKENS,
        y=Axis("difference, nats per token", range=_focus(series, [0.0])),
        series=tuple(series),
        level=0.0,
        level_name=baseline,
    )


def _arm_series(name: str, curves: list[Curve], style: LineStyle) -> list[Series]:
    """Show the mean over seeds in front of faint seeds; of one seed its curve alone."""
    if not curves:
        return []
    mean = mean_curve(curves)
    seeds = [Series(name, "seed", style, curve.tokens.tolist(), _values(curve)) for curve in curves]
    hover = [f"{value:.4f}" for value in mean.losses]
    own = Series(name, "mean", style, mean.tokens.tolist(), _values(mean), hover=hover)
    return [*seeds, own] if len(curves) > 1 else [own]


def _gap_series(name: str, style: LineStyle, points: list[dict[str, Any]]) -> Series:
    bounds = [point["interval"] or (None, None) for point in points]
    return Series(
        name,
        "mean",
        style,
        [point["tokens"] for point in points],
        [point["mean"] for point in points],
        [low for low, _ in bounds],
        [high for _, high in bounds],
        ["" if point["mean"] is None else interval(point, "+.4f") for point in points],
    )


def _with_room(y_range: tuple[float, float] | None, arrow: Arrow | None) -> tuple[float, float] | None:
    if y_range is None or arrow is None:
        return y_range
    return min(y_range[0], arrow.y - ARROW_ROOM / (1 - ARROW_ROOM) * (y_range[1] - arrow.y)), y_range[1]


def _saved(report: dict[str, Any], key: str, target: float) -> Arrow | None:
    """Point from where the baseline reaches its final loss to where the best arm does, if earlier in every seed."""
    lead = story.lead_arm(report)
    share = None if lead is None or lead[key] is None else lead[key]["tokens_fraction"]["mean"]
    if lead is None or share is None or share >= 1:
        return None
    pairs = [run["paired"][key] for run in report["arms"] if run["name"] == lead["name"]]
    reached = [(pair["tokens"], pair["tokens_fraction"]) for pair in pairs if pair and pair["tokens_fraction"]]
    tokens = float(np.mean([tokens for tokens, _ in reached]))
    needed = float(np.mean([tokens / fraction for tokens, fraction in reached]))
    bound = "at least " if lead[key]["tokens_at_most"] else ""
    return Arrow(needed, tokens, target, f"{lead['name']}: {bound}{100 * (1 - share):.0f}\u00a0% fewer tokens")


def _values(curve: Curve) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in curve.losses]


def _focus(series: Sequence[Series], levels: Sequence[float | None]) -> tuple[float, float] | None:
    """Return the range of all that lies after `FOCUS_FROM` of the tokens, and of the levels."""
    start = FOCUS_FROM * max((one.x[-1] for one in series if len(one.x)), default=0.0)

    values = [v for one in series for x, v in zip(one.x, one.y, strict=True) if x >= start]
    bands = [v for one in series for c in (one.low, one.high) for x, v in zip(one.x, c, strict=False) if x >= start]
    return padded_range([*values, *levels], bands)
