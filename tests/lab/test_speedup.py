"""Speed-up and gap over training, and arms at equal cost, on curves whose answers are known."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest

from curves import arm, arms_of, curve, power_law, report
from vwn.lab.analysis.analyse import add_analysis
from vwn.lab.analysis.compute import is_uneven, speed_ratio
from vwn.lab.analysis.curves import Curve
from vwn.lab.analysis.speedup import speedup_at

NAN = math.nan


def summary(*runs: dict[str, Any], **changes: Any) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in add_analysis(report(*runs, **changes))["summary"]}


def plain(**law: Any) -> list[dict[str, Any]]:
    return arms_of("plain", power_law(**law))


def losses(values: list[float]) -> Curve:
    return Curve(np.arange(100.0, 100 * len(values) + 1, 100), np.array(values, dtype=float))


@pytest.mark.parametrize("speed", [0.8, 1.0, 1.3, 2.5])
def test_a_known_speedup_is_recovered_all_along(speed: float) -> None:
    for key in ("loss", "loss_2"):
        row = summary(*plain(), *arms_of("4x16", power_law(speed=speed)))["4x16"][key]
        points = [p for p in row["speedup_curve"] if p["status"] == "reached"]
        assert len(points) >= (15 if speed >= 1 else 0)
        assert [p["tokens"] for p in row["speedup_curve"]] == [50_000 * i for i in range(2, 21)]
        # The chord of twenty points is above the law by up to 2 % early, and by 0.2 % from half of the budget on.
        for point in points:
            assert point["mean"] == pytest.approx(speed, rel=0.02 if point["tokens"] < 500_000 else 0.002)
            assert point["n"] == point["pairs"] == 3
        if speed < 1:
            assert row["speedup_curve"][-1]["status"] == "not reached"
            assert row["speedup_curve"][-1]["mean"] is None
        if speed == 1:
            assert all(p["mean"] == 1 for p in points)


def test_the_last_point_is_the_speedup_at_the_final_loss() -> None:
    result = add_analysis(report(*plain(), *arms_of("4x16", power_law(speed=1.6, noise=0.01))))
    for run in result["arms"][3:]:
        last = run["paired"]["loss"]["speedup_curve"][-1]["speedup"]
        assert last == pytest.approx(run["paired"]["loss"]["speedup"], rel=1e-12)
    assert result["arms"][0]["paired"]["loss"]["speedup_curve"] == []
    assert result["summary"][0]["loss"]["speedup_curve"] == []
    assert result["summary"][0]["loss"]["gap_growth"] is None


@pytest.mark.parametrize(
    ("arm_losses", "base_losses", "target", "status", "speedup"),
    [
        ([4, 2, 1, 1], [4, 3, 2, 1], 2, "reached", 1.5),
        ([4, 2, 3, 1.5], [4, 3, 2, 1], 2, "reached", 300 / (300 * (4 / 3) ** (1 / 1.5))),
        ([4, 2, 2.5, 2.5], [4, 3, 2, 1], 2, "not reached", None),
        ([4, 3, 3, 3], [4, 3, 2, 1], 2, "not reached", None),
        ([2, 1, 1, 1], [4, 3, 2, 1], 2, "lower bound", 3.0),
        ([4, NAN, 2, 1], [4, 3, 2, 1], 2, "diverged", None),
        ([4, 3, 2, 1], [4, 2, 3, 2.5], 2, "no target", None),
        ([4, 2, 1, 1], [4, 2, 3, 1], 2, "reached", 300 * (4 / 3) ** 0.5 / 200),  # both by "stays below"
        ([3, 2, 1, 1], [2, 2, 2, 2], 2, "no target", None),
    ],
)
def test_speedup_at_a_loss(
    arm_losses: list[float], base_losses: list[float], target: float, status: str, speedup: float | None
) -> None:
    found = speedup_at(losses(arm_losses), losses(base_losses), target)
    assert found["status"] == status
    assert found["speedup"] == (None if speedup is None else pytest.approx(speedup))


def test_a_seed_that_does_not_reach_leaves_no_mean() -> None:
    runs = [*plain(seeds=2), arm("4x16", 0, power_law(1, speed=2)[0]), arm("4x16", 1, power_law(2, gap=0.5)[1])]
    row = summary(*runs)["4x16"]["loss"]
    assert row["speedup_curve"][-1] == {
        **{"tokens": 1_000_000.0, "mean": None, "std": None, "n": 1, "interval": None, "pairs": 2},
        "status": "not reached in every seed",
    }
    assert row["speedup_growth"]["verdict"] == "not significant"
    assert "not reached in 1 of 2 seeds" in row["speedup_growth"]["reason"]


def test_a_diverged_seed_leaves_no_number_anywhere() -> None:
    for broken in ("plain", "4x16"):
        runs = copy.deepcopy(plain() + arms_of("4x16", power_law(speed=2)))
        next(r for r in runs if r["name"] == broken and r["seed"] == 1)["curve"][-1]["loss"] = None
        row = summary(*runs)["4x16"]["loss"]
        assert {p["status"] for p in row["speedup_curve"]} <= {"diverged"}
        assert all(p["mean"] is None for p in row["speedup_curve"] + row["gap_curve"])
        assert row["speedup"]["mean"] is None
        for field in ("gap_growth", "speedup_growth"):
            assert row[field]["change"]["mean"] is None
            assert row[field]["reason"] == "a run diverged"
        for field in ("equal_flops", "equal_seconds"):
            assert row[field]["difference"]["mean"] is None
            assert row[field]["status"] == "diverged"


def test_the_gap_is_a_curve_with_its_interval() -> None:
    runs = plain() + arms_of("4x16", power_law(gap=-0.1, noise=0.01))
    points = summary(*runs)["4x16"]["loss"]["gap_curve"]
    assert len(points) == 21
    half = 4.303 * 0.01 / math.sqrt(3)
    for point in points[1:]:
        assert point["mean"] == pytest.approx(-0.1)
        assert point["std"] == pytest.approx(0.01)
        assert point["interval"] == pytest.approx([-0.1 - half, -0.1 + half])


def drifting(slope: float, spread: float, seeds: int = 3) -> list[dict[str, Any]]:
    """A gap of -0.1 at half of the budget that changes by `slope` (times 1 - spread, 1, 1 + spread) to its end."""
    curves = copy.deepcopy(power_law(seeds))
    for seed, points in enumerate(curves):
        for point in points[1:]:
            share = point["tokens"] / 1_000_000
            point["loss"] -= 0.1 + slope * (1 + spread * (seed % 3 - 1)) * (2 * share - 1)
    return arms_of("4x16", curves)


@pytest.mark.parametrize(
    ("slope", "spread", "seeds", "expected"),
    [
        (0.05, 0.1, 3, "grows"),
        (-0.05, 0.1, 3, "shrinks"),
        (0.05, 1.0, 3, "not significant"),
        (0.0, 0.0, 3, "not significant"),  # zero variance, and nothing but rounding to judge
        (0.05, 0.1, 1, "not significant"),
        (0.05, 0.0, 2, "grows"),
    ],
)
def test_whether_the_gap_grows(slope: float, spread: float, seeds: int, expected: str) -> None:
    grown = summary(*plain(seeds=seeds), *drifting(slope, spread, seeds))["4x16"]["loss"]["gap_growth"]
    assert grown["verdict"] == expected
    assert (grown["reason"] is None) == (expected != "not significant")
    assert grown["half"]["mean"] == pytest.approx(0.1)
    mean = slope * (1 - spread) if seeds == 1 else slope * (1 - spread / 2) if seeds == 2 else slope
    assert grown["change"]["mean"] == pytest.approx(mean, abs=1e-12)
    if seeds == 1:
        assert grown["reason"] == "one seed"


def test_whether_the_speedup_grows() -> None:
    # The arm's clock runs ever faster: after t tokens it is where the baseline is after t (1 + t / budget).
    curves = []
    for seed, points in enumerate(power_law(points=40)):
        factor = 1 + 0.05 * (seed - 1)
        ahead = [p["tokens"] * (1 + factor * p["tokens"] / 1_000_000) for p in points]
        told = [8.0 if t == 0 else 2 + seed / 50 + 200 * t**-0.3 for t in ahead]
        curves.append([{**p, "loss": loss} for p, loss in zip(points, told, strict=True)])
    row = summary(*plain(points=40), *arms_of("4x16", curves))["4x16"]["loss"]
    # t (1 + t) = s has t = (sqrt(1 + 4 s) - 1) / 2, and the speed-up is s / t.
    ends = [s / ((math.sqrt(1 + 4 * s) - 1) / 2) for s in (0.5, 1.0)]
    assert row["speedup_growth"]["half"]["mean"] == pytest.approx(ends[0], rel=2e-3)
    assert row["speedup_growth"]["end"]["mean"] == pytest.approx(ends[1], rel=2e-3)
    assert row["speedup_growth"]["verdict"] == "grows"
    constant = summary(*plain(), *arms_of("4x16", power_law(speed=1.5, noise=0.003)))["4x16"]["loss"]
    assert constant["speedup_growth"]["verdict"] == "not significant"


def test_growth_asks_for_a_point_in_the_first_half() -> None:
    runs = [arm("plain", 0, curve([4, 3], step=100)[1:]), arm("4x16", 0, curve([4, 2], step=100)[1:])]
    grown = summary(*runs)["4x16"]["loss"]["gap_growth"]
    assert grown["verdict"] == "not significant"
    assert "no validation point in the first half" in grown["reason"]


def test_unequal_budgets_do_not_judge_growth() -> None:
    runs = plain(seeds=2) + arms_of("4x16", [points[:-1] for points in power_law(2, speed=2)])
    row = summary(*runs)["4x16"]["loss"]
    assert row["gap_growth"]["reason"] == "no pair of runs with one budget"
    assert row["gap_growth"]["half"]["mean"] is None


@pytest.mark.parametrize("factor", [1.0, 1.25, 0.8])
def test_at_equal_flops_the_costlier_run_is_read_earlier(factor: float) -> None:
    runs = arms_of("plain", power_law(), flops_per_token=1e6)
    runs += arms_of("4x16", power_law(gap=-0.05, noise=0.01), flops_per_token=factor * 1e6)
    result = add_analysis(report(*runs))
    row = result["summary"][1]["loss"]["equal_flops"]
    shares = min(1, 1 / factor), min(1, factor)
    expected = -0.05 + 200 * (1e6 * shares[0]) ** -0.3 - 200 * (1e6 * shares[1]) ** -0.3
    assert row["difference"]["mean"] == pytest.approx(expected, abs=1e-9)
    assert row["difference"]["std"] == pytest.approx(0.01)
    assert (row["arm_share"], row["baseline_share"]) == pytest.approx(shares)
    assert row["verdict"] == {1.0: "lower", 1.25: "higher", 0.8: "lower"}[factor]


def test_at_equal_time_the_slower_run_is_read_earlier() -> None:
    slow = power_law(speed=1.5)
    for points in slow:
        for point in points:
            point["seconds"] *= 2
    row = summary(*plain(), *arms_of("4x16", slow))["4x16"]["loss"]["equal_seconds"]
    assert row["difference"]["mean"] == pytest.approx(200 * (0.75e6) ** -0.3 - 200 * (1e6) ** -0.3)
    assert row["arm_share"] == pytest.approx(0.5)
    assert row["verdict"] == "higher"
    flipped = [
        {**run, "name": {"plain": "4x16", "4x16": "plain"}[run["name"]]} for run in [*plain(), *arms_of("4x16", slow)]
    ]
    row = summary(*flipped)["4x16"]["loss"]["equal_seconds"]
    assert row["difference"]["mean"] == pytest.approx(200 * (1e6) ** -0.3 - 200 * (0.75e6) ** -0.3)
    assert (row["arm_share"], row["baseline_share"]) == pytest.approx((1.0, 0.5))


def test_the_median_step_is_the_clock_where_it_is_known() -> None:
    # The wall clock says that both are as fast; half of the plain runs' time went elsewhere.
    runs = arms_of("plain", power_law(), step_seconds_median=0.1) + arms_of(
        "4x16", power_law(), step_seconds_median=0.2
    )
    found = summary(*runs)["4x16"]["loss"]["equal_seconds"]
    assert (found["arm_share"], found["baseline_share"]) == pytest.approx((0.5, 1.0))
    assert found["difference"]["mean"] == pytest.approx(200 * (0.5e6) ** -0.3 - 200 * (1e6) ** -0.3)


@pytest.mark.parametrize(
    ("changes", "seconds", "expected"),
    [
        ({}, [10, 20, 30, 40, 50], False),
        ({}, [10, 20, 30, 40, 58], True),
        ({"step_seconds_median": 0.1, "step_seconds_p90": 0.14}, [10, 20, 30, 40, 58], False),
        ({"step_seconds_median": 0.1, "step_seconds_p90": 0.16}, [10, 20, 30, 40, 50], True),
    ],
)
def test_an_uneven_speed_is_noticed(changes: dict[str, float], seconds: list[float], expected: bool) -> None:
    points = [{**p, "seconds": s} for p, s in zip(curve([5, 4, 3, 2, 1]), seconds, strict=True)]
    assert is_uneven(arm("plain", 0, points, **changes)) == expected
    assert speed_ratio(arm("plain", 0, points, **changes), arm("plain", 0, points)) == 1


def test_without_flops_or_a_clock_there_is_no_number() -> None:
    points = copy.deepcopy(power_law(1))
    points[0][3]["seconds"] = None
    row = summary(*plain(seeds=1), *arms_of("4x16", points, flops_per_token=None))["4x16"]["loss"]
    assert (row["equal_flops"]["status"], row["equal_flops"]["difference"]["mean"]) == ("no FLOPs", None)
    assert (row["equal_seconds"]["status"], row["equal_seconds"]["difference"]["mean"]) == ("no clock", None)
    stopped = copy.deepcopy(power_law(1))
    stopped[0][3]["seconds"] = stopped[0][2]["seconds"]
    assert summary(*plain(seeds=1), *arms_of("4x16", stopped))["4x16"]["loss"]["equal_seconds"]["status"] == "no clock"


def test_empty_curves_and_a_missing_baseline_have_no_course() -> None:
    for runs in ([arm("plain", 0, power_law(1)[0]), arm("4x16", 0, [])], [arm("4x16", 0, power_law(1)[0])]):
        row = summary(*runs)["4x16"]["loss"]
        assert row["gap_curve"] == row["speedup_curve"] == []
        assert row["gap_growth"]["verdict"] == row["speedup_growth"]["verdict"] == "not significant"
        assert row["equal_flops"]["status"] in ("no data", "no baseline")


def test_a_baseline_that_goes_flat_is_measured_by_the_same_rule() -> None:
    flat = curve([5, 4, 3, 3, 3])
    row = summary(arm("plain", 0, flat), arm("4x16", 0, flat))["4x16"]["loss"]
    assert [p["mean"] for p in row["speedup_curve"] if p["status"] == "reached"] == [1, 1, 1, 1]
