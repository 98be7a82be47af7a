"""Figures over arms: the width law, the fraction rate, multi-token prediction, the sweep (figures 4 and 6 to 8)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import log2
from typing import Any

import numpy as np

from vwn.lab.analysis.runs import is_generalized, read_curve, runs_by_arm
from vwn.lab.analysis.wording import LOSS_NAMES, interval
from vwn.lab.report.figures import (
    INK_STYLE,
    PAPER_STYLE,
    Axis,
    Figure,
    LineStyle,
    Series,
    arm_styles,
    padded_range,
)

MOST_TICKS = 7
BARS = "Bars: 95\u00a0% interval of the paired difference (Student’s t). "
# Of the law's lines, so that the band of a line that turns about its centre has a waist.
LAW_POINTS = 33


def width_law_figure(report: dict[str, Any], key: str) -> Figure | None:
    """Final loss over log2 r with the fitted line, beside the paper's slope (figures 6 and 7); None without a fit."""
    fit = report["scaling"][key]
    if fit is None or fit["slope"] is None:
        return None
    paper, slope = report["scaling"]["paper"], fit["slope"]
    x = np.log2(fit["widths"])
    losses = np.array(fit["losses"])
    centre, level = float(x.mean()), float(losses.mean())
    ends = np.linspace(x.min(), x.max(), LAW_POINTS)
    line, law = (level + b * (ends - centre) for b in (slope["mean"], paper["slope"]))
    series = [*_shifted_seeds(report, key, fit, x, level)]
    series.append(
        Series(
            f"the paper’s slope, {paper['slope']}".replace("-", "−"), "mean", PAPER_STYLE, _floats(ends), _floats(law)
        )
    )
    low: list[float] = []
    high: list[float] = []
    if slope["interval"] is None:
        about = "One seed: no band. "
    else:
        edges = np.stack([level + b * (ends - centre) for b in slope["interval"]])
        low, high = _floats(edges.min(axis=0)), _floats(edges.max(axis=0))
        about = "Band: 95\u00a0% interval of the slope over seeds (Student’s t), turned about the centre. "
    series.append(Series("least-squares fit", "mean", INK_STYLE, _floats(ends), _floats(line), low, high))
    styles = arm_styles(report)
    series += [
        Series(name, "points", styles[name], [place], [loss], hover=[f"{name}, r = {r:.4g}: {loss:.4f}"])
        for name, place, loss, r in zip(fit["arms"], _floats(x), fit["losses"], fit["widths"], strict=True)
    ]
    values = [value for one in series for value in one.y]
    r2 = "" if fit["r2"] is None else f", R² {fit['r2']:.3f}"
    seeds = (
        "Faint: each seed, moved to the common mean, as the fit is made within seeds. " if len(fit["seeds"]) > 1 else ""
    )
    return Figure(
        name="loss-over-width",
        key=key,
        title=f"Final {LOSS_NAMES[key]} over the virtual width",
        caption=f"{about}{seeds}The baseline is not in the fit. The paper’s slope is drawn through the same centre.",
        x=Axis("virtual width factor r (logarithmic)", _ticks({log2(r): f"{r:.4g}" for r in fit["widths"]})),
        y=Axis("final loss, nats per token", range=padded_range(values, [*low, *high])),
        series=tuple(series),
        remark=f"{slope['mean']:+.4f} per doubling of r{r2}".replace("-", "−"),
    )


def fraction_rate_figure(report: dict[str, Any], key: str) -> Figure | None:
    """Final loss minus the baseline's over m at fixed r (figure 8); None without three m of one r."""
    families: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for arm in _measured(report, key):
        if is_generalized(runs_by_arm(report)[arm["name"]][0], report.get("baseline")) and arm["n"] > arm["m"]:
            families[arm["r"], arm["embedding"], arm["mtp"]].append(arm)
    families = {kind: arms for kind, arms in families.items() if len({arm["m"] for arm in arms}) >= 3}
    series, styles = [], arm_styles(report)
    for (r, *_), arms in families.items():
        arms = sorted(arms, key=lambda arm: arm["m"])
        places = [log2(arm["m"]) for arm in arms]
        series.append(_against_baseline(report, key, f"r = {r:.4g}", styles[arms[0]["name"]], arms, places))
    ticks = _ticks({log2(arm["m"]): str(arm["m"]) for arms in families.values() for arm in arms})
    return _difference_figure(
        report,
        key,
        "loss-over-fraction-rate",
        "over the fraction rate",
        Axis("segments m (logarithmic)", ticks),
        series,
    )


def mtp_figure(report: dict[str, Any], key: str) -> Figure | None:
    """Final loss with and without multi-token prediction, for each width (figure 4); None without both."""
    families: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for arm in _measured(report, key):
        if arm["mtp"] is not None:
            families[arm["connection"], arm["m"], arm["n"], arm["embedding"]].append(arm)
    families = {kind: arms for kind, arms in families.items() if len({arm["mtp"] for arm in arms}) >= 2}
    series, styles = [], arm_styles(report)
    for arms in families.values():
        arms = sorted(arms, key=lambda arm: arm["mtp"])
        places = [float(arm["mtp"]) for arm in arms]
        series.append(_against_baseline(report, key, arms[0]["name"], styles[arms[0]["name"]], arms, places))
    depths = {float(arm["mtp"]): str(arm["mtp"]) if arm["mtp"] else "0 (off)" for f in families.values() for arm in f}
    axis = Axis("multi-token prediction depth", _ticks(depths))
    return _difference_figure(report, key, "loss-over-mtp", "and multi-token prediction", axis, series)


def sweep_figure(report: dict[str, Any]) -> Figure | None:
    """The criterion of the sweep's runs over the learning rate; None without a sweep."""
    styles, series, rates = arm_styles(report), [], []
    for entry in report.get("sweep") or []:
        tried = [rate for rate in entry["rates"] if rate["loss"] is not None]
        style = styles.get(entry["arm"])
        if not tried or style is None:
            continue
        name, places = entry["arm"], [log2(rate["learning_rate"]) for rate in tried]
        losses = [rate["loss"] for rate in tried]
        hover = [f"{name} at {rate['learning_rate']:.3g}: {rate['loss']:.4f}" for rate in tried]
        series.append(Series(name, "points", style, places, losses, hover=hover))
        best = [
            (p, y) for p, y, rate in zip(places, losses, tried, strict=True) if rate["learning_rate"] == entry["best"]
        ]
        series.append(Series(name, "ring", style, [p for p, _ in best], [y for _, y in best]))
        rates += [rate["learning_rate"] for rate in tried]
    if not series:
        return None
    values = [value for one in series if one.role == "points" for value in one.y if value is not None]
    at_best = [value for one in series if one.role == "ring" for value in one.y if value is not None]
    # A rate that all but diverged would flatten the rest.
    far = min(at_best) + 4 * max(float(np.median(values)) - min(at_best), max(at_best) - min(at_best))
    near = [value for value in values if value <= far]
    return Figure(
        name="sweep",
        key="loss",
        title="Learning-rate sweep",
        caption="Ring: the rate chosen for the measured runs. The sweep has another seed and a shorter budget; its "
        "criterion is the loss that was trained on, so arms with and without MTP are not comparable here.",
        x=Axis("peak learning rate (logarithmic)", _ticks({log2(rate): f"{rate:.3g}" for rate in rates})),
        y=Axis("criterion, nats per token", range=padded_range(near)),
        series=tuple(series),
    ).explained()


def _measured(report: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """Arms with this loss that ended at a number, or the baseline."""
    return [
        arm
        for arm in report["summary"]
        if arm[key] is not None and (arm["is_baseline"] or arm[key]["difference"]["mean"] is not None)
    ]


def _against_baseline(
    report: dict[str, Any], key: str, name: str, style: LineStyle, arms: list[dict[str, Any]], places: list[float]
) -> Series:
    """The paired difference of each arm to the baseline with its 95 % interval."""
    means, bounds, hover = [], [], []
    for arm in arms:
        if arm["is_baseline"]:
            means.append(0.0)
            bounds.append((None, None))
            hover.append(f"{arm['name']}: the baseline")
            continue
        cell = report["pairwise"][key][arm["name"]][report["baseline"]]
        found = cell["difference"]
        means.append(found["mean"])
        bounds.append(tuple(found["interval"] or (None, None)))
        hover.append(f"{arm['name']}: {interval(found, '+.4f')}")
    return Series(name, "points", style, places, means, [b[0] for b in bounds], [b[1] for b in bounds], hover)


def _difference_figure(
    report: dict[str, Any], key: str, name: str, what: str, axis: Axis, series: Sequence[Series]
) -> Figure | None:
    if not any(len(one.x) > 1 for one in series):
        return None
    bounds = [value for one in series for value in (*one.low, *one.high)]
    values = [0.0, *(value for one in series for value in one.y)]
    baseline = report.get("baseline")
    y_range = padded_range(values, bounds)
    cut = y_range is not None and any(b is not None and not y_range[0] <= b <= y_range[1] for b in bounds)
    return Figure(
        name=name,
        key=key,
        title=f"Final {LOSS_NAMES[key]} {what}",
        caption=f"Dotted: {baseline}. {BARS if any(b is not None for b in bounds) else 'One seed: no intervals. '}"
        f"{'Bars that reach out of the figure are cut off.' if cut else ''}".strip(),
        x=axis,
        y=Axis(f"final loss minus {baseline}’s, nats per token", range=y_range),
        series=tuple(series),
        level=0.0,
        level_name=str(baseline),
    )


def _shifted_seeds(report: dict[str, Any], key: str, fit: dict[str, Any], x: np.ndarray, level: float) -> list[Series]:
    """Each seed's final losses with its mean over the widths moved to `level`."""
    if len(fit["seeds"]) < 2:
        return []
    order, arms, found = np.argsort(x), runs_by_arm(report), []
    for seed in fit["seeds"]:
        runs = [next(run for run in arms[name] if run["seed"] == seed) for name in fit["arms"]]
        losses = np.array([read_curve(run, key).final_loss for run in runs], dtype=np.float64)
        losses += level - losses.mean()
        found.append(Series(f"seed {seed}", "seed", INK_STYLE, _floats(x[order]), _floats(losses[order])))
    return found


def _ticks(labels: dict[float, str]) -> tuple[tuple[float, str], ...]:
    """In order; only every other one, and so on, if they are too many to be read."""
    ordered = sorted(labels.items())
    return tuple(ordered[:: -(-len(ordered) // MOST_TICKS) or 1])


def _floats(values: np.ndarray) -> list[float]:
    return [float(value) for value in values]


FIGURES_OVER_ARMS = (width_law_figure, fraction_rate_figure, mtp_figure)
