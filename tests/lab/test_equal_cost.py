"""Arms at equal cost, on curves whose answers are known."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from curves import arm, arms_of, curve, power_law, report
from vwn.lab.analysis.analyse import add_analysis
from vwn.lab.analysis.compute import cost_ratio, is_uneven


def summary(*runs: dict[str, Any], **changes: Any) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in add_analysis(report(*runs, **changes))["summary"]}


def plain(**law: Any) -> list[dict[str, Any]]:
    return arms_of("plain", power_law(**law))


def test_a_diverged_seed_leaves_no_number_anywhere() -> None:
    for broken in ("plain", "4x16"):
        runs = copy.deepcopy(plain() + arms_of("4x16", power_law(speed=2)))
        next(r for r in runs if r["name"] == broken and r["seed"] == 1)["curve"][-1]["loss"] = None
        row = summary(*runs)["4x16"]["loss"]
        assert row["tokens_fraction"]["mean"] is None
        for field in ("equal_flops", "equal_seconds"):
            assert row[field]["difference"]["mean"] is None
            assert row[field]["status"] == "diverged"


@pytest.mark.parametrize("factor", [1.0, 1.25, 0.8])
def test_at_equal_flops_the_costlier_run_is_read_earlier(factor: float) -> None:
    runs = arms_of("plain", power_law(), flops_per_token=1e6)
    runs += arms_of("4x16", power_law(gap=-0.05, noise=0.01), flops_per_token=factor * 1e6)
    row = add_analysis(report(*runs))["summary"][1]["loss"]["equal_flops"]
    shares = min(1, 1 / factor), min(1, factor)
    expected = -0.05 + 200 * (1e6 * shares[0]) ** -0.3 - 200 * (1e6 * shares[1]) ** -0.3
    assert row["difference"]["mean"] == pytest.approx(expected, abs=1e-9)
    assert row["difference"]["std"] == pytest.approx(0.01)
    assert (row["arm_share"], row["baseline_share"]) == pytest.approx(shares)
    assert row["verdict"] == {1.0: "lower", 1.25: "higher", 0.8: "lower"}[factor]


@pytest.mark.parametrize(
    ("plain_speed", "wide_speed"),
    [
        ({"tokens_per_second": 1000}, {"tokens_per_second": 500}),
        # The mean says that both are as fast; half of the plain runs' time went elsewhere.
        (
            {"tokens_per_second": 500, "step_seconds_median": 0.1},
            {"tokens_per_second": 500, "step_seconds_median": 0.2},
        ),
    ],
)
def test_at_equal_time_the_slower_run_is_read_earlier(
    plain_speed: dict[str, float], wide_speed: dict[str, float]
) -> None:
    slow = power_law(speed=1.5)
    runs = [*arms_of("plain", power_law(), **plain_speed), *arms_of("4x16", slow, **wide_speed)]
    row = summary(*runs)["4x16"]["loss"]["equal_seconds"]
    assert row["difference"]["mean"] == pytest.approx(200 * (0.75e6) ** -0.3 - 200 * (1e6) ** -0.3)
    assert row["arm_share"] == pytest.approx(0.5)
    assert row["verdict"] == "higher"
    flipped = [{**run, "name": {"plain": "4x16", "4x16": "plain"}[run["name"]]} for run in runs]
    row = summary(*flipped)["4x16"]["loss"]["equal_seconds"]
    assert row["difference"]["mean"] == pytest.approx(200 * (1e6) ** -0.3 - 200 * (0.75e6) ** -0.3)
    assert (row["arm_share"], row["baseline_share"]) == pytest.approx((1.0, 0.5))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, False),
        ({"step_seconds_median": 0.1, "step_seconds_p90": 0.14}, False),
        ({"step_seconds_median": 0.1, "step_seconds_p90": 0.16}, True),
    ],
)
def test_an_uneven_speed_is_noticed(changes: dict[str, float], expected: bool) -> None:
    points = curve([5, 4, 3, 2, 1])
    assert is_uneven(arm("plain", 0, points, **changes)) == expected
    assert cost_ratio(arm("plain", 0, points, **changes), arm("plain", 0, points), "seconds") == 1


def test_without_flops_or_a_clock_there_is_no_number() -> None:
    nothing = {"flops_per_token": None, "tokens_per_second": None}
    row = summary(*plain(seeds=1), *arms_of("4x16", power_law(1), **nothing))["4x16"]["loss"]
    assert (row["equal_flops"]["status"], row["equal_flops"]["difference"]["mean"]) == ("no FLOPs", None)
    assert (row["equal_seconds"]["status"], row["equal_seconds"]["difference"]["mean"]) == ("no clock", None)
