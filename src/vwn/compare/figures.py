"""The report's plots as Plotly specifications. Colours are CSS variables, resolved in the page for light and dark."""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np

from vwn.compare.analysis import Curve, baseline_by_seed, gap_curve, has_loss, mean_curve, read_curve, runs_by_arm

Figure = dict[str, Any]

ARM_COLOURS = 7
DASHES = ("solid", "dash", "dot", "dashdot")
# The steep start would flatten everything of interest; a double click in the plot shows it.
FOCUS_FROM = 0.25


def arm_colours(report: dict[str, Any]) -> dict[str, str]:
    """Arm name -> CSS colour variable; the baseline has the neutral one."""
    others = [name for name in runs_by_arm(report) if name != report.get("baseline")]
    colours = {name: f"var(--arm-{index % ARM_COLOURS})" for index, name in enumerate(others)}
    return {str(report.get("baseline")): "var(--baseline)", **colours}


def loss_figure(report: dict[str, Any], key: str) -> Figure:
    """Validation loss (`"loss"` or `"loss_2"`, nats per token) over training tokens; a dotted line at the target."""
    curves = _curves(report, key)
    baseline = curves.get(str(report.get("baseline")), [])
    target = mean_curve(curve for _, curve in baseline)[0].final_loss
    figure = _figure(report, curves, "validation loss, nats per token")
    if target is not None:
        figure["layout"]["shapes"] = [_level(target)]
    return figure


def gap_figure(report: dict[str, Any], key: str) -> Figure:
    """Each arm's validation loss minus the baseline's of the same seed, over training tokens."""
    references = baseline_by_seed(report)
    gaps = {
        name: [(seed, gap_curve(curve, read_curve(references[seed], key))) for seed, curve in arm if seed in references]
        for name, arm in _curves(report, key).items()
        if name != report.get("baseline")
    }
    figure = _figure(report, gaps, "difference, nats per token")
    figure["layout"]["shapes"] = [_level(0.0)]
    return figure


def is_empty(figure: Figure) -> bool:
    """Whether there is no finite point to draw."""
    return not any(value is not None for trace in figure["data"] for value in trace["y"])


def _curves(report: dict[str, Any], key: str) -> dict[str, list[tuple[int, Curve]]]:
    return {
        name: [(run["seed"], read_curve(run, key)) for run in runs if has_loss(run, key)]
        for name, runs in runs_by_arm(report).items()
    }


def _figure(report: dict[str, Any], arms: dict[str, list[tuple[int, Curve]]], y_title: str) -> Figure:
    colours = arm_colours(report)
    data: list[Figure] = []
    means = []
    for index, (name, seeds) in enumerate(arms.items()):
        curves = [curve for _, curve in seeds if not curve.is_empty]
        if not curves:
            continue
        mean, spread = mean_curve(curves)
        means.append(mean)
        data += [_seed_trace(name, curve, colours[name]) for curve in curves] if len(curves) > 1 else []
        data.append(_mean_trace(name, mean, spread, colours[name], DASHES[index // (ARM_COLOURS + 1) % len(DASHES)]))
    every = [curve for seeds in arms.values() for _, curve in seeds]
    return {"data": data, "layout": _layout(y_title, _focus_range(means, every))}


def _mean_trace(name: str, mean: Curve, spread: np.ndarray, colour: str, dash: str) -> Figure:
    return {
        **_trace(name, mean, colour),
        "line": {"color": colour, "width": 2.25, "dash": dash},
        "customdata": [f" ± {value:.4f}" if np.isfinite(value) else "" for value in spread],
        "hovertemplate": "%{y:.4f}%{customdata}",
    }


def _seed_trace(name: str, curve: Curve, colour: str) -> Figure:
    line = {"color": colour, "width": 1}
    return {**_trace(name, curve, colour), "line": line, "opacity": 0.35, "showlegend": False, "hoverinfo": "skip"}


def _trace(name: str, curve: Curve, colour: str) -> Figure:
    return {
        "type": "scatter",
        # A lone point has no line to be seen.
        "mode": "lines" if curve.tokens.size > 1 else "markers",
        "marker": {"color": colour},
        "name": escape(name),
        "legendgroup": escape(name),
        "x": curve.tokens.tolist(),
        "y": [float(value) if np.isfinite(value) else None for value in curve.losses],
    }


def _level(value: float) -> Figure:
    return {
        "type": "line",
        **{"xref": "paper", "x0": 0, "x1": 1, "y0": value, "y1": value, "layer": "below"},
        "line": {"color": "var(--baseline)", "width": 1, "dash": "dot"},
    }


def _layout(y_title: str, y_range: list[float] | None) -> Figure:
    axis = {"gridcolor": "var(--rule)", "linecolor": "var(--rule)", "zeroline": False, "automargin": True}
    y_axis = {**axis, "title": _axis_title(y_title)}
    return {
        "xaxis": {
            **axis,
            "title": _axis_title("training tokens"),
            **{"tickformat": "~s", "hoverformat": ".4~s", "rangemode": "tozero", "nticks": 6},
        },
        "yaxis": y_axis if y_range is None else {**y_axis, "range": y_range},
        "font": {"family": "inherit", "size": 13, "color": "var(--muted)"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hovermode": "x unified",
        "hoverlabel": {"bgcolor": "var(--raised)", "bordercolor": "var(--rule)", "font": {"color": "var(--ink)"}},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
        "showlegend": True,
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "var(--muted)", "activecolor": "var(--ink)"},
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
    }


def _axis_title(text: str) -> Figure:
    return {"text": text, "standoff": 10, "font": {"size": 13}}


def _focus_range(means: list[Curve], every: list[Curve]) -> list[float] | None:
    """From just below the lowest point of any curve to just above the mean curves at `FOCUS_FROM` of the tokens."""
    budget = max((curve.tokens[-1] for curve in means if not curve.is_empty), default=0.0)
    late = [curve.losses[curve.tokens >= FOCUS_FROM * budget] for curve in [*means, *every] if not curve.is_empty]
    late = [losses[np.isfinite(losses)] for losses in late]
    values = np.concatenate(late) if late else np.empty(0)
    if values.size == 0 or values.min() == values.max():
        return None
    pad = 0.06 * float(values.max() - values.min())
    return [float(values.min()) - pad, float(values.max()) + pad]
