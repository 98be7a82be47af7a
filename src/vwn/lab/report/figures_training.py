"""Figures over training tokens: loss, gap and speed-up (figure 1 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vwn.lab.analysis import story
from vwn.lab.analysis.curves import Curve, gap_curve, mean_curve
from vwn.lab.analysis.runs import baseline_by_seed, has_loss, read_curve, runs_by_arm
from vwn.lab.analysis.wording import LOSS_NAMES, PLUS_MINUS
from vwn.lab.report.figures import Arrow, Axis, Figure, LineStyle, Series, arm_styles, padded_range

# The share of the tokens whose steep start is left out of the range: it would flatten everything of interest.
FOCUS_FROM = 0.25
TOKENS = Axis("training tokens")
MOST_BANDS = 2
BAND = "Band: 95\u00a0% interval over seeds (Student’s t). "
# The least share of a figure's height that is kept free below the arrow, for its text.
ARROW_ROOM = 0.2


def training_figures(report: dict[str, Any], key: str) -> list[Figure]:
    """Loss, gap and speed-up over training in the loss `key`; any of them may be empty."""
    return [loss_figure(report, key), gap_figure(report, key), speedup_figure(report, key)]


def fewer_tokens_figure(report: dict[str, Any]) -> Figure | None:
    """The best arm against the baseline alone, for the first lines; None where `loss_figure` is that already."""
    lead = story.lead_arm(report)
    if lead is None or len(report["summary"]) < 3:
        return None
    return replace(loss_figure(report, "loss", (str(report.get("baseline")), lead["name"])), name="fewer-tokens")


def loss_figure(report: dict[str, Any], key: str, only: tuple[str, ...] | None = None) -> Figure:
    """Validation loss (`"loss"` or `"loss_2"`, nats per token) over training tokens; a dotted line at the target.

    Of two arms, an arrow shows how many tokens the better one saves.
    """
    styles, baseline = arm_styles(report), str(report.get("baseline"))
    arms = {
        name: [read_curve(run, key) for run in runs if has_loss(run, key)]
        for name, runs in runs_by_arm(report).items()
        if only is None or name in only
    }
    target = mean_curve(arms.get(baseline, []))[0].final_loss
    series: list[Series] = []
    for name, curves in arms.items():
        series += _arm_series(name, [curve for curve in curves if not curve.is_empty], styles[name])
    several = any(one.role == "seed" for one in series)
    arrow = None if target is None or len(arms) != 2 else _saved(report, key, target)
    dotted = "" if target is None else f"Dotted: {baseline}’s final loss. "
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
    ).explained()


def gap_figure(report: dict[str, Any], key: str) -> Figure:
    """Each arm's validation loss minus the baseline's of the same seed, with the 95 % band over seeds."""
    styles, baseline = arm_styles(report), str(report.get("baseline"))
    series: list[Series] = []
    for arm in report["summary"]:
        if arm[key] is None or arm["is_baseline"]:
            continue
        points = arm[key]["gap_curve"]
        if any(point["mean"] is not None for point in points):
            series.append(_mean_series(arm["name"], styles[arm["name"]], points, "+.4f"))
        else:  # a seed diverged: no mean, but what there is
            series += _seed_gaps(report, arm["name"], key, styles[arm["name"]])
    faint = "Faint: the seeds of an arm of which one diverged. " if any(one.role == "seed" for one in series) else ""
    series, bands = _bands(series)
    return Figure(
        name="gap-over-tokens",
        key=key,
        title=f"Difference to {baseline}, {LOSS_NAMES[key]}",
        caption=f"Below the dotted line: better than {baseline} after as many tokens. {bands}{faint}".strip(),
        x=TOKENS,
        y=Axis("difference, nats per token", range=_focus(series, [0.0])),
        series=tuple(series),
        level=0.0,
        level_name=baseline,
    ).explained()


def speedup_figure(report: dict[str, Any], key: str) -> Figure:
    """How many times fewer tokens each arm needs to the baseline's loss, at each of the baseline's points."""
    styles, baseline = arm_styles(report), str(report.get("baseline"))
    series = [
        _mean_series(arm["name"], styles[arm["name"]], arm[key]["speedup_curve"], ".3f")
        for arm in report["summary"]
        if arm[key] is not None and not arm["is_baseline"]
    ]
    series = [one for one in series if any(value is not None for value in one.y)]
    gaps = any(value is None for one in series for value in one.y)
    series, bands = _bands(series)
    caption = (
        f"Tokens that {baseline} needs to its loss at that point, over those that the arm needs. "
        f"{'No line where some seed does not reach that loss. ' if gaps else ''}"
        f"{bands}"
    )
    return Figure(
        name="speedup-over-tokens",
        key=key,
        title=f"Speed-up to {baseline}’s {LOSS_NAMES[key]}",
        caption=caption.strip(),
        x=Axis(f"training tokens of {baseline}"),
        y=Axis("speed-up in tokens", range=_focus(series, [1.0])),
        series=tuple(series),
        level=1.0,
        level_name=baseline,
    ).explained()


def _arm_series(name: str, curves: list[Curve], style: LineStyle) -> list[Series]:
    """The mean over seeds over faint seeds; of one seed its curve alone."""
    if not curves:
        return []
    mean, spread = mean_curve(curves)
    seeds = [_seed_series(name, curve, style) for curve in curves] if len(curves) > 1 else []
    hover = [
        "" if not np.isfinite(value) else f"{value:.4f}" + (f"{PLUS_MINUS}{std:.4f}" if np.isfinite(std) else "")
        for value, std in zip(mean.losses, spread, strict=True)
    ]
    return [*seeds, Series(name, "mean", style, mean.tokens.tolist(), _values(mean), hover=hover)]


def _seed_series(name: str, curve: Curve, style: LineStyle) -> Series:
    return Series(name, "seed", style, curve.tokens.tolist(), _values(curve))


def _mean_series(name: str, style: LineStyle, points: list[dict[str, Any]], form: str) -> Series:
    """An analysed curve of {"tokens", "mean", "interval"} with its band."""
    bounds = [point["interval"] or (None, None) for point in points]
    hover = []
    for point, (low, high) in zip(points, bounds, strict=True):
        bound = "at least " if point.get("status") == "lower bound" else ""
        mean = "" if point["mean"] is None else f"{bound}{point['mean']:{form}}"
        hover.append(mean if low is None else f"{mean} (95 %: {low:{form}} to {high:{form}})")
    return Series(
        name,
        "mean",
        style,
        [point["tokens"] for point in points],
        [point["mean"] for point in points],
        [low for low, _ in bounds],
        [high for _, high in bounds],
        hover,
    )


def _seed_gaps(report: dict[str, Any], name: str, key: str, style: LineStyle) -> list[Series]:
    references = baseline_by_seed(report)
    gaps = [
        gap_curve(read_curve(run, key), read_curve(references[run["seed"]], key))
        for run in runs_by_arm(report)[name]
        if run["seed"] in references
    ]
    return [_seed_series(name, gap, style) for gap in gaps if not gap.is_empty]


def _bands(series: list[Series]) -> tuple[list[Series], str]:
    """The series and what the caption says of their bands: of many arms they would hide each other."""
    if len(series) > MOST_BANDS:
        return [replace(one, low=(), high=()) for one in series], ""
    return series, BAND if any(value is not None for one in series for value in one.low) else ""


def _with_room(y_range: tuple[float, float] | None, arrow: Arrow | None) -> tuple[float, float] | None:
    if y_range is None or arrow is None:
        return y_range
    return min(y_range[0], arrow.y - ARROW_ROOM / (1 - ARROW_ROOM) * (y_range[1] - arrow.y)), y_range[1]


def _saved(report: dict[str, Any], key: str, target: float) -> Arrow | None:
    """From where the baseline reaches its final loss to where the best arm does, if that is earlier in every seed."""
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
    """The range of all that lies after `FOCUS_FROM` of the tokens, and of the levels."""
    start = FOCUS_FROM * max((one.x[-1] for one in series if len(one.x)), default=0.0)

    values = [v for one in series for x, v in zip(one.x, one.y, strict=True) if x >= start]
    bands = [v for one in series for c in (one.low, one.high) for x, v in zip(one.x, c, strict=False) if x >= start]
    return padded_range([*values, *levels], bands)
