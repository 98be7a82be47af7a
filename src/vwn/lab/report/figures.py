"""What the report's figures show; `draw` makes SVGs of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vwn.lab.analysis.runs import runs_by_arm

ARM_COLOURS = 7
DASHES = ("solid", "dash", "dot")
NAMES = ("speedup-over-budget", "fewer-tokens", "loss-over-tokens", "gap-over-tokens", "gain", "loss-over-width")
# Styles of what belongs to no arm are numbered from here.
OTHERS = 1000


@dataclass(frozen=True)
class LineStyle:
    """How an arm is drawn everywhere: its place among the arms, a colour of `colours.LIGHT`, and a dash."""

    index: int
    colour: str
    dash: str

    @property
    def css(self) -> str:
        """The colour as a CSS variable, which the page resolves for light and dark."""
        return f"var(--{self.colour})"


INK_STYLE = LineStyle(OTHERS, "ink", "solid")
PAPER_STYLE = LineStyle(OTHERS + 1, "muted", "dash")


@dataclass(frozen=True)
class Series:
    """One line of a figure, or its points.

    Args:
        name: of the arm, or of what is drawn.
        role: "mean", a line; "seed", a faint one; "points", a line with markers; "ring", around single points; "mark",
            a star.
        style: of its line and markers.
        x, y: as long as each other; None in `y` leaves a gap.
        low, high: bounds at each point, a band around a "mean", bars on "points"; None where there are none.
        hover: the title of each point; without it there is none.
        hollow: which points have a hollow marker.
    """

    name: str
    role: Literal["mean", "seed", "points", "ring", "mark"]
    style: LineStyle
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    hover: Sequence[str] = ()
    hollow: Sequence[bool] = ()


@dataclass(frozen=True)
class Axis:
    """`ticks` are (place, label) pairs; without them the axis is of training tokens (x) or plain numbers (y)."""

    title: str
    ticks: tuple[tuple[float, str], ...] = ()
    range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Arrow:
    """A horizontal arrow at `y` from `start` to `end`, with a text below its end."""

    start: float
    end: float
    y: float
    text: str


@dataclass(frozen=True)
class Figure:
    """One figure.

    Args:
        name: of its file, one of `NAMES`; that of the next-2-token loss ends in `-2`.
        key: "loss" or "loss_2".
        title, caption: plain text.
        x, y: its axes.
        series: drawn in this order.
        level: where a dotted line is drawn across.
        level_name: what that line is.
        arrow: drawn over the series.
        axis_break: where the x axis is cut.
    """

    name: str
    key: str
    title: str
    caption: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    level: float | None = None
    level_name: str = ""
    arrow: Arrow | None = None
    axis_break: float | None = None

    @property
    def identifier(self) -> str:
        """The name of its file and of its element in the page."""
        return self.name if self.key == "loss" else f"{self.name}-2"

    @property
    def is_empty(self) -> bool:
        """Whether there is no point to draw."""
        return not any(value is not None for series in self.series for value in series.y)

    @property
    def legend(self) -> dict[int, Series]:
        """Style index -> the series that stands for it, a faint one or a ring only if there is no other."""
        shown: dict[int, Series] = {}
        for roles in (("mean", "points", "mark"), ("seed",), ("ring",)):
            for series in self.series:
                if series.role in roles:
                    shown.setdefault(series.style.index, series)
        return shown


def arm_styles(report: dict[str, Any]) -> dict[str, LineStyle]:
    """Return arm name -> line style; the baseline has the neutral colour; up to 21 others all look different."""
    styles = {}
    others = 0
    for index, name in enumerate(runs_by_arm(report)):
        if name == report.get("baseline"):
            styles[name] = LineStyle(index, "baseline", "solid")
        else:
            dash = DASHES[others // ARM_COLOURS % len(DASHES)]
            styles[name] = LineStyle(index, f"arm-{others % ARM_COLOURS}", dash)
            others += 1
    return styles


def padded_range(values: Sequence[float | None], room: Sequence[float | None] = ()) -> tuple[float, float] | None:
    """Return an axis range around all `values`; it gives way to `room` (of bands), but not until `values` are flat."""
    found = np.array([value for value in values if value is not None], dtype=np.float64)
    if found.size == 0 or found.min() == found.max():
        return None
    low, high = float(found.min()), float(found.max())
    span = high - low
    bounds = [value for value in room if value is not None]
    low = max(min([low, *bounds]), low - span)
    high = min(max([high, *bounds]), high + span)
    pad = 0.06 * (high - low)
    return low - pad, high + pad
