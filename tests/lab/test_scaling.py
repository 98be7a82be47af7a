"""The log-linear fit over the virtual width factor, on losses whose law is known."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest

from curves import arm, curve, report
from vwn.lab.analysis.analyse import add_analysis
from vwn.lab.analysis.estimates import t_95
from vwn.lab.analysis.scaling import width_family

NAMES = {1.5: "4x6", 2.0: "4x8", 4.0: "4x16", 8.0: "4x32"}


def family(
    slopes: list[float], widths: list[float] | None = None, bend: float = 0.0, intercept: float = 3.0, **changes: Any
) -> list[dict[str, Any]]:
    """Runs with the given slope in each seed; seeds lie half a nat apart, which a fit within a seed must not see."""
    runs = []
    for seed, slope in enumerate(slopes):
        for r in widths or list(NAMES):
            x = math.log2(r)
            loss = intercept + seed / 2 + slope * x + bend * x * x
            runs.append(arm(NAMES[r], seed, curve([5, loss], [6, loss + 1]), **changes))
    return runs


def plain(losses: list[float]) -> list[dict[str, Any]]:
    return [arm("plain", seed, curve([5, loss], [6, loss + 1])) for seed, loss in enumerate(losses)]


def scaling(*runs: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return add_analysis(report(*runs, **changes))["scaling"]


@pytest.mark.parametrize("key", ["loss", "loss_2"])
def test_the_law_is_recovered(key: str) -> None:
    slopes = [-0.06, -0.07, -0.085]
    fit = scaling(*plain([3.2, 3.7, 4.2]), *family(slopes))[key]
    assert fit["widths"] == list(NAMES)
    assert fit["seeds"] == [0, 1, 2]
    assert fit["slope"]["mean"] == pytest.approx(statistics.mean(slopes))
    assert fit["slope"]["std"] == pytest.approx(statistics.stdev(slopes))
    half = t_95(3) * statistics.stdev(slopes) / math.sqrt(3)
    assert fit["slope"]["interval"] == pytest.approx([fit["slope"]["mean"] - half, fit["slope"]["mean"] + half])
    assert fit["intercept"]["mean"] == pytest.approx(3.5 + (key == "loss_2"))
    assert fit["r2"] == pytest.approx(1)
    assert fit["reason"] is None


def test_r2_and_slope_agree_with_the_sums_by_hand() -> None:
    losses = {2.0: 3.0, 4.0: 2.9, 8.0: 2.85}
    runs = [arm(NAMES[r], seed, curve([5, loss + seed])) for seed in (0, 1) for r, loss in losses.items()]
    fit = scaling(*runs)["loss"]
    x, y = [1.0, 2.0, 3.0], list(losses.values())
    correlation = statistics.correlation(x, y)
    assert fit["r2"] == pytest.approx(correlation**2)
    assert fit["slope"]["mean"] == pytest.approx(correlation * statistics.stdev(y) / statistics.stdev(x))


def test_the_baseline_is_not_fitted_and_two_widths_make_no_line() -> None:
    # As in the paper, the baseline is above the line that the widths lie on.
    fit = scaling(*plain([3.2, 3.7]), *family([-0.05, -0.051]))["loss"]
    assert fit["slope"]["mean"] == pytest.approx(-0.0505)
    assert "plain" not in fit["arms"]
    found = scaling(*plain([3.0, 3.5]), *family([-0.05, -0.051], [2.0, 4.0]))["loss"]
    assert found["slope"] is None
    assert found["reason"] == "2 different widths, where a line needs 3"


def test_one_seed_gives_a_line_without_an_interval() -> None:
    fit = scaling(*family([-0.05]))["loss"]
    assert fit["slope"] == {"mean": pytest.approx(-0.05), "std": None, "n": 1, "interval": None}


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        ([{"tokens": 100, "loss": 5.0}, {"tokens": 200, "loss": None}], "a run diverged"),
        ([{"tokens": 100, "loss": 5.0}, {"tokens": 300, "loss": 2.0}], "different budgets"),
        ([], "an arm has no data"),
    ],
)
def test_what_spoils_one_run_leaves_no_fit(points: list[dict[str, Any]], reason: str) -> None:
    runs = family([-0.05, -0.06])
    runs[1] = {**runs[1], "curve": points}
    fit = scaling(*runs)["loss"]
    assert fit["slope"] is None
    assert fit["reason"] == reason


def test_only_seeds_that_all_widths_share_are_fitted() -> None:
    runs = family([-0.05, -0.06, -0.07])
    fit = scaling(*[run for run in runs if (run["name"], run["seed"]) != ("4x8", 1)])["loss"]
    assert fit["seeds"] == [0, 2]
    assert fit["slope"]["mean"] == pytest.approx(-0.06)
    apart = [run for run in runs if run["seed"] == (run["name"] == "4x8")]
    assert scaling(*apart)["loss"]["reason"] == "the arms share no seed"


def test_the_family_differs_in_width_alone() -> None:
    about = {"connection": "ghc", "embedding": "direct", "mtp": 1}
    runs = family([-0.05], **about)
    runs += [
        arm("plain", 0, curve([5, 4]), connection="residual", embedding="direct", mtp=1),
        arm("1x4", 0, curve([5, 4]), **about),
        arm("hc", 0, curve([5, 4]), **{**about, "connection": "hc"}, m=1, n=2, r=2.0),
        arm("8x64", 0, curve([5, 4]), **{**about, "embedding": "factorised"}),
        arm("4x64", 0, curve([5, 4]), **{**about, "mtp": 0}),
        arm("static", 0, curve([5, 4]), **about, m=4, n=64, r=16.0, options={"static": True}),
    ]
    assert list(width_family(report(*runs))) == list(NAMES.values())
    assert list(width_family(report(*runs, study="widths"))) == list(NAMES.values())
    assert width_family(report(runs[-5])) == {"1x4": [runs[-5]]}
    assert width_family(report(*plain([3.0]))) == {}
