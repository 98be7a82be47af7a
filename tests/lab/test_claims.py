"""Verdicts on the four claims, on every pair of arms and on controls: each word, and never one that is not earned."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest

from curves import arm, arms_of, curve, power_law, realistic, report
from vwn.lab.analysis.analyse import add_analysis
from vwn.lab.analysis.verdicts import combined

HELD, NOT_HELD, UNDECIDED, UNTESTED = "supported", "contradicted", "inconclusive", "not tested"


def judged(*runs: dict[str, Any], **changes: Any) -> dict[str, dict[str, Any]]:
    """The claims by their letter: each {"word", "heads", "rows", "rule"}."""
    return {claim["title"][1]: claim for claim in add_analysis(report(*runs, **changes))["verdicts"]}


def spread(speeds: list[float], second: list[float] | None = None, points: int = 20) -> list[list[dict[str, Any]]]:
    """One curve per seed, `speeds` times as fast as the baseline of the seed, `second` times in next-2-token loss."""
    curves = []
    for seed, speed in enumerate(speeds):
        first = power_law(len(speeds), speed=speed, points=points)[seed]
        other = power_law(len(speeds), speed=second[seed] if second else speed, points=points)[seed]
        curves.append([{**p, "loss_2": q["loss_2"]} for p, q in zip(first, other, strict=True)])
    return curves


def plain(seeds: int = 3, **changes: Any) -> list[dict[str, Any]]:
    return arms_of("plain", power_law(seeds), **changes)


FAST = [1.48, 1.5, 1.52]


@pytest.mark.parametrize(
    ("factors", "expected"),
    [((1.15, 1.01), HELD), ((1.16, 1.01), NOT_HELD), ((1.16, 1.2), NOT_HELD), ((None, 1.0), UNTESTED)],
)
def test_compute_is_judged_by_flops_and_told_with_the_speed(factors: tuple[Any, ...], expected: str) -> None:
    runs = plain(flops_per_token=1e6, tokens_per_second=1000)
    for name, factor in zip(("4x8", "4x16"), factors, strict=True):
        flops = None if factor is None else factor * 1e6
        runs += arms_of(name, power_law(), flops_per_token=flops, tokens_per_second=700)
    claim = judged(*runs)["a"]
    assert claim["word"] == expected
    assert [row[2] for row in claim["rows"]] == ["0.70×", "0.70×"]
    if factors[0]:
        assert claim["rows"][0][:2] == ["4x8", f"{factors[0]:.3f}×"]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (FAST, [1.78, 1.8, 1.83], HELD),
        (FAST, FAST, UNDECIDED),  # faster in both, but not more so
        (FAST, [1.2, 1.21, 1.22], NOT_HELD),  # faster in both, and less so
        ([1.02, 1.5, 1.9], [2.5, 2.52, 2.49], UNDECIDED),  # next-token interval reaches below 1
        ([0.7, 0.72, 0.69], [0.7, 0.72, 0.69], NOT_HELD),  # ends above the baseline in every seed
        ([0.95, 1.5, 1.5], [2.5, 2.52, 2.49], UNDECIDED),  # not reached in one seed
        ([1.5], [2.0], UNDECIDED),
    ],
)
def test_fewer_tokens(first: list[float], second: list[float], expected: str) -> None:
    claim = judged(*plain(len(first)), *arms_of("4x16", spread(first, second)))["b"]
    assert claim["word"] == expected
    ((arm_name, next_token, next_2_token, difference, word),) = claim["rows"]
    assert (arm_name, word) == ("4x16", expected)
    if min(first) > 1:
        assert float(next_token.split("×")[0]) == pytest.approx(sum(first) / len(first), abs=0.02)
        assert float(next_2_token.split("×")[0]) == pytest.approx(sum(second) / len(second), abs=0.02)
        assert float(difference.split()[0]) == pytest.approx(
            sum(second) / len(second) - sum(first) / len(first), abs=0.02
        )
        assert (" to " in next_token) == (len(first) > 1)
    else:
        reached = sum(speed > 1 for speed in first)
        assert next_token == f"reached in {reached} of {len(first)} seeds"


def test_every_width_arm_is_judged() -> None:
    runs = plain() + arms_of("4x8", spread(FAST, [1.8, 1.81, 1.82])) + arms_of("4x16", spread([0.6, 0.61, 0.6]))
    claim = judged(*runs)["b"]
    assert claim["word"] == NOT_HELD
    assert [(row[0], row[-1]) for row in claim["rows"]] == [("4x8", HELD), ("4x16", NOT_HELD)]


def test_a_loss_that_was_not_measured_is_not_tested() -> None:
    def single(name: str, values: tuple[float, ...]) -> list[dict[str, Any]]:
        return [arm(name, seed, curve([5, 4, 3, end])) for seed, end in enumerate(values)]

    claim = judged(*single("plain", (2.0, 2.1)), *single("4x16", (1.5, 1.6)))["b"]
    assert claim["rows"][0][2:4] == ["no target", "–"]
    assert claim["word"] == UNTESTED


def test_runs_that_diverged_or_ended_early_decide_nothing_about_tokens() -> None:
    short = [points[:-1] for points in spread(FAST)]
    claims = judged(*plain(), *arms_of("4x16", short))
    assert (claims["b"]["word"], claims["c"]["word"]) == (UNDECIDED, UNDECIDED)
    assert claims["b"]["rows"][0][1] == "different budgets"
    broken = copy.deepcopy(spread(FAST))
    broken[1][-1].update(loss=None, loss_2=None)
    claims = judged(*plain(), *arms_of("4x16", broken))
    assert (claims["b"]["word"], claims["c"]["word"]) == (UNDECIDED, UNDECIDED)
    assert claims["b"]["rows"][0][1] == "diverged"
    assert "a run diverged" in claims["c"]["rows"][0]


def growing(factors: list[float], sign: float = 1.0) -> list[dict[str, Any]]:
    """The gap at the end is 0.2 times the factor of the seed, at half of the budget half of that."""
    curves = copy.deepcopy(power_law(len(factors), points=40))
    for points, factor in zip(curves, factors, strict=True):
        for point in points[1:]:
            for key in ("loss", "loss_2"):
                point[key] -= sign * 0.2 * factor * point["tokens"] / 1_000_000
    return arms_of("4x16", curves)


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        (growing([0.98, 1.0, 1.02]), HELD),
        (growing([0.1, 1.0, 2.0]), UNDECIDED),
        (growing([1.0]), UNDECIDED),
        (growing([0.98, 1.0, 1.02], sign=-1), NOT_HELD),  # a lag that grows
    ],
)
def test_gap_and_speedup_grow(runs: list[dict[str, Any]], expected: str) -> None:
    claim = judged(*arms_of("plain", power_law(len(runs), points=40)), *runs)["c"]
    assert claim["word"] == expected
    assert [row[:2] for row in claim["rows"]] == [["4x16", "next-token"], ["4x16", "next-2-token"]]
    if expected == HELD:
        assert claim["rows"][0][2:4] == ["0.100", "0.200"]
        assert claim["rows"][0][4].startswith("+0.100 (+0.0")


def test_a_lag_that_melts_is_no_lead_that_grows() -> None:
    curves = copy.deepcopy(power_law())
    for seed, points in enumerate(curves):
        for point in points[1:]:
            point["loss"] += 0.4 - (0.2 + seed / 1000) * point["tokens"] / 1_000_000
    claim = judged(*plain(), *arms_of("4x16", curves))["c"]
    assert claim["rows"][0][-1] == NOT_HELD


def test_a_lag_that_melts_to_nothing_is_not_decided() -> None:
    curves = copy.deepcopy(power_law())
    for seed, points in enumerate(curves):
        for point in points[1:]:
            point["loss"] += 0.2 - (0.2 + (seed - 1) / 1000) * point["tokens"] / 1_000_000
    analysed = add_analysis(report(*plain(), *arms_of("4x16", curves)))
    assert analysed["summary"][1]["loss"]["gap_growth"]["verdict"] == "grows"
    assert analysed["verdicts"][2]["word"] == UNDECIDED


def widths(losses: dict[float, float], jitter: float = 0.001, seeds: int = 3) -> list[dict[str, Any]]:
    names = {1.5: "4x6", 2.0: "4x8", 4.0: "4x16", 8.0: "4x32"}
    return [
        arm(names[r], seed, curve([5, loss + seed + jitter * (seed - 1) * math.log2(r)]))
        for seed in range(seeds)
        for r, loss in losses.items()
    ]


@pytest.mark.parametrize(
    ("losses", "jitter", "seeds", "expected"),
    [
        ({2.0: 3.0, 4.0: 2.95, 8.0: 2.9}, 0.001, 3, HELD),
        ({2.0: 3.0, 4.0: 3.05, 8.0: 3.1}, 0.001, 3, NOT_HELD),
        ({2.0: 3.0, 4.0: 2.95, 8.0: 2.9}, 0.1, 3, UNDECIDED),
        ({2.0: 3.0, 4.0: 2.95, 8.0: 2.9}, 0.001, 1, UNDECIDED),
        ({2.0: 3.0, 4.0: 2.8, 8.0: 2.8}, 0.001, 3, NOT_HELD),  # falls, but bends: R² 0.75
        ({2.0: 3.0, 4.0: 2.95}, 0.001, 3, UNTESTED),
        ({2.0: 3.0, 4.0: 3.0, 8.0: 3.0}, 0.0, 3, UNDECIDED),
    ],
)
def test_log_linear(losses: dict[float, float], jitter: float, seeds: int, expected: str) -> None:
    claim = judged(*plain(seeds), *widths(losses, jitter, seeds))["d"]
    assert claim["word"] == expected
    if expected == HELD:
        ((loss, slope, r2, word),) = claim["rows"]
        assert (loss, r2, word) == ("next-token loss", "1.000", HELD)
        assert slope.startswith("-0.0500 (-0.05")
        assert "-0.0069 with R² 0.9986" in claim["rule"]
    if expected == UNTESTED:
        assert "2 different widths" in claim["rule"]


def test_a_bend_within_the_noise_is_not_decided() -> None:
    # The middle width scatters by seed, so that the mean losses bend by chance; the fall itself is clear.
    middle = [2.7, 2.95, 2.88]
    runs = [
        arm(name, seed, curve([5, loss + seed]))
        for seed in range(3)
        for name, loss in (("4x8", 3.0), ("4x16", middle[seed]), ("4x32", 2.8))
    ]
    found = add_analysis(report(*plain(), *runs))
    assert found["scaling"]["loss"]["verdict"] == "falls"
    assert found["scaling"]["loss"]["r2"] < 0.95
    assert found["verdicts"][3]["word"] == UNDECIDED


def test_claims_are_not_tested_without_a_baseline_or_a_width() -> None:
    hyper = arms_of("hc", power_law(), connection="hc", m=1, n=4, r=4.0)
    for runs in (plain(), plain() + hyper, plain() + arms_of("4x4", power_law()), [], widths({2.0: 3.0, 4.0: 2.9})):
        claims = judged(*runs)
        assert [claim["word"] for claim in claims.values()] == [UNTESTED] * 4
        assert not any(claim["rows"] for claim in claims.values())


@pytest.mark.parametrize("study", ["family", "mtp", "embedding"])
def test_other_studies_have_no_claims(study: str) -> None:
    assert add_analysis({**realistic(), "study": study})["verdicts"] == []
    assert len(add_analysis({**realistic(), "study": "widths"})["verdicts"]) == 4


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([HELD, HELD], HELD),
        ([HELD, UNTESTED], UNTESTED),
        ([UNDECIDED, UNTESTED, HELD], UNDECIDED),
        ([UNDECIDED, NOT_HELD, HELD], NOT_HELD),
        ([], UNTESTED),
    ],
)
def test_what_holds_only_if_all_parts_do(verdicts: list[str], expected: str) -> None:
    assert combined(verdicts) == expected


def ends(name: str, *values: float | None, **changes: Any) -> list[dict[str, Any]]:
    return [arm(name, seed, curve([9, value]), **changes) for seed, value in enumerate(values)]


def test_pairs_of_arms_are_paired_by_seed_and_mirror_each_other() -> None:
    runs = ends("plain", 3.0, 4.0, 5.0) + ends("4x8", 2.9, 3.89, 4.91) + ends("4x16", 2.8, 3.9, 4.2)
    cells = add_analysis(report(*runs))["pairwise"]
    assert cells["loss_2"] is None
    cell = cells["loss"]["4x8"]["plain"]
    assert cell["difference"]["mean"] == pytest.approx(-0.1)
    assert cell["difference"]["std"] == pytest.approx(0.01)
    assert (cell["verdict"], cell["reason"]) == ("lower", None)
    assert cells["loss"]["plain"]["4x8"]["verdict"] == "higher"
    assert cells["loss"]["plain"]["4x8"]["difference"]["mean"] == pytest.approx(0.1)
    assert (cells["loss"]["4x16"]["4x8"]["verdict"], cells["loss"]["4x16"]["4x8"]["reason"]) == (
        "undecided",
        "within the 95 % interval",
    )
    assert "4x8" not in cells["loss"]["4x8"]


@pytest.mark.parametrize(
    ("others", "verdict", "reason"),
    [
        (ends("4x16", 2.0), "undecided", "one seed"),
        (ends("4x16", 2.0, None), "unknown", "diverged"),
        ([arm("4x16", 7, curve([9, 2]))], "unknown", "no shared seed"),
        ([arm("4x16", 0, curve([9, 2, 2]))], "unknown", "different budgets"),
        ([arm("4x16", 0, [])], "unknown", "no data"),
        (ends("4x16", 2.0, 3.01), "lower", None),
        (ends("4x16", 3.0, 4.0), "undecided", "within the 95 % interval"),
    ],
)
def test_a_pair_says_why_there_is_no_verdict(others: Any, verdict: str, reason: str | None) -> None:
    cell = add_analysis(report(*ends("plain", 3.0, 4.0), *others))["pairwise"]["loss"]["4x16"]["plain"]
    assert (cell["verdict"], cell["reason"]) == (verdict, reason)
    assert (cell["difference"]["mean"] is None) == (verdict == "unknown")


@pytest.mark.parametrize(
    ("control", "expected"),
    [
        ((2.95, 3.951, 4.949), "does not explain it"),
        ((2.7, 3.701, 4.699), "explains it"),
        ((2.7, 3.9, 4.85), UNDECIDED),
        ((2.9, None, 4.9), UNDECIDED),
    ],
)
def test_whether_a_control_explains_the_gain(control: tuple[float | None, ...], expected: str) -> None:
    runs = ends("plain", 3.0, 4.0, 5.0, connection="residual")
    runs += ends("4x16", 2.8, 3.801, 4.799, connection="ghc")
    runs += ends("4x4", *control, connection="ghc")
    (found,) = add_analysis(report(*runs, study="controls"))["verdicts"]
    ((name, of_control, gain, between, word),) = found["rows"]
    assert (name, word) == ("4x4", expected)
    assert gain.startswith("-0.2000 (-0.2")
    assert (of_control == between == "diverged") == (control[1] is None)


def test_without_a_gain_there_is_nothing_to_explain() -> None:
    runs = [*ends("plain", 3.0, 4.0), *ends("4x16", 3.2, 3.8), *ends("4x4", 2.9, 3.9)]
    (found,) = add_analysis(report(*runs, study="controls"))["verdicts"]
    assert found["rows"][0][-1] == "no gain to explain"


def test_the_analysis_is_strict_json_and_can_be_repeated() -> None:
    for study in (None, "widths", "mtp", "controls"):
        once = add_analysis({**realistic(("plain", "4x8", "4x16", "4x32")), "study": study})
        assert add_analysis(json.loads(json.dumps(once, allow_nan=False))) == once
    assert add_analysis(report())["verdicts"][0]["word"] == UNTESTED
