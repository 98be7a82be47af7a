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
from vwn.lab.report.colours import DARK, LIGHT
from vwn.lab.report.draw import draw, inline
from vwn.lab.report.figures import NAMES, Figure, Series
from vwn.lab.report.write import report_figures, write_report

ALWAYS = {"fewer-tokens", "loss-over-tokens", "gap-over-tokens", "gain"}
HOSTILE = "<b>$\\frac$ & x</b>"


def figures(source: dict[str, Any]) -> dict[str, Figure]:
    return {figure.identifier: figure for figure in report_figures(add_analysis(source))}


def of(figure: Figure, name: str, role: str = "mean") -> Series:
    (found,) = [series for series in figure.series if series.name == name and series.role == role]
    return found


@pytest.mark.parametrize("name", STUDY_ARMS)
def test_each_study_has_the_figures_that_its_data_has(name: str) -> None:
    found = figures(study(name))
    assert {figure.name for figure in found.values()} == ALWAYS | ({"loss-over-width"} if name == "widths" else set())
    assert "loss-over-tokens-2" in found
    # The baseline of the study of MTP has no next-2-token loss to be held against.
    assert ("gap-over-tokens-2" in found) == (name != "mtp")
    assert {figure.name for figure in found.values()} <= set(NAMES)
    assert len(found) == len(report_figures(add_analysis(study(name))))


def test_nothing_is_drawn_of_nothing() -> None:
    assert figures(report()) == {}
    assert figures(report(arm("plain", 0, []))) == {}
    assert list(figures(report(arm("plain", 0, curve([4, 3]))))) == ["loss-over-tokens"]


def test_an_arrow_shows_what_the_better_of_two_arms_saves() -> None:
    arms = [*arms_of("plain", power_law()), *arms_of("4x16", power_law(speed=1.5))]
    source = add_analysis(report(*arms, study="widths"))
    figure = figures(source)["loss-over-tokens"]
    finals = [run["curve"][-1]["loss"] for run in source["arms"] if run["name"] == "plain"]
    assert figure.level == pytest.approx(np.mean(finals), rel=1e-12)
    assert figure.arrow is not None
    assert (figure.arrow.start, figure.arrow.end) == pytest.approx((1_000_000, 1_000_000 / 1.5), rel=2e-3)
    assert figure.arrow.text == "4x16: 33\u00a0% fewer tokens"
    assert of(figure, "4x16").y[3] == pytest.approx(np.mean([p[3]["loss"] for p in power_law(speed=1.5)]), rel=1e-12)
    assert figure.y.range is not None
    assert figure.y.range[0] < figure.level - 0.15 * (figure.y.range[1] - figure.level)
    shown = figures(report(*arms, *arms_of("4x32", power_law(speed=2.0))))
    assert shown["loss-over-tokens"].arrow is None
    assert {series.name for series in shown["fewer-tokens"].series} == {"plain", "4x32"}
    assert shown["fewer-tokens"].arrow.end == pytest.approx(500_000, rel=2e-3)


def test_the_speedup_over_budgets_is_drawn_beside_the_papers() -> None:
    arms = [*budget_runs("plain"), *budget_runs("4x8", 1.1), *budget_runs("4x16", 1.5, noise=0.01)]
    shown, studies = figures(report(*arms)), budget_studies(report(*arms))
    for identifier, key, paper in (("speedup-over-budget", "loss", 2.5), ("speedup-over-budget-2", "loss_2", 3.5)):
        figure, points = shown[identifier], studies[key].arms["4x16"]
        series = of(figure, "4x16", "points")
        assert list(series.x) == [math.log2(point.tokens) for point in points]
        assert list(series.y) == [point.speedup.over_seeds.mean for point in points]
        assert list(zip(series.low, series.high, strict=True)) == [point.speedup.bounds for point in points]
        assert list(series.hollow) == [point.equal["tokens"].speedup.extrapolated for point in points]
        assert any(series.hollow)
        mark = of(figure, "the paper", "mark")
        assert list(mark.y) == [paper]
        assert figure.axis_break is not None
        assert max(series.x) < figure.axis_break < mark.x[0]
        assert [label for _, label in figure.x.ticks] == ["1M", "2M", "4M", "8M", "16M", "3T"]
        assert "//" in draw(figure)


@pytest.mark.parametrize("arms", [("plain", "4x32"), ("plain", "4x6", "4x16", "4x32")])
def test_the_gap_of_few_arms_has_the_interval_over_seeds_as_their_band(arms: tuple[str, ...]) -> None:
    whole = study("widths")
    source = add_analysis({**whole, "arms": [run for run in whole["arms"] if run["name"] in arms]})
    figure, points = figures(source)["gap-over-tokens"], source["summary"][-1]["loss"]["gap_curve"]
    series = of(figure, "4x32")
    assert list(series.y) == [point["mean"] for point in points]
    low, high = points[-1]["interval"]
    assert series.hover[-1].endswith(f"({low:+.4f} to {high:+.4f})")
    bounds = [tuple(point["interval"]) for point in points] if len(arms) == 2 else []
    assert list(zip(series.low, series.high, strict=True)) == bounds
    assert ("Band: 95\u00a0% interval" in figure.caption) == (len(arms) == 2)


def test_a_diverged_arm_shows_its_seeds_and_no_mean() -> None:
    source = study("widths")
    source["arms"][-1]["curve"][-1]["loss"] = math.nan
    shown = figures(source)
    assert not any(
        value is not None for one in shown["gap-over-tokens"].series if one.name == "4x32" for value in one.y
    )
    assert sum(one.name == "4x32" and one.role == "seed" for one in shown["loss-over-tokens"].series) == 3
    assert [one.name for one in shown["gain"].series] == ["4x6", "4x8", "4x16"]


def test_the_width_law_is_drawn_as_it_was_fitted_beside_the_paper() -> None:
    source = add_analysis(study("widths"))
    fit = source["scaling"]["loss"]
    figure = figures(study("widths"))["loss-over-width"]
    line, paper = of(figure, "least-squares fit"), of(figure, "the paper’s slope, −0.0069")
    intercept, slope = fit["intercept"]["mean"], fit["slope"]["mean"]
    assert np.array(line.y, dtype=float) == pytest.approx(intercept + slope * np.array(line.x), abs=1e-12)
    assert np.polyfit(paper.x, np.array(paper.y, dtype=float), 1)[0] == pytest.approx(-0.0069)
    low, high = (np.array(values, dtype=float) for values in (line.low, line.high))
    assert ((low <= np.array(line.y)) & (np.array(line.y) <= high)).all()
    steepest = (low[-1] - high[0]) / (line.x[-1] - line.x[0])
    assert steepest == pytest.approx(fit["slope"]["interval"][0])
    assert [(of(figure, name, "points").x[0], of(figure, name, "points").y[0]) for name in fit["arms"]] == list(
        zip(np.log2(fit["widths"]), fit["losses"], strict=True)
    )
    assert figure.x.ticks == ((np.log2(1.5), "1.5"), (1.0, "2"), (2.0, "4"), (3.0, "8"))
    assert f"R² {fit['r2']:.3f}" in figure.caption


def test_the_gain_is_the_paired_difference_beside_recorded_seeds() -> None:
    source = study("fraction-rate")
    cells = add_analysis(source)["pairwise"]["loss"]
    source["recorded"] = {"tokens": 2_000_000, "arms": {"2x8": {"loss": [-0.05, -0.04], "loss_2": []}}}
    shown = figures(source)
    for place, name in enumerate(("1x4", "2x8", "4x16", "8x32")):
        series, cell = of(shown["gain"], name, "points"), cells[name]["plain"]["difference"]
        assert (list(series.x), list(series.y)) == ([place], [cell["mean"]])
        assert [series.low[0], series.high[0]] == cell["interval"]
    ring = of(shown["gain"], "recorded seeds", "ring")
    assert list(ring.y) == [-0.05, -0.04]
    assert all(1 < x < 2 for x in ring.x)
    assert "Rings" in shown["gain"].caption
    assert "Rings" not in shown["gain-2"].caption


def test_every_point_is_drawn_where_it_belongs_and_says_its_value() -> None:
    for figure in figures(study("mtp")).values():
        svg = draw(figure)
        root = ElementTree.fromstring(svg)
        circles = root.findall(".//{*}g[@class='hover']/{*}circle")
        shown = [
            (x, y, text)
            for series in figure.series
            for x, y, text in zip(series.x, series.y, series.hover, strict=False)
            if y is not None and text and (figure.y.range is None or figure.y.range[0] <= y <= figure.y.range[1])
        ]
        assert len(circles) == len(shown) > 0
        places = np.array([[float(circle.get("cx")), float(circle.get("cy"))] for circle in circles])
        for axis in (0, 1):
            values = np.array([point[axis] for point in shown])
            slope, start = np.polyfit(values, places[:, axis], 1)
            assert places[:, axis] == pytest.approx(slope * values + start, abs=0.1)
            assert np.sign(slope) == (1, -1)[axis]
        for circle, (*_, text) in zip(circles, shown, strict=True):
            assert text.replace("-", "−") in circle.find("{*}title").text
        # The last mean line that is drawn passes through its own circles.
        drawn = {(round(float(x)), round(float(y))) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", svg)}
        assert sum((round(x), round(y)) in drawn for x, y in places) >= len(places) // 2


def test_files_have_a_columns_width_stand_alone_and_are_small(tmp_path: Path) -> None:
    write_report(study("mtp"), tmp_path)
    folder = tmp_path / "figures"
    names = {f"{name}.svg" for name in figures(study("mtp"))}
    assert {path.name for path in folder.iterdir()} == names
    for name in names:
        text = (folder / name).read_text()
        svg = ElementTree.fromstring(text)
        assert svg.get("width") == "237.6pt"
        links = [value for node in svg.iter() for key, value in node.attrib.items() if key.endswith("href")]
        assert all(link.startswith("#") for link in links)
        assert len(text) < 50_000
        assert "RDF" not in text


def test_a_figure_of_the_page_has_its_own_ids_and_the_pages_colours() -> None:
    figure = figures(study("widths"))["loss-over-tokens"]
    shown = inline(draw(figure), "first", 'a "label" <')
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


def test_a_figure_that_is_gone_leaves_no_file_and_other_files_stay(tmp_path: Path) -> None:
    write_report(study("widths"), tmp_path)
    (tmp_path / "figures" / "mine.svg").write_bytes(b"mine")
    write_report(study("family"), tmp_path)
    left = {path.name for path in (tmp_path / "figures").iterdir()}
    assert "mine.svg" in left
    assert "gain.svg" in left
    assert not {"loss-over-width.svg", "loss-over-width-2.svg"} & left


def test_any_name_can_be_drawn() -> None:
    names = ("plain", HOSTILE, "名前\nline", "x" * 200)
    for figure in figures(realistic(names)).values():
        svg = draw(figure)
        ElementTree.fromstring(inline(svg, figure.identifier, figure.title))
        if figure.name == "loss-over-tokens":
            assert "&lt;b&gt;$\\frac$ &amp; x&lt;/b&gt;</text>" in svg
    many = realistic(("plain", *(f"4x{n}" for n in range(5, 25))), seeds=1)
    assert draw(figures(many)["loss-over-tokens"])


def test_colours_exist_in_both_modes() -> None:
    assert LIGHT.keys() == DARK.keys()
    styles = {series.style.colour for figure in figures(study("widths")).values() for series in figure.series}
    assert styles <= LIGHT.keys()
