"""The report's plots as Plotly specifications. Colours are CSS variables, resolved in the page for light and dark."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from vwn.compare.analysis import Curve, baseline_by_seed, gap_curve, has_loss, mean_curve, read_curve, runs_by_arm

Figure = dict[str, Any]

ARM_COLOURS = 7
DASHES = ("solid", "dash", "dot")
# The steep start would flatten everything of interest; a double click in the plot shows it.
FOCUS_FROM = 0.25


@dataclass(frozen=True)
class LineStyle:
    """How an arm is drawn everywhere: its place among the arms, a CSS colour variable and a Plotly dash."""

    index: int
    colour: str
    dash: str


def arm_styles(report: dict[str, Any]) -> dict[str, LineStyle]:
    """Arm name -> line style; the baseline has the neutral colour; up to 21 others all look different."""
    styles = {}
    others = 0
    for index, name in enumerate(runs_by_arm(report)):
        if name == report.get("baseline"):
            styles[name] = LineStyle(index, "var(--baseline)", "solid")
        else:
            dash = DASHES[others // ARM_COLOURS % len(DASHES)]
            styles[name] = LineStyle(index, f"var(--arm-{others % ARM_COLOURS})", dash)
            others += 1
    return styles


def loss_figure(report: dict[str, Any], key: str) -> Figure:
    """Validation loss (`"loss"` or `"loss_2"`, nats per token) over training tokens; a dotted line at the target."""
    curves = {
        name: [read_curve(run, key) for run in runs if has_loss(run, key)] for name, runs in runs_by_arm(report).items()
    }
    target = mean_curve(curves.get(str(report.get("baseline")), []))[0].final_loss
    return _figure(report, curves, "validation loss, nats per token", target)


def gap_figure(report: dict[str, Any], key: str) -> Figure:
    """Each arm's validation loss minus the baseline's of the same seed, over training tokens."""
    references = baseline_by_seed(report)
    gaps = {
        name: [
            gap_curve(read_curve(run, key), read_curve(references[run["seed"]], key))
            for run in runs
            if run["seed"] in references
        ]
        for name, runs in runs_by_arm(report).items()
        if name != report.get("baseline")
    }
    return _figure(report, gaps, "difference, nats per token", 0.0)


def is_empty(figure: Figure) -> bool:
    """Whether there is no finite point to draw."""
    return not any(value is not None for trace in figure["data"] for value in trace["y"])


def hides_points(figure: Figure) -> bool:
    """Whether some points lie outside the part that is shown at first."""
    low, high = figure["layout"]["yaxis"].get("range", (-np.inf, np.inf))
    return any(value is not None and not low <= value <= high for trace in figure["data"] for value in trace["y"])


def _figure(report: dict[str, Any], arms: dict[str, list[Curve]], y_title: str, level: float | None) -> Figure:
    """Arm name -> its curves over seeds, as faint lines under their mean; a dotted line at `level`."""
    styles = arm_styles(report)
    data: list[Figure] = []
    for name, seeds in arms.items():
        curves = [curve for curve in seeds if not curve.is_empty]
        if not curves:
            continue
        mean, spread = mean_curve(curves)
        data += [_seed_trace(name, curve, styles[name]) for curve in curves] if len(curves) > 1 else []
        data.append(_mean_trace(name, mean, spread, styles[name]))
    every = [curve for seeds in arms.values() for curve in seeds]
    layout = _layout(y_title, _focus_range(every, level))
    return {"data": data, "layout": layout if level is None else {**layout, "shapes": [_level(level)]}}


def _mean_trace(name: str, mean: Curve, spread: np.ndarray, style: LineStyle) -> Figure:
    return {
        **_trace(name, mean, style),
        "line": {"color": style.colour, "width": 2.25, "dash": style.dash},
        "customdata": [f" ± {value:.4f}" if np.isfinite(value) else "" for value in spread],
        "hovertemplate": "%{y:.4f}%{customdata}",
    }


def _seed_trace(name: str, curve: Curve, style: LineStyle) -> Figure:
    return {
        **_trace(name, curve, style),
        "line": {"color": style.colour, "width": 1},
        "opacity": 0.35,
        "hoverinfo": "skip",
    }


def _trace(name: str, curve: Curve, style: LineStyle) -> Figure:
    return {
        "type": "scatter",
        # A lone point has no line to be seen.
        "mode": "lines" if curve.tokens.size > 1 else "markers",
        "marker": {"color": style.colour, "size": 8},
        # Plotly reads tags in names; it does not know the entities of quotes.
        "name": escape(name, quote=False),
        "meta": style.index,
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
            "unifiedhovertitle": {"text": "%{x:.4~s} tokens"},
            **{"spikecolor": "var(--muted)", "spikethickness": 1},
            **{"tickformat": "~s", "hoverformat": ".4~s", "rangemode": "tozero", "nticks": 6},
        },
        "yaxis": y_axis if y_range is None else {**y_axis, "range": y_range},
        "font": {"family": "inherit", "size": 13, "color": "var(--muted)"},
        "paper_bgcolor": "var(--paper)",
        # Not transparent: the hover line takes its outline from it.
        "plot_bgcolor": "var(--paper)",
        "hovermode": "x unified",
        "hoverlabel": {"bgcolor": "var(--raised)", "bordercolor": "var(--rule)", "font": {"color": "var(--ink)"}},
        "showlegend": False,
        # Keeps a reader's zoom when the page redraws.
        "uirevision": "kept",
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "var(--muted)", "activecolor": "var(--ink)"},
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
    }


def _axis_title(text: str) -> Figure:
    return {"text": text, "standoff": 10, "font": {"size": 13}}


def _focus_range(curves: list[Curve], level: float | None) -> list[float] | None:
    """The range of all that lies after `FOCUS_FROM` of the tokens, and of the dotted line."""
    budget = max((curve.tokens[-1] for curve in curves if not curve.is_empty), default=0.0)
    late = [curve.losses[curve.tokens >= FOCUS_FROM * budget] for curve in curves]
    values = np.concatenate([*late, [] if level is None else [level]])
    values = values[np.isfinite(values)]
    if values.size == 0 or values.min() == values.max():
        return None
    pad = 0.06 * float(values.max() - values.min())
    return [float(values.min()) - pad, float(values.max()) + pad]
