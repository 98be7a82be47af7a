"""The figures of an inspection, as SVG."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from vwn.lab.report.colours import LIGHT
from vwn.lab.report.draw import STYLE as REPORT_STYLE

MUTED, BLUE, ORANGE = LIGHT["muted"], LIGHT["arm-0"], LIGHT["arm-1"]
RATES = ("read", "carry", "write")
# A figure in an <img> has no fonts of the page, so its letters are paths.
STYLE: Any = {**REPORT_STYLE, "font.size": 9, "axes.titlesize": 10, "axes.grid": False, "svg.fonttype": "path"}
MOST_LABELS = 25
MOST_LINEAR = 50  # a wider range of values than this gets a logarithmic scale


def write_figures(result: dict[str, Any], directory: Path) -> dict[str, str]:
    """Write every figure as ``NAME.svg``; returns the SVG texts by name."""
    drawn = {}
    for name, draw in FIGURES.items():
        with matplotlib.rc_context(STYLE):
            figure = draw(result)
            text = io.StringIO()
            metadata: Any = {"Date": None, "Creator": None}
            figure.savefig(text, format="svg", metadata=metadata, bbox_inches="tight", pad_inches=0.08)
        drawn[name] = text.getvalue()
        (directory / f"{name}.svg").write_text(drawn[name], encoding="utf-8")
    return drawn


def depth_figure(result: dict[str, Any]) -> Figure:
    """Draw the paths from source to reader, and what they carry, as two heat maps."""
    names = _names(result)
    sources, readers = ["embedding", *names], [*names, "final state"]
    side = max(0.13, min(0.36, 4.2 / len(readers))) * len(readers)
    figure = Figure(figsize=(2 * side + 3.8, side + 1.6), layout="constrained")
    panels = (("gain", "Path: RMS gain from output to input"), ("carried", "Carried: RMS relative to the whole input"))
    for axes, (key, title) in zip(figure.subplots(1, 2), panels, strict=True):
        grid = np.full((len(readers), len(sources)), np.nan)
        for row, values in enumerate(result["depth"][key]):
            grid[row, : len(values)] = values
        _heat_map(figure, axes, grid, readers)
        _label(axes, "x", sources, 0.5)
        axes.set(title=title, xlabel="written by", ylabel="read by", aspect="equal")
    return figure


def spectrum_figure(result: dict[str, Any]) -> Figure:
    """Draw the spectral radius of the carry of each sublayer."""
    radii = [s["spectral_radius"] for s in result["sublayers"]]
    mean, low, high = (np.array([r[key] for r in radii]) for key in ("mean", "low", "high"))
    x = np.arange(len(radii))
    figure = Figure(figsize=(max(5.0, 0.28 * len(x) + 1.5), 3.2), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1, color=MUTED, linewidth=1, linestyle=":")
    axes.vlines(x, low, high, color=BLUE, alpha=0.35, linewidth=4, label="5–95 % of the tokens")
    axes.plot(x, mean, "o", color=BLUE, markersize=4, label="mean")
    axes.margins(x=0.03, y=0.25)
    _label(axes, "x", _names(result), 0)
    axes.set(title="Spectral radius of the carry Â (below 1: exponential forgetting)")
    _legend(figure, axes)
    return figure


def slots_figure(result: dict[str, Any]) -> Figure:
    """Draw how each sublayer reads, writes and keeps each slot, and what the slots hold."""
    names = _names(result)
    of_slots = [s["slots"] for s in result["sublayers"]]
    columns = max(result["n"], 9)
    size = (min(16.0, 4 * (0.11 * columns + 1.1) + 1.0), max(2.6, min(0.2, 7 / len(names)) * (len(names) + 1) + 1.2))
    figure = Figure(figsize=size, layout="constrained")
    panels = (
        ("read", "Read: norm of row of Å"),
        ("written", "Written: norm of column of B"),
        ("kept", "Kept: diagonal of Â"),
        ("rms", "Content: RMS before"),
    )
    for axes, (key, title) in zip(figure.subplots(1, 4), panels, strict=True):
        rows = [slots[key] for slots in of_slots]
        labels = list(names)
        if key == "rms":
            rows, labels = [*rows, result["final_slot_rms"]], [*labels, "final state"]
        _heat_map(figure, axes, np.array(rows), labels, around_one=key == "kept")
        _label(axes, "x", [str(i) for i in range(result["n"])], 0.5, most=8, rotation=0)
        axes.set(title=title, xlabel="slot")
    return figure


def routing_figure(result: dict[str, Any]) -> Figure:
    """Draw the static and the dynamic part of the routing matrices of each sublayer."""
    names, x = _names(result), np.arange(len(result["sublayers"]))
    figure = Figure(figsize=(max(5.5, 0.3 * len(x) + 2.5), 5.6), layout="constrained")
    titles = {"read": "Read Å", "carry": "Carry Â", "write": "Write B"}
    bars = (("static", "static part", MUTED), ("dynamic", "dynamic part", BLUE), ("varying", "that varies", ORANGE))
    every = figure.subplots(3, 1, sharex=True)
    for axes, part in zip(every, RATES, strict=True):
        for i, (key, label, colour) in enumerate(bars):
            heights = [s["routing"][part][key] for s in result["sublayers"]]
            axes.bar(x + (i - 1) * 0.27, heights, 0.25, color=colour, label=label)
        axes.set_title(titles[part], loc="left")
        axes.set_ylabel("RMS of an entry")
    _label(every[-1], "x", names, 0)
    _legend(figure, every[0])
    return figure


FIGURES: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "depth": depth_figure,
    "spectrum": spectrum_figure,
    "slots": slots_figure,
    "routing": routing_figure,
}


def _names(result: dict[str, Any]) -> list[str]:
    return [s["name"] for s in result["sublayers"]]


def _heat_map(figure: Figure, axes: Axes, grid: np.ndarray, rows: list[str], around_one: bool = False) -> None:
    """Draw ``grid``, ``[rows, columns]``, empty where it is NaN; colours from 0 on, or to both sides of 1."""
    low, high = float(np.nanmin(grid)), float(np.nanmax(grid)) or 1.0
    spread = float(np.nanmax(np.abs(grid - 1))) or 1.0
    norm = Normalize(1 - spread, 1 + spread) if around_one else Normalize(0, high)
    if not around_one and 0 < low * MOST_LINEAR < high:
        norm = LogNorm(low, high)
    drawn = axes.pcolormesh(grid, cmap="PuOr_r" if around_one else "YlGnBu", norm=norm, rasterized=grid.size > 5000)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    _label(axes, "y", rows, 0.5)
    figure.colorbar(drawn, ax=axes, shrink=0.8, pad=0.02).outline.set_visible(False)


def _label(
    axes: Axes, which: str, names: list[str], offset: float, most: int = MOST_LABELS, rotation: int = 90
) -> None:
    """Name the places of an axis, leaving out regularly what would not fit."""
    places = range(0, len(names), -(-len(names) // most))
    if which == "x":
        axes.set_xticks([i + offset for i in places], [names[i] for i in places], rotation=rotation)
    else:
        axes.set_yticks([i + offset for i in places], [names[i] for i in places])


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
