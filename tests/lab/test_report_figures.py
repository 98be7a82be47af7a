"""The report's figures: what they show, of which data, and their SVG."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from curves import STUDY_ARMS, arm, arms_of, budget_runs, curve, power_law, realistic, report, study
from vwn.lab.analysis.analyse import add_analysis
from vwn.lab.analysis.budgets import budget_studies
from vwn.lab.report.charts import NAMES, report_figures
from vwn.lab.report.colours import DARK, LIGHT
from vwn.lab.report.draw import Figure, inline
from vwn.lab.report.write import write_report

ALWAYS = {"fewer-tokens", "loss-over-tokens", "gain"}
HOSTILE = "<b>$\\frac$ & x</b>"


def figures(source: dict[str, Any]) -> dict[str, Figure]:
    return {figure.identifier: figure for figure in report_figures(add_analysis(source))}


def points_of(figure: Figure, name: str) -> tuple[list[float], list[float]]:
    """What is drawn of one name of the legend: x and y."""
    line = figure.named[name]
    return list(line.get_xdata()), list(line.get_ydata())


def bars_of(figure: Figure) -> list[tuple[float, float]]:
    """The ends of each bar."""
    bars = [segment for collection in figure.axes.collections for segment in collection.get_segments()]
    return [(float(bar[0][1]), float(bar[1][1])) for bar in bars if np.isfinite(bar).all()]


@pytest.mark.parametrize("name", STUDY_ARMS)
def test_each_study_has_the_figures_that_its_data_has(name: str) -> None:
    found = figures(study(name))
    names = {identifier.removesuffix("-2") for identifier in found}
    assert names == ALWAYS | ({"loss-over-width"} if name == "widths" else set())
    assert names <= set(NAMES)
    assert "loss-over-tokens-2" in found
    # The baseline of the study of MTP has no next-2-token loss to be held against.
    assert ("gain-2" in found) == (name != "mtp")


def test_nothing_is_drawn_of_nothing() -> None:
    assert figures(report()) == {}
    assert figures(report(arm("plain", 0, []))) == figures(report(arm("plain", 0, curve([4])))) == {}
    assert list(figures(report(arm("plain", 0, curve([4, 3]))))) == ["loss-over-tokens"]


def test_an_arrow_shows_what_the_better_of_two_arms_saves() -> None:
    arms = [*arms_of("plain", power_law()), *arms_of("4x16", power_law(speed=1.5))]
    figure = figures(report(*arms))["loss-over-tokens"]
    level = figure.named["plain’s final loss"].get_ydata()[0]
    assert level == pytest.approx(np.mean([points[-1]["loss"] for points in power_law()]), rel=1e-12)
    arrow, text = figure.axes.texts
    assert (arrow.xyann[0], arrow.xy[0]) == pytest.approx((1_000_000, 1_000_000 / 1.5), rel=2e-3)
    assert text.get_text() == "4x16: 33\u00a0% fewer tokens"
    expected = np.mean([p[3]["loss"] for p in power_law(speed=1.5)])
    assert points_of(figure, "4x16")[1][3] == pytest.approx(expected, rel=1e-12)
    low, high = figure.axes.get_ylim()
    assert low < level - 0.15 * (high - level)
    shown = figures(report(*arms, *arms_of("4x32", power_law(speed=2.0))))
    assert not shown["loss-over-tokens"].axes.texts
    assert list(shown["fewer-tokens"].named) == ["plain", "4x32", "plain’s final loss"]
    assert shown["fewer-tokens"].axes.texts[0].xy[0] == pytest.approx(500_000, rel=2e-3)


def test_the_speedup_over_budgets_is_drawn_beside_the_papers() -> None:
    arms = [*budget_runs("plain"), *budget_runs("4x16", 1.5, noise=0.01)]
    shown, studies = figures(report(*arms)), budget_studies(report(*arms))
    for identifier, key, paper in (("speedup-over-budget", "loss", 2.5), ("speedup-over-budget-2", "loss_2", 3.5)):
        figure, found = shown[identifier], studies[key].tokens_factors["4x16"]
        x, y = points_of(figure, "4x16")
        assert x == [math.log2(tokens) for tokens in found]
        assert y == [factor.over_seeds.mean for factor in found.values()]
        assert bars_of(figure) == [factor.bounds for factor in found.values()]
        hollow = next(line for line in figure.axes.lines if line.get_color() == figure.axes.get_facecolor())
        guesses = [factor.over_seeds.mean for factor in found.values() if factor.extrapolated]
        assert list(hollow.get_ydata()) == guesses
        assert guesses
        mark_x, mark_y = points_of(figure, "the paper")
        assert mark_y == [paper]
        assert max(x) < figure.axes.texts[0].get_position()[0] < mark_x[0]
        labels = [label.get_text() for label in figure.axes.get_xticklabels()]
        assert labels == ["1M", "2M", "4M", "8M", "16M", "3T"]
        assert "//" in figure.svg


def test_a_diverged_arm_shows_its_seeds_and_no_mean() -> None:
    source = study("widths")
    source["arms"][-1]["curve"][-1]["loss"] = math.nan
    shown = figures(source)
    assert math.isnan(points_of(shown["loss-over-tokens"], "4x32")[1][-1])
    ends = [line.get_ydata()[-1] for line in shown["loss-over-tokens"].axes.lines if len(line.get_xdata()) == 21]
    assert (len(ends), sum(map(math.isnan, ends))) == (20, 2)  # five arms of three seeds and a mean
    assert list(shown["gain"].named) == ["4x6", "4x8", "4x16", "plain"]


def test_the_width_law_is_drawn_as_it_was_fitted_beside_the_paper() -> None:
    fit = add_analysis(study("widths"))["scaling"]["loss"]
    figure = figures(study("widths"))["loss-over-width"]
    x, y = points_of(figure, "least-squares fit")
    intercept, slope = fit["intercept"]["mean"], fit["slope"]["mean"]
    assert y == pytest.approx(list(intercept + slope * np.array(x)), abs=1e-12)
    assert np.polyfit(*points_of(figure, "the paper’s slope, −0.0069"), 1)[0] == pytest.approx(-0.0069)
    for name, r, loss in zip(fit["arms"], fit["widths"], fit["losses"], strict=True):
        assert points_of(figure, name) == ([np.log2(r)], [loss])
    assert [label.get_text() for label in figure.axes.get_xticklabels()] == ["1.5", "2", "4", "8"]
    low, high = fit["slope"]["interval"]
    assert f"{slope:+.4f} ({low:+.4f} to {high:+.4f})".replace("-", "−") in figure.caption
    assert f"R² {fit['r2']:.3f}" in figure.caption


def test_the_gain_is_the_paired_difference() -> None:
    source = study("fraction-rate")
    cells = add_analysis(source)["pairwise"]["loss"]
    figure, names = figures(source)["gain"], ("1x4", "2x8", "4x16", "8x32")
    found = [cells[name]["plain"]["difference"] for name in names]
    assert [points_of(figure, name)[1] for name in names] == [[cell["mean"]] for cell in found]
    assert bars_of(figure) == [tuple(cell["interval"]) for cell in found]


def test_every_point_is_drawn_where_it_belongs_and_says_its_value() -> None:
    for figure in figures(study("mtp")).values():
        root = ElementTree.fromstring(figure.svg)
        circles = root.findall(".//{*}g[@class='hover']/{*}circle")
        low, high = figure.axes.get_ylim()
        shown = [point for point in figure.hovers if low <= point[1] <= high]
        assert len(circles) == len(shown) > 0
        places = np.array([[float(circle.get("cx")), float(circle.get("cy"))] for circle in circles])
        for axis in (0, 1):
            values = np.array([point[axis] for point in shown])
            slope, start = np.polyfit(values, places[:, axis], 1)
            assert places[:, axis] == pytest.approx(slope * values + start, abs=0.1)
            assert np.sign(slope) == (1, -1)[axis]
        for circle, (_, y, text) in zip(circles, shown, strict=True):
            assert f"{y:.4f}" in text.replace("+", "")
            assert circle.find("{*}title").text == text.replace("-", "−")
        # The last mean line that is drawn passes through its own circles.
        drawn = {(round(float(x)), round(float(y))) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", figure.svg)}
        assert sum((round(x), round(y)) in drawn for x, y in places) >= len(places) // 2


def test_files_have_a_columns_width_stand_alone_and_are_small(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    for name in ("mine", "loss-over-width-2"):
        (tmp_path / "figures" / f"{name}.svg").write_bytes(b"")
    write_report(study("mtp"), tmp_path)
    names = {f"{name}.svg" for name in figures(study("mtp"))}
    # A figure that is gone leaves no file, and other files stay.
    assert {path.name for path in (tmp_path / "figures").iterdir()} == names | {"mine.svg"}
    for name in names:
        text = (tmp_path / "figures" / name).read_text()
        svg = ElementTree.fromstring(text)
        assert svg.get("width") == "237.6pt"
        links = [value for node in svg.iter() for key, value in node.attrib.items() if key.endswith("href")]
        assert all(link.startswith("#") for link in links)
        assert len(text) < 50_000
        assert "RDF" not in text


def test_a_figure_of_the_page_has_its_own_ids_and_the_pages_colours() -> None:
    shown = inline(figures(study("widths"))["loss-over-tokens"].svg, "first", 'a "label" <')
    assert shown.startswith('<svg id="first" role="img" aria-label="a &quot;label&quot; &lt;"')
    root = ElementTree.fromstring(shown)
    ids = {node.get("id") for node in root.iter() if node.get("id")}
    assert all(one.startswith("first") for one in ids)
    used = set(re.findall(r'(?:url\(#|href="#)([\w-]+)', shown))
    assert used
    assert used <= ids
    assert (root.get("width"), root.get("height")) == (None, None)
    assert "stroke: var(--arm-0)" in shown
    assert not re.search(r": #(?!000000|ffffff)[0-9a-f]{6}", shown)
    assert LIGHT.keys() == DARK.keys()


def test_any_name_can_be_drawn() -> None:
    names = ("plain", HOSTILE, "名前\nline", "x" * 200)
    figure = figures(realistic(names))["loss-over-tokens"]
    ElementTree.fromstring(inline(figure.svg, figure.identifier, figure.title))
    assert "&lt;b&gt;$\\frac$ &amp; x&lt;/b&gt;</text>" in figure.svg
    assert figures(realistic(("plain", *(f"4x{n}" for n in range(5, 25))), seeds=1))["loss-over-tokens"].svg
