"""The report's figures as Plotly specifications. Colours are CSS variables, resolved in the page for light and dark."""

from __future__ import annotations

from html import escape
from typing import Any

from vwn.lab.report.figures import Axis, Figure, Note, Series, finite_runs

Specification = dict[str, Any]

WIDTHS = {"mean": 2.25, "seed": 1.0, "points": 1.75, "ring": 0.0}
MARKERS = {"points": "circle", "ring": "circle-open"}


def plotly_figure(figure: Figure) -> Specification:
    """`{"data", "layout"}`; a trace's `meta` is the style index that the legend's buttons go by."""
    traces = [trace for series in figure.series for trace in _traces(series, bool(figure.x.ticks))]
    layout = _layout(figure)
    if figure.level is not None:
        layout["shapes"] = [_level(figure.level)]
    layout["annotations"] = [annotation for note in figure.notes for annotation in _note(note, figure)]
    if figure.remark:
        layout["annotations"].append(_remark(figure.remark))
    return {"data": traces, "layout": layout}


def _traces(series: Series, named_hover: bool) -> list[Specification]:
    band = [_band(series)] if series.role == "mean" and any(v is not None for v in series.low) else []
    return [*band, _trace(series, named_hover)]


def _trace(series: Series, named_hover: bool) -> Specification:
    # A lone point has no line to be seen.
    lone = len(series.x) == 1
    modes = {"points": "markers" if lone else "lines+markers", "ring": "markers"}
    trace: Specification = {
        "type": "scatter",
        "mode": modes.get(series.role, "markers" if lone else "lines"),
        # Plotly reads tags in names; it does not know the entities of quotes.
        "name": escape(series.name, quote=False),
        "meta": series.style.index,
        "x": list(series.x),
        "y": list(series.y),
        "line": {"color": series.style.css, "width": WIDTHS[series.role], "dash": series.style.dash},
        "marker": {
            "color": series.style.css,
            "size": 15 if series.role == "ring" else 8,
            "symbol": MARKERS.get(series.role, "circle"),
            "line": {"width": 2 if series.role == "ring" else 0, "color": series.style.css},
        },
    }
    if series.role == "seed":
        trace |= {"opacity": 0.35, "line": {"color": series.style.css, "width": 1}}
    if series.hover:
        trace["customdata"] = [escape(text, quote=False) for text in series.hover]
        trace["hovertemplate"] = "%{customdata}<extra></extra>" if named_hover else "%{customdata}"
    else:
        trace["hoverinfo"] = "skip"
    if series.role == "points" and any(value is not None for value in series.low):
        trace["error_y"] = _bars(series)
    return trace


def _bars(series: Series) -> Specification:
    rows = list(zip(series.y, series.low, series.high, strict=True))
    return {
        "type": "data",
        "symmetric": False,
        "array": [0 if y is None or high is None else high - y for y, _, high in rows],
        "arrayminus": [0 if y is None or low is None else y - low for y, low, _ in rows],
        **{"thickness": 1.25, "width": 5, "color": series.style.css},
    }


def _band(series: Series) -> Specification:
    """Closed outlines, one for each stretch that has bounds, parted by None."""
    x: list[float | None] = []
    y: list[float | None] = []
    for part in finite_runs(series.low, series.high):
        x += [*series.x[part], *reversed(series.x[part]), None]
        y += [*series.high[part], *reversed(series.low[part]), None]
    return {
        **{"type": "scatter", "mode": "lines", "fill": "toself", "hoverinfo": "skip", "opacity": 0.14},
        **{"x": x, "y": y, "meta": series.style.index, "fillcolor": series.style.css},
        "name": escape(series.name, quote=False),
        "line": {"width": 0, "color": series.style.css},
    }


def _level(value: float) -> Specification:
    return {
        "type": "line",
        **{"xref": "paper", "x0": 0, "x1": 1, "y0": value, "y1": value, "layer": "below"},
        "line": {"color": "var(--baseline)", "width": 1, "dash": "dot"},
    }


def _note(note: Note, figure: Figure) -> list[Specification]:
    """A ring on the place and its text below, on the side where curves have not come yet."""
    last = max((x for series in figure.series for x in series.x), default=note.x)
    anchor = "right" if note.x > 0.3 * last else "left"
    place = {"x": note.x, "y": note.y, "showarrow": False}
    text = "<br>".join(escape(line, quote=False) for line in note.lines)
    about = {
        "xanchor": anchor,
        "yanchor": "top",
        "align": anchor,
        "yshift": -6,
        "font": {"color": "var(--ink)", "size": 12},
    }
    return [{**place, "text": "●", "font": {"color": "var(--ink)", "size": 11}}, {**place, **about, "text": text}]


def _remark(text: str) -> Specification:
    place = {"xref": "paper", "yref": "paper", "x": 1, "y": 1, "xanchor": "right", "yanchor": "top", "showarrow": False}
    return {**place, "text": escape(text, quote=False), "font": {"color": "var(--ink)", "size": 12}}


def _layout(figure: Figure) -> Specification:
    return {
        "xaxis": _x_axis(figure.x),
        "yaxis": _axis(figure.y) | ({} if figure.y.range is None else {"range": list(figure.y.range)}),
        "font": {"family": "inherit", "size": 13, "color": "var(--muted)"},
        "paper_bgcolor": "var(--paper)",
        # Not transparent: the hover line takes its outline from it.
        "plot_bgcolor": "var(--paper)",
        "hovermode": "closest" if figure.x.ticks else "x unified",
        "hoverlabel": {
            "namelength": 40,
            **{"bgcolor": "var(--raised)", "bordercolor": "var(--rule)"},
            "font": {"color": "var(--ink)"},
        },
        "showlegend": False,
        # Keeps a reader's zoom when the page redraws.
        "uirevision": "kept",
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "var(--muted)", "activecolor": "var(--ink)"},
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
    }


def _axis(axis: Axis) -> Specification:
    return {
        **{"gridcolor": "var(--rule)", "linecolor": "var(--rule)", "zeroline": False, "automargin": True},
        "title": {"text": escape(axis.title, quote=False), "standoff": 10, "font": {"size": 13}},
    }


def _x_axis(axis: Axis) -> Specification:
    if axis.ticks:
        places = [place for place, _ in axis.ticks]
        return _axis(axis) | {"tickmode": "array", "tickvals": places, "ticktext": [label for _, label in axis.ticks]}
    return _axis(axis) | {
        "unifiedhovertitle": {"text": "%{x:.4~s} tokens"},
        **{"spikecolor": "var(--muted)", "spikethickness": 1},
        **{"tickformat": "~s", "hoverformat": ".4~s", "rangemode": "tozero", "nticks": 6},
    }
