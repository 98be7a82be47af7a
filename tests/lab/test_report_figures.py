"""The report's figures: what they show, of which data, the same on the page and in the files."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from curves import STUDY_ARMS, arm, arms_of, curve, power_law, realistic, report, study, sweep_of
from vwn.lab.analysis.analyse import add_analysis
from vwn.lab.report.draw_files import draw_files, tokens_label
from vwn.lab.report.draw_plotly import plotly_figure
from vwn.lab.report.figures import NAMES, Figure, Series, finite_runs
from vwn.lab.report.page_assets import DARK, LIGHT
from vwn.lab.report.write import report_figures, write_report

TRAINING = {"loss-over-tokens", "gap-over-tokens", "speedup-over-tokens"}
HOSTILE = "<b>$\\frac$ & x</b>"


def figures(source: dict[str, Any]) -> dict[str, Figure]:
    return {figure.identifier: figure for figure in report_figures(add_analysis(source))}


def of(figure: Figure, name: str, role: str = "mean") -> Series:
    (found,) = [series for series in figure.series if series.name == name and series.role == role]
    return found


@pytest.mark.parametrize("name", STUDY_ARMS)
def test_each_study_has_the_figures_that_its_data_has(name: str) -> None:
    found = figures(study(name))
    own = {"widths": "loss-over-width", "fraction-rate": "loss-over-fraction-rate", "mtp": "loss-over-mtp"}
    expected = TRAINING | {"sweep"} | ({own[name]} if name in own else set())
    assert {figure.name for figure in found.values()} == expected
    assert "loss-over-tokens-2" in found
    # The baseline of the study of MTP has no next-2-token loss to be held against.
    assert ("gap-over-tokens-2" in found) == (name != "mtp")
    assert {figure.name for figure in found.values()} <= set(NAMES)
    assert len(found) == len(report_figures(add_analysis(study(name))))


def test_nothing_is_drawn_of_nothing() -> None:
    assert figures(report()) == {}
    assert figures(report(arm("plain", 0, []))) == {}
    assert list(figures(report(arm("plain", 0, curve([4, 3]))))) == ["loss-over-tokens"]
    assert draw_files([]) == {}


def test_the_loss_is_drawn_with_its_target_and_where_the_widest_arm_reaches_it() -> None:
    source = add_analysis(
        report(*arms_of("plain", power_law()), *arms_of("4x16", power_law(speed=1.5)), study="widths")
    )
    (figure,) = [found for found in report_figures(source) if found.identifier == "loss-over-tokens"]
    finals = [run["curve"][-1]["loss"] for run in source["arms"] if run["name"] == "plain"]
    assert figure.level == pytest.approx(np.mean(finals), rel=1e-12)
    (note,) = figure.notes
    assert note.x == pytest.approx(1_000_000 / 1.5, rel=2e-3)
    assert (note.lines[0][:10], note.lines[1]) == ("4x16: 66.7", "of plain’s tokens")
    assert of(figure, "4x16").y[3] == pytest.approx(np.mean([p[3]["loss"] for p in power_law(speed=1.5)]), rel=1e-12)
    assert figure.y.range is not None
    assert figure.y.range[0] < figure.level - 0.15 * (figure.y.range[1] - figure.level)


def test_no_place_is_marked_that_some_seed_does_not_reach() -> None:
    arms = [arm("plain", seed, curve([5, 4, 3, 2])) for seed in (0, 1)]
    arms += [arm("4x16", 0, curve([5, 3, 2, 1])), arm("4x16", 1, curve([5, 4, 3, 2.5]))]
    assert figures(report(*arms))["loss-over-tokens"].notes == ()


def test_gap_and_speedup_have_the_interval_over_seeds_as_their_band() -> None:
    source = add_analysis(study("widths"))
    shown = figures(study("widths"))
    row = next(found for found in source["summary"] if found["name"] == "4x32")["loss"]
    for name, points in (("gap-over-tokens", row["gap_curve"]), ("speedup-over-tokens", row["speedup_curve"])):
        series = of(shown[name], "4x32")
        assert list(series.y) == [point["mean"] for point in points]
        assert list(zip(series.low, series.high, strict=True)) == [tuple(p["interval"]) for p in points]
        assert not any(one.role == "seed" for one in shown[name].series)
        assert "Band: 95\u00a0% interval" in shown[name].caption


def test_a_band_wider_than_the_figure_gives_way_to_the_seeds() -> None:
    shown = figures(study("widths", seeds=2, noise=0.05))
    for name in ("gap-over-tokens", "speedup-over-tokens"):
        seeds = [one for one in shown[name].series if one.role == "seed" and one.name == "4x32"]
        mean = of(shown[name], "4x32")
        assert len(seeds) == 2
        assert not mean.low
        assert "95 %:" in mean.hover[-1]
        assert "4x32 each seed is drawn faint" in shown[name].caption
        place = mean.x.index(1_000_000)
        values = [one.y[one.x.index(1_000_000)] for one in seeds]
        assert mean.y[place] == pytest.approx(np.mean(np.array(values, dtype=float)))


def test_a_diverged_arm_shows_its_seeds_and_no_mean() -> None:
    source = study("widths")
    source["arms"][-1]["curve"][-1]["loss"] = math.nan
    figure = figures(source)["gap-over-tokens"]
    assert [one.role for one in figure.series if one.name == "4x32"] == ["seed"] * 3
    assert figure.legend[4].name == "4x32"
    assert "of which one diverged" in figure.caption
    assert not any(one.name == "4x32" for one in figures(source)["speedup-over-tokens"].series)


def test_the_width_law_is_drawn_as_it_was_fitted_beside_the_paper() -> None:
    source = add_analysis(study("widths"))
    fit = source["scaling"]["loss"]["without_baseline"]
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
    assert f"R² {fit['r2']:.3f}" in figure.remark
    seeds = [one for one in figure.series if one.role == "seed"]
    assert len(seeds) == 3
    assert all(np.mean(np.array(one.y, dtype=float)) == pytest.approx(np.mean(fit["losses"])) for one in seeds)


def test_the_law_of_one_seed_has_no_band() -> None:
    line = of(figures(study("widths", seeds=1))["loss-over-width"], "least-squares fit")
    assert not line.low


def test_fraction_rate_and_mtp_show_the_paired_difference() -> None:
    source = add_analysis(study("fraction-rate"))
    (series,) = figures(study("fraction-rate"))["loss-over-fraction-rate"].series
    cells = [source["pairwise"]["loss"][f"{m}x{4 * m}"]["plain"]["difference"] for m in (1, 2, 4, 8)]
    assert series.name == "r = 4"
    assert list(series.x) == [0, 1, 2, 3]
    assert list(series.y) == [cell["mean"] for cell in cells]
    assert [list(pair) for pair in zip(series.low, series.high, strict=True)] == [cell["interval"] for cell in cells]
    shuffled = study("mtp")
    shuffled["arms"].reverse()
    wide, plain = figures(shuffled)["loss-over-mtp"].series
    assert (plain.name, wide.name) == ("plain", "4x16")
    assert list(plain.x) == list(wide.x) == [0, 1]
    assert plain.y[0] == 0
    assert plain.low[0] is None
    means = add_analysis(study("mtp"))["pairwise"]["loss"]
    assert list(wide.y) == [means[name]["plain"]["difference"]["mean"] for name in ("4x16", "4x16+mtp")]


def test_an_arm_that_diverged_is_left_out_of_them() -> None:
    source = study("fraction-rate")
    source["arms"][-1]["curve"][-1]["loss"] = None
    (series,) = figures(source)["loss-over-fraction-rate"].series
    assert list(series.x) == [0, 1, 2]


def test_the_sweep_rings_the_rate_taken_and_leaves_out_what_diverged() -> None:
    source = study("widths")
    source["sweep"][2] = sweep_of("4x8", 2, bracketed=False)
    source["sweep"][3]["rates"][2]["loss"] = 80.0
    figure = figures(source)["sweep"]
    assert [2**x for x in of(figure, "4x6", "points").x] == pytest.approx([0.003, 0.006])
    ring = of(figure, "4x32", "ring")
    assert (2 ** ring.x[0], ring.y[0]) == pytest.approx((0.006, 3.18))
    assert figure.y.range is not None
    assert figure.y.range[1] < 5
    assert "double click" in figure.caption
    given = [{"arm": "plain", "seed": None, "steps": None, "rates": [], "best": 0.01, "bracketed": False}]
    assert "sweep" not in figures(realistic() | {"sweep": given})


def test_plotly_draws_the_series() -> None:
    for figure in figures(study("widths")).values():
        specification = plotly_figure(figure)
        lines = [trace for trace in specification["data"] if "fill" not in trace]
        assert [(trace["x"], trace["y"]) for trace in lines] == [(list(s.x), list(s.y)) for s in figure.series]
        for series in figure.series:
            if series.role == "mean" and series.low:
                (band,) = [t for t in specification["data"] if "fill" in t and t["meta"] == series.style.index]
                edges = [v for v in band["y"] if v is not None]
                assert sorted(edges) == sorted(v for v in (*series.low, *series.high) if v is not None)
                assert band["y"][0] == next(v for v in series.high if v is not None)


def test_both_kinds_of_drawing_have_the_same_points() -> None:
    from vwn.lab.report import draw_files as files

    for figure in figures(study("mtp")).values():
        (axes, *_) = files._draw([figure]).axes
        drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines[: len(figure.series)]]
        for (x, y), series in zip(drawn, figure.series, strict=True):
            assert x == pytest.approx(list(series.x))
            assert np.array(y) == pytest.approx(np.array(series.y, dtype=float), nan_ok=True)
        edges = [y for bounds in axes.collections for path in bounds.get_paths() for y in path.vertices[:, 1]]
        given = {v for series in figure.series for v in (*series.low, *series.high) if v is not None}
        assert {round(y, 9) for y in edges} == {round(y, 9) for y in given}


def test_files_have_a_papers_width_and_stand_alone(tmp_path: Path) -> None:
    write_report(study("mtp"), tmp_path)
    folder = tmp_path / "figures"
    names = TRAINING | {"loss-over-mtp", "sweep"}
    assert {path.name for path in folder.iterdir()} == {f"{name}.{form}" for name in names for form in ("png", "svg")}
    for name in names:
        width = 6.8 if name == "loss-over-tokens" else 3.3
        png = (folder / f"{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG")
        assert struct.unpack(">I", png[16:20])[0] == pytest.approx(300 * width, abs=1)
        svg = ElementTree.fromstring((folder / f"{name}.svg").read_bytes())
        assert svg.get("width") == f"{72 * width:g}pt"
        links = [value for node in svg.iter() for key, value in node.attrib.items() if key.endswith("href")]
        assert all(link.startswith("#") for link in links)


def test_files_are_the_same_for_the_same_report() -> None:
    drawn = [draw_files(report_figures(add_analysis(realistic()))) for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_a_figure_that_is_gone_leaves_no_file_and_other_files_stay(tmp_path: Path) -> None:
    write_report(study("widths"), tmp_path)
    (tmp_path / "figures" / "mine.png").write_bytes(b"mine")
    write_report(study("family"), tmp_path)
    left = {path.name for path in (tmp_path / "figures").iterdir()}
    assert "mine.png" in left
    assert "sweep.svg" in left
    assert "loss-over-width.png" not in left


def test_any_name_can_be_drawn() -> None:
    names = ("plain", HOSTILE, "名前\nline", "x" * 200)
    drawn = draw_files(report_figures(add_analysis(realistic(names))))
    for name, content in drawn.items():
        if name.endswith("svg"):
            ElementTree.fromstring(content)
    traces = plotly_figure(figures(realistic(names))["loss-over-tokens"])["data"]
    assert "&lt;b&gt;$\\frac$ &amp; x&lt;/b&gt;" in {trace["name"] for trace in traces}


def test_colours_exist_in_both_modes() -> None:
    assert LIGHT.keys() == DARK.keys()
    styles = {series.style.colour for figure in figures(study("widths")).values() for series in figure.series}
    assert styles <= LIGHT.keys()


def test_bands_are_drawn_piece_by_piece() -> None:
    assert list(finite_runs([1, None, 2, 3], [1, 1, 2, 3])) == [slice(0, 1), slice(2, 4)]
    assert list(finite_runs([], [])) == []


@pytest.mark.parametrize(("tokens", "label"), [(0, "0"), (5e5, "500k"), (1.5e6, "1.5M"), (2e9, "2G"), (3e12, "3T")])
def test_tokens_are_labelled_as_on_the_page(tokens: float, label: str) -> None:
    assert tokens_label(tokens) == label
