"""The report's figures as PNG and SVG files for a paper, in the colours of the page's light mode."""

from __future__ import annotations

import io
import warnings
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np

from vwn.lab.report.figures import Figure, Note, Series, finite_runs
from vwn.lab.report.page_assets import LIGHT

# Inches: one and two columns of a paper.
COLUMN, BOTH_COLUMNS, HEIGHT, LEGEND_LINE = 3.3, 6.8, 2.45, 0.15
DPI = 300
LONGEST_NAME = 30
DASHES: dict[str, Any] = {"solid": "-", "dash": (0, (5, 2)), "dot": (0, (1.2, 1.6))}
# One for each arm, besides its colour, for readers and printers without colours.
MARKERS = "osD^vPX<>*hp"
MARKED_POINTS = 7
# The dotted line's place among the style indices in a legend: last.
LEVEL = 10_000
STYLE: Any = {
    **{"font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 7.5, "axes.titlesize": 8},
    **{"axes.labelsize": 7.5, "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 7},
    **{"axes.edgecolor": LIGHT["muted"], "axes.labelcolor": LIGHT["ink"], "text.color": LIGHT["ink"]},
    **{"xtick.color": LIGHT["muted"], "ytick.color": LIGHT["muted"], "axes.linewidth": 0.6},
    **{"xtick.labelcolor": LIGHT["ink"], "ytick.labelcolor": LIGHT["ink"]},
    **{"xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.major.size": 2.5, "ytick.major.size": 2.5},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": LIGHT["rule"]},
    **{"grid.linewidth": 0.5, "axes.axisbelow": True, "lines.linewidth": 1.3},
    # A dollar sign in an arm's name is no formula; the ids in an SVG do not change from run to run.
    **{"text.parse_math": False, "svg.hashsalt": "vwn", "savefig.facecolor": "white"},
}


def draw_files(figures: Iterable[Figure]) -> dict[str, bytes]:
    """File name -> content, a PNG and an SVG for each name of a figure; figures of one name are side by side."""
    import matplotlib

    named: dict[str, list[Figure]] = defaultdict(list)
    for figure in figures:
        named[figure.name].append(figure)
    files = {}
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # Names in scripts that the font lacks are drawn as boxes; the page has them.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        for name, panels in named.items():
            canvas = _draw(panels)
            for form, options in (("png", {"metadata": {"Software": None}}), ("svg", {"metadata": {"Date": None}})):
                content = io.BytesIO()
                canvas.savefig(content, format=form, dpi=DPI, **options)
                files[f"{name}.{form}"] = content.getvalue()
    return files


def _draw(panels: list[Figure]) -> Any:
    from matplotlib.figure import Figure as Canvas

    width = COLUMN if len(panels) == 1 else BOTH_COLUMNS
    shown = {index: series for panel in reversed(panels) for index, series in panel.legend.items()}
    named = {index: _name(series.name) for index, series in sorted(shown.items())}
    if panels[0].level is not None:
        named[LEVEL] = _name(panels[0].level_name)
    # About as many characters as fit beside each other.
    columns = max(1, min(len(named), int(width / (0.42 + 0.062 * max(map(len, named.values()))))))
    lines = -(-len(named) // columns)
    canvas = Canvas(figsize=(width, HEIGHT + LEGEND_LINE * lines), layout="constrained")
    handles: dict[int, Any] = {}
    for axes, panel in zip(canvas.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_panel(axes, panel, handles)
    layout: Any = {"loc": "outside lower center", "ncols": columns, "frameon": False, "borderpad": 0.1}
    spaces: Any = {"handlelength": 2.4, "columnspacing": 1.2, "handletextpad": 0.5, "labelspacing": 0.3}
    canvas.legend([handles[index] for index in named], list(named.values()), **layout, **spaces)
    return canvas


def _draw_panel(axes: Any, panel: Figure, handles: dict[int, Any]) -> None:
    for order, series in enumerate(panel.series):
        line = _draw_series(axes, series, 2 + order)
        if panel.legend.get(series.style.index) is series:
            handles.setdefault(series.style.index, line)
    if panel.level is not None:
        level = axes.axhline(panel.level, color=LIGHT["baseline"], linewidth=0.9, linestyle=(0, (1, 1.5)), zorder=1.5)
        handles.setdefault(LEVEL, level)
    axes.set_xlabel(panel.x.title)
    axes.set_ylabel(panel.y.title)
    axes.set_title(panel.title, loc="left")
    if panel.x.ticks:
        axes.set_xticks([place for place, _ in panel.x.ticks], [label for _, label in panel.x.ticks])
        axes.margins(x=0.08)
    else:
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(lambda value, _: tokens_label(value))
        axes.locator_params(axis="x", nbins=5)
    if panel.y.range is not None:
        axes.set_ylim(panel.y.range)
    if panel.remark:
        place: Any = {"ha": "right", "va": "top", "transform": axes.transAxes, "fontsize": 7}
        axes.text(0.98, 0.97, panel.remark, **place)
    for note in panel.notes:
        _draw_note(axes, note)


def _draw_series(axes: Any, series: Series, order: int) -> Any:
    colour = LIGHT[series.style.colour]
    x, y = np.array(series.x, dtype=float), np.array([np.nan if v is None else v for v in series.y], dtype=float)
    look: dict[str, Any] = {"color": colour, "zorder": order, "linestyle": DASHES[series.style.dash]}
    if series.role == "ring":
        return axes.plot(x, y, "o", color=colour, markersize=7.5, fillstyle="none", zorder=order)[0]
    if series.role == "seed":
        return axes.plot(x, y, **look | {"linewidth": 0.5, "alpha": 0.4, "linestyle": "-"})[0]
    if any(value is not None for value in series.low):
        _draw_bounds(axes, series, x, y, colour)
    is_arm = series.style.index < len(MARKERS)
    marker = MARKERS[series.style.index] if is_arm or series.role == "points" or x.size == 1 else None
    every = max(1, x.size // MARKED_POINTS) if series.role == "mean" else 1
    size = 4.5 if series.role == "points" else 3.5
    # Each arm's markers at points of their own, where lines lie on one another.
    start = series.style.index % every
    return axes.plot(x, y, **look, marker=marker, markevery=(start, every), markeredgewidth=0, markersize=size)[0]


def _draw_bounds(axes: Any, series: Series, x: np.ndarray, y: np.ndarray, colour: str) -> None:
    for part in finite_runs(series.low, series.high):
        low, high = np.array(series.low[part], dtype=float), np.array(series.high[part], dtype=float)
        if series.role == "mean":
            axes.fill_between(x[part], low, high, color=colour, alpha=0.13, linewidth=0, zorder=1)
        else:
            axes.vlines(x[part], low, high, color=colour, linewidth=0.9, zorder=1.8)


def _draw_note(axes: Any, note: Note) -> None:
    early = note.x < 0.3 * axes.get_xlim()[1]
    axes.plot([note.x], [note.y], "o", color=LIGHT["ink"], markersize=3, zorder=50)
    side = "left" if early else "right"
    axes.annotate(
        "\n".join(_name(line) for line in note.lines),
        (note.x, note.y),
        **{"xytext": (-1, -4), "textcoords": "offset points", "ha": side, "va": "top", "fontsize": 6.5, "zorder": 50},
    )


def tokens_label(value: float) -> str:
    """`0`, `500k`, `1.5M`, `2G`."""
    for step, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= step:
            return f"{value / step:g}{unit}"
    return f"{value:g}"


def _name(text: str) -> str:
    clean = "".join(character if character.isprintable() or character == "\u00a0" else "?" for character in text)
    return clean if len(clean) <= LONGEST_NAME else f"{clean[: LONGEST_NAME - 1]}…"
