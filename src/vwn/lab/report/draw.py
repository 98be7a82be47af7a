"""Draw the report's figures: one style, a line for each arm, one SVG for the page and for the file beside it.

A point's values are in a `<title>`, which browsers show on hovering.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure as Canvas

from vwn.lab.analysis.runs import runs_by_arm
from vwn.lab.analysis.wording import printable
from vwn.lab.report.colours import LIGHT

# Inches: a column of a paper.
WIDTH, HEIGHT, LEGEND_LINE = 3.3, 2.45, 0.15
LONGEST_NAME = 30
ARM_COLOURS = 7
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.2, 1.6)))
# One for each arm, besides its colour, for readers and printers without colours.
MARKERS = "osD^vPX<>*hp"
MARKED_POINTS = 7
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


@dataclass(frozen=True)
class LineStyle:
    """The style of an arm in every figure: colour of `colours.LIGHT`, dash, marker, and the first point that has it."""

    colour: str
    dash: Any = DASHES[0]
    marker: str | None = None
    first_marked: int = 0


def arm_styles(report: dict[str, Any]) -> dict[str, LineStyle]:
    """Return arm name -> line style; the baseline has the neutral colour; up to 21 others all look different."""
    styles = {}
    others = 0
    for index, name in enumerate(runs_by_arm(report)):
        marker = MARKERS[index % len(MARKERS)]
        if name == report.get("baseline"):
            styles[name] = LineStyle("baseline", DASHES[0], marker, index)
        else:
            dash = DASHES[others // ARM_COLOURS % len(DASHES)]
            styles[name] = LineStyle(f"arm-{others % ARM_COLOURS}", dash, marker, index)
            others += 1
    return styles


class Figure:
    """One figure, in the colours of light mode.

    Args:
        name: of its file; that of the next-2-token loss ends in `-2`.
        key: "loss" or "loss_2".
        title, caption: plain text for the page.
        x, y: titles of its axes.
        ticks: place and label of each tick of the x axis; by default matplotlib's.
    """

    def __init__(
        self, name: str, key: str, title: str, caption: str, x: str, y: str, ticks: Sequence[tuple[float, str]] = ()
    ) -> None:
        self.identifier = name if key == "loss" else f"{name}-2"
        self.key, self.title, self.caption = key, title, caption
        self.canvas = Canvas(figsize=(WIDTH, HEIGHT), dpi=POINTS_PER_INCH, layout="constrained")
        self.axes: Any = self.canvas.subplots()
        self.axes.set(xlabel=x, ylabel=y)
        self.named: dict[str, Any] = {}
        self.hovers: list[tuple[float, float, str]] = []
        if ticks:
            self.axes.set_xticks([place for place, _ in ticks], [label for _, label in ticks])
            self.axes.margins(x=0.08)

    def line(self, name: str, style: LineStyle, x: Any, y: Any, hover: Iterable[str] = (), **changes: Any) -> None:
        """Draw a line that the legend names, with a text to hover over for each point; NaN leaves a gap."""
        every = max(1, len(x) // MARKED_POINTS)
        # Each arm's markers at points of their own, where lines lie on one another.
        look = {"markevery": (style.first_marked % every, every), "markeredgewidth": 0, "markersize": 3.5}
        look |= {"color": LIGHT[style.colour], "linestyle": style.dash, "marker": style.marker}
        self.named[name] = self.axes.plot(x, y, **look | changes)[0]
        self.hovers += zip(x, y, hover, strict=False)

    def bars(self, style: LineStyle, x: Any, bounds: Iterable[Sequence[float] | None]) -> None:
        """Draw a bar between each point's bounds, where it has any."""
        low, high = np.array([found or (np.nan, np.nan) for found in bounds], dtype=float).T
        self.axes.vlines(x, low, high, color=LIGHT[style.colour], linewidth=0.9, zorder=1.8)

    def level(self, name: str, y: float) -> None:
        """Draw a dotted line across, which the legend names."""
        dotted = {"color": LIGHT["baseline"], "linewidth": 0.9, "linestyle": (0, (1, 1.5))}
        self.named[name] = self.axes.axhline(y, **dotted, zorder=1.5)

    def arrow(self, start: float, end: float, y: float, text: str) -> None:
        """Draw a horizontal arrow with a text below its end."""
        style: Any = {"arrowstyle": "-|>", "color": LIGHT["ink"], "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0}
        self.axes.annotate("", (end, y), (start, y), arrowprops=style)
        below: Any = {"xytext": (-2, -4), "textcoords": "offset points", "ha": "right", "va": "top"}
        self.axes.annotate(_short(text), (end, y), **below)

    def cut_axis(self, x: float) -> None:
        """Mark a break of the x axis."""
        where: Any = {"ha": "center", "va": "center", "transform": self.axes.get_xaxis_transform(), "fontsize": 9}
        self.axes.text(x, 0, "//", **where, bbox={"facecolor": LIGHT["paper"], "linewidth": 0, "pad": 0.4})

    @cached_property
    def svg(self) -> str:
        """The text of an SVG file."""
        names = [_short(name) for name in self.named]
        # About as many characters as fit beside each other.
        columns = max(1, min(len(names), int(WIDTH / (0.42 + 0.062 * max(map(len, names))))))
        layout: Any = {"loc": "outside lower center", "ncols": columns, "frameon": False, "borderpad": 0.1}
        spaces: Any = {"handlelength": 2.4, "columnspacing": 1.2, "handletextpad": 0.5, "labelspacing": 0.3}
        content = io.StringIO()
        with matplotlib.rc_context(STYLE), warnings.catch_warnings():
            # Scripts that the font lacks cannot be measured; the reader's browser has them.
            warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
            self.canvas.set_size_inches(WIDTH, HEIGHT + LEGEND_LINE * -(-len(names) // columns))
            self.canvas.legend(list(self.named.values()), names, **layout, **spaces)
            self.canvas.savefig(content, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        svg = re.sub(r' (d|transform|x|y)="[^"]*"', _rounded, content.getvalue())
        return svg.replace("</svg>", f'<g class="hover" fill-opacity="0">{self._hover_circles()}</g>\n</svg>')

    def _hover_circles(self) -> str:
        """Return invisible circles on the points that have a text, in the SVG's own coordinates."""
        height = self.canvas.get_size_inches()[1] * POINTS_PER_INCH
        lowest, highest = self.axes.get_ylim()
        found = []
        for x, y, text in self.hovers:
            if lowest <= y <= highest:
                left, bottom = self.axes.transData.transform((x, y))
                title = escape(printable(text.replace("-", "−")), quote=False)
                place = f'cx="{left:.1f}" cy="{height - bottom:.1f}"'
                found.append(f'<circle {place} r="4"><title>{title}</title></circle>')
        return "\n".join(found)


def inline(svg: str, identifier: str, label: str) -> str:
    """Return a figure's SVG as an element of the page: its colours are CSS variables, its ids its own."""
    body = svg[svg.index("<svg") :]
    for name, colour in LIGHT.items():
        body = body.replace(f": {colour}", f": var(--{name})")
    used = set(re.findall(r"#([\w-]+)", body))
    body = re.sub(r' id="([^"]*)"', lambda match: f' id="{identifier}-{match[1]}"' if match[1] in used else "", body)
    body = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{identifier}-", body)
    head = f'<svg id="{identifier}" role="img" aria-label="{escape(label)}"'
    start, rest = body.split(">", 1)
    return re.sub(r' (width|height)="[^"]*"', "", start).replace("<svg", head, 1) + ">" + rest


def padded_range(values: Iterable[float], room: Iterable[float] = ()) -> tuple[float, float] | None:
    """Return an axis range around all finite `values`; it gives way to `room`, but not until `values` are flat."""
    found = np.array([*values], dtype=float)
    found = found[np.isfinite(found)]
    if found.size == 0 or found.min() == found.max():
        return None
    low, high = float(found.min()), float(found.max())
    span, bounds = high - low, [*room]
    low, high = max(min([low, *bounds]), low - span), min(max([high, *bounds]), high + span)
    pad = 0.06 * (high - low)
    return low - pad, high + pad


def _rounded(attribute: re.Match[str]) -> str:
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), attribute[0])


def _short(text: str) -> str:
    clean = printable(text)
    return clean if len(clean) <= LONGEST_NAME else f"{clean[: LONGEST_NAME - 1]}…"
