"""The report's figures as SVG: one drawing for the page and for the files beside it.

A point's values are in a `<title>`, which browsers show on hovering.
"""

from __future__ import annotations

import io
import re
import warnings
from html import escape
from typing import Any

import numpy as np

from vwn.lab.analysis.wording import printable
from vwn.lab.report.colours import LIGHT
from vwn.lab.report.figures import Arrow, Figure, Series

# Inches: a column of a paper.
WIDTH, HEIGHT, LEGEND_LINE = 3.3, 2.45, 0.15
LONGEST_NAME = 30
DASHES: dict[str, Any] = {"solid": "-", "dash": (0, (5, 2)), "dot": (0, (1.2, 1.6))}
# One for each arm, besides its colour, for readers and printers without colours.
MARKERS = "osD^vPX<>*hp"
MARKED_POINTS = 7
# The dotted line's place among the style indices in a legend: last.
LEVEL = 10_000
POINTS_PER_INCH = 72
STYLE: Any = {
    **{"font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 7.5},
    **{"axes.labelsize": 7.5, "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 7},
    **{"axes.edgecolor": LIGHT["muted"], "axes.labelcolor": LIGHT["ink"], "text.color": LIGHT["ink"]},
    **{"xtick.color": LIGHT["muted"], "ytick.color": LIGHT["muted"], "axes.linewidth": 0.6},
    **{"xtick.labelcolor": LIGHT["ink"], "ytick.labelcolor": LIGHT["ink"]},
    **{"xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.major.size": 2.5, "ytick.major.size": 2.5},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": LIGHT["rule"]},
    **{"grid.linewidth": 0.5, "axes.axisbelow": True, "lines.linewidth": 1.3},
    # A dollar sign in an arm's name is no formula; text stays text; ids do not change from run to run.
    **{"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "vwn"},
    **{"savefig.facecolor": LIGHT["paper"], "axes.facecolor": LIGHT["paper"]},
}


def draw(figure: Figure) -> str:
    """Return the figure as the text of an SVG file, in the colours of light mode."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    named = {index: _name(series.name) for index, series in sorted(figure.legend.items())}
    if figure.level is not None:
        named[LEVEL] = _name(figure.level_name)
    # About as many characters as fit beside each other.
    columns = max(1, min(len(named), int(WIDTH / (0.42 + 0.062 * max(map(len, named.values()))))))
    lines = -(-len(named) // columns)
    content = io.StringIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # Scripts that the font lacks cannot be measured; the reader's browser has them.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        canvas = Canvas(figsize=(WIDTH, HEIGHT + LEGEND_LINE * lines), dpi=POINTS_PER_INCH, layout="constrained")
        axes = canvas.subplots()
        handles = _draw_panel(axes, figure)
        layout: Any = {"loc": "outside lower center", "ncols": columns, "frameon": False, "borderpad": 0.1}
        spaces: Any = {"handlelength": 2.4, "columnspacing": 1.2, "handletextpad": 0.5, "labelspacing": 0.3}
        canvas.legend([handles[index] for index in named], list(named.values()), **layout, **spaces)
        canvas.savefig(content, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        hovers = _hovers(figure, axes)
    svg = re.sub(r' (d|transform|x|y)="[^"]*"', _rounded, content.getvalue())
    return svg.replace("</svg>", f'<g class="hover" fill-opacity="0">{hovers}</g>\n</svg>')


def inline(svg: str, identifier: str, label: str) -> str:
    """Return an SVG of `draw` as an element of the page: its colours are CSS variables, its ids its own."""
    body = svg[svg.index("<svg") :]
    for name, colour in LIGHT.items():
        body = body.replace(f": {colour}", f": var(--{name})")
    used = set(re.findall(r"#([\w-]+)", body))
    body = re.sub(r' id="([^"]*)"', lambda match: f' id="{identifier}-{match[1]}"' if match[1] in used else "", body)
    body = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{identifier}-", body)
    head = f'<svg id="{identifier}" role="img" aria-label="{escape(label)}"'
    start, rest = body.split(">", 1)
    return re.sub(r' (width|height)="[^"]*"', "", start).replace("<svg", head, 1) + ">" + rest


def _draw_panel(axes: Any, figure: Figure) -> dict[int, Any]:
    """Draw everything but the legend; the handle of each style index."""
    handles: dict[int, Any] = {}
    for order, series in enumerate(figure.series):
        line = _draw_series(axes, series, 2 + order)
        if figure.legend.get(series.style.index) is series:
            handles.setdefault(series.style.index, line)
    if figure.level is not None:
        level = axes.axhline(figure.level, color=LIGHT["baseline"], linewidth=0.9, linestyle=(0, (1, 1.5)), zorder=1.5)
        handles.setdefault(LEVEL, level)
    axes.set_xlabel(figure.x.title)
    axes.set_ylabel(figure.y.title)
    if figure.x.ticks:
        axes.set_xticks([place for place, _ in figure.x.ticks], [label for _, label in figure.x.ticks])
        axes.margins(x=0.08)
    else:
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(lambda value, _: tokens_label(value))
        axes.locator_params(axis="x", nbins=5)
    if figure.y.range is not None:
        axes.set_ylim(figure.y.range)
    if figure.axis_break is not None:
        cut: Any = {
            "ha": "center",
            "va": "center",
            "transform": axes.get_xaxis_transform(),
            "fontsize": 9,
            "zorder": 60,
        }
        axes.text(figure.axis_break, 0, "//", **cut, bbox={"facecolor": LIGHT["paper"], "linewidth": 0, "pad": 0.4})
    if figure.arrow is not None:
        _draw_arrow(axes, figure.arrow)
    return handles


def _draw_series(axes: Any, series: Series, order: int) -> Any:
    colour = LIGHT[series.style.colour]
    x, y = np.array(series.x, dtype=float), np.array(series.y, dtype=float)
    look: dict[str, Any] = {"color": colour, "zorder": order, "linestyle": DASHES[series.style.dash]}
    if series.role == "ring":
        return axes.plot(x, y, "o", color=colour, markersize=6, fillstyle="none", zorder=order)[0]
    if series.role == "mark":
        return axes.plot(x, y, "*", color=colour, markersize=9, markeredgewidth=0, zorder=order)[0]
    if series.role == "seed":
        return axes.plot(x, y, **look | {"linewidth": 0.5, "alpha": 0.4, "linestyle": "-"})[0]
    if any(value is not None for value in series.low):
        _draw_bounds(axes, series, x, colour)
    is_arm = series.style.index < len(MARKERS)
    marker = MARKERS[series.style.index % len(MARKERS)] if is_arm or series.role == "points" or x.size == 1 else None
    every = max(1, x.size // MARKED_POINTS) if series.role == "mean" else 1
    size = 4.5 if series.role == "points" else 3.5
    # Each arm's markers at points of their own, where lines lie on one another.
    start = series.style.index % every
    line = axes.plot(x, y, **look, marker=marker, markevery=(start, every), markeredgewidth=0, markersize=size)[0]
    if any(series.hollow):
        hollow = np.array(series.hollow)
        inside: Any = {"color": LIGHT["paper"], "markeredgewidth": 0, "markersize": size - 1.8, "zorder": order + 0.5}
        axes.plot(x[hollow], y[hollow], marker=marker, linestyle="none", **inside)
    return line


def _draw_bounds(axes: Any, series: Series, x: np.ndarray, colour: str) -> None:
    """Draw the bounds; matplotlib leaves out those that are NaN."""
    low, high = np.array(series.low, dtype=float), np.array(series.high, dtype=float)
    if series.role == "mean":
        axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0, zorder=1)
    else:
        axes.vlines(x, low, high, color=colour, linewidth=0.9, zorder=1.8)


def _draw_arrow(axes: Any, arrow: Arrow) -> None:
    style: Any = {"arrowstyle": "-|>", "color": LIGHT["ink"], "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (arrow.end, arrow.y), (arrow.start, arrow.y), arrowprops=style, zorder=50)
    below: Any = {"xytext": (-2, -4), "textcoords": "offset points", "ha": "right", "va": "top", "zorder": 50}
    axes.annotate(_name(arrow.text), (arrow.end, arrow.y), **below)


def _hovers(figure: Figure, axes: Any) -> str:
    """Return invisible circles on the points that have a text, in the SVG's own coordinates."""
    height = axes.figure.get_size_inches()[1] * POINTS_PER_INCH
    found = []
    for series in figure.series:
        for x, y, text in zip(series.x, series.y, series.hover, strict=False):
            if y is None or not text or not axes.get_ylim()[0] <= y <= axes.get_ylim()[1]:
                continue
            left, bottom = axes.transData.transform((x, y))
            if not figure.x.ticks:
                text = f"{series.name} at {tokens_label(x)} tokens: {text}"
            title = escape(printable(text.replace("-", "−")), quote=False)
            found.append(f'<circle cx="{left:.1f}" cy="{height - bottom:.1f}" r="4"><title>{title}</title></circle>')
    return "\n".join(found)


def tokens_label(value: float) -> str:
    """Write `0`, `500k`, `1.5M`, `2G`."""
    for step, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= step:
            return f"{value / step:.4g}{unit}"
    return f"{value:g}"


def _rounded(attribute: re.Match[str]) -> str:
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), attribute[0])


def _name(text: str) -> str:
    clean = printable(text)
    return clean if len(clean) <= LONGEST_NAME else f"{clean[: LONGEST_NAME - 1]}…"
