"""Verdicts on the four claims, on every pair of arms and on controls: each word, and never one that is not earned."""

from __future__ import annotations

import copy
import json
import math
import re
from typing import Any

import pytest

from curves import arm, arms_of, curve, power_law, realistic, report
from vwn.lab.analysis.analyse import add_analysis
from vwn.lab.analysis.claims import combined

HELD, NOT_HELD, UNDECIDED, UNTESTED = "held", "not held", "not decided by this budget", "not tested"


def judged(*runs: dict[str, Any], **changes: Any) -> dict[str, dict[str, Any]]:
    """The claims by their letter."""
    return {claim["claim"]: claim for claim in add_analysis(report(*runs, **changes))["claims"]}


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
    assert claim["verdict"] == expected
    assert claim["text"].count("0.70×") == 2
    assert "2 width arms were looked at" in claim["text"]
    if factors[0]:
        assert claim["numbers"]["arms"][0]["parts"][0]["flops_ratio"] == pytest.approx(factors[0])
        assert claim["numbers"]["arms"][0]["parts"][0]["speed_ratio"]["mean"] == pytest.approx(0.7)


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
    assert claim["verdict"] == expected
    part = claim["numbers"]["arms"][0]["parts"][0]
    assert part["verdict"] == (HELD if first == FAST else NOT_HELD if max(first) < 1 else UNDECIDED)
    numbers = re.findall(r"next-token loss speed-up ([\d.]+)×", claim["text"])
    if min(first) > 1:
        assert float(numbers[0]) == pytest.approx(sum(first) / len(first), abs=0.02)
        assert claim["numbers"]["arms"][0]["parts"][2]["estimate"]["mean"] == pytest.approx(
            sum(second) / len(second) - sum(first) / len(first), abs=0.02
        )
    else:
        assert not numbers
        assert f"reached in {sum(speed > 1 for speed in first)} of {len(first)} seeds" in claim["text"]


def test_every_width_arm_is_judged() -> None:
    runs = plain() + arms_of("4x8", spread(FAST, [1.8, 1.81, 1.82])) + arms_of("4x16", spread([0.6, 0.61, 0.6]))
    claim = judged(*runs)["b"]
    assert claim["verdict"] == NOT_HELD
    assert claim["text"].startswith("Held for 4x8; not held for 4x16. 2 width arms were looked at, each judged alone")


def test_a_loss_that_was_not_measured_is_not_tested() -> None:
    def single(name: str, values: tuple[float, ...]) -> list[dict[str, Any]]:
        return [arm(name, seed, curve([5, 4, 3, end])) for seed, end in enumerate(values)]

    claim = judged(*single("plain", (2.0, 2.1)), *single("4x16", (1.5, 1.6)))["b"]
    assert [part["verdict"] for part in claim["numbers"]["arms"][0]["parts"]] == [HELD, UNTESTED, UNTESTED]
    assert claim["verdict"] == UNTESTED


def test_runs_that_diverged_or_ended_early_decide_nothing_about_tokens() -> None:
    short = [points[:-1] for points in spread(FAST)]
    claims = judged(*plain(), *arms_of("4x16", short))
    assert (claims["b"]["verdict"], claims["c"]["verdict"]) == (UNDECIDED, UNDECIDED)
    assert "different tokens" in claims["b"]["text"]
    broken = copy.deepcopy(spread(FAST))
    broken[1][-1].update(loss=None, loss_2=None)
    claims = judged(*plain(), *arms_of("4x16", broken))
    assert (claims["b"]["verdict"], claims["c"]["verdict"]) == (UNDECIDED, UNDECIDED)
    assert "diverged" in claims["b"]["text"]
    assert "diverged" in claims["c"]["text"]


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
    assert claim["verdict"] == expected
    if expected == HELD:
        assert "next-token loss gap grows, 0.1000 to 0.2000, change +0.1000" in claim["text"]
        assert [part["verdict"] for part in claim["numbers"]["arms"][0]["parts"]] == [HELD] * 4


def test_a_lag_that_melts_is_no_lead_that_grows() -> None:
    curves = copy.deepcopy(power_law())
    for seed, points in enumerate(curves):
        for point in points[1:]:
            point["loss"] += 0.4 - (0.2 + seed / 1000) * point["tokens"] / 1_000_000
    claim = judged(*plain(), *arms_of("4x16", curves))["c"]
    assert claim["numbers"]["arms"][0]["parts"][0]["verdict"] == NOT_HELD
    assert "ends above the baseline" in claim["text"]


def test_a_lag_that_melts_to_nothing_is_not_decided() -> None:
    curves = copy.deepcopy(power_law())
    for seed, points in enumerate(curves):
        for point in points[1:]:
            point["loss"] += 0.2 - (0.2 + (seed - 1) / 1000) * point["tokens"] / 1_000_000
    part = judged(*plain(), *arms_of("4x16", curves))["c"]["numbers"]["arms"][0]["parts"][0]
    assert part["estimate"]["interval"][0] > 0
    assert part["verdict"] == UNDECIDED
    assert "whether it ends below the baseline is not decided" in part["text"]


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
    assert claim["verdict"] == expected
    if expected == HELD:
        assert "next-token loss: -0.0500 nats per doubling of r" in claim["text"]
        assert "R² 1.0000" in claim["text"]
        assert "slope -0.0069, R² 0.9986" in claim["text"]
        assert claim["numbers"]["loss"]["slope"]["mean"] == pytest.approx(-0.05)
    if expected == UNTESTED:
        assert "2 different widths" in claim["text"]


def test_a_bend_within_the_noise_is_not_decided() -> None:
    # The middle width scatters by seed, so that the mean losses bend by chance; the fall itself is clear.
    middle = [2.7, 2.95, 2.88]
    runs = [
        arm(name, seed, curve([5, loss + seed]))
        for seed in range(3)
        for name, loss in (("4x8", 3.0), ("4x16", middle[seed]), ("4x32", 2.8))
    ]
    claim = judged(*plain(), *runs)["d"]
    assert claim["numbers"]["loss"]["verdict"] == "falls"
    assert claim["numbers"]["loss"]["r2"] < 0.95
    assert claim["verdict"] == UNDECIDED


def test_claims_are_not_tested_without_a_baseline_or_a_width() -> None:
    hyper = arms_of("hc", power_law(), connection="hc", m=1, n=4, r=4.0)
    for runs in (plain(), plain() + hyper, plain() + arms_of("4x4", power_law()), [], widths({2.0: 3.0, 4.0: 2.9})):
        claims = judged(*runs)
        assert [claim["verdict"] for claim in claims.values()] == [UNTESTED] * 4
        assert all(claim["text"].startswith("Not tested: ") for claim in claims.values())


@pytest.mark.parametrize("study", ["family", "mtp", "embedding", "controls"])
def test_other_studies_have_no_claims_but_a_verdict_per_arm(study: str) -> None:
    found = add_analysis({**realistic(), "study": study})
    assert found["claims"] == []
    assert [entry["arm"] for entry in found["arm_verdicts"]] == ["2x3", "4x16"]
    assert add_analysis({**realistic(), "study": "widths"})["claims"] != []


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
    ("others", "verdict", "reason", "sentence"),
    [
        (ends("4x16", 2.0), "undecided", "one seed", "not decided in next-token loss: -1.0000 (one seed"),
        (ends("4x16", 2.0, None), "unknown", "diverged", "cannot be held against plain in next-token loss: diverged"),
        ([arm("4x16", 7, curve([9, 2]))], "unknown", "no shared seed", "no shared seed"),
        ([arm("4x16", 0, curve([9, 2, 2]))], "unknown", "different budgets", "different budgets"),
        ([arm("4x16", 0, [])], "unknown", "no data", "no data"),
        (
            ends("4x16", 2.0, 3.01),
            "lower",
            None,
            "4x16 ends lower than plain in next-token loss: -0.9950 (95 % interval",
        ),
        (ends("4x16", 3.0, 4.0), "undecided", "within the 95 % interval", "not decided"),
    ],
)
def test_a_pair_says_why_it_is_not_decided(others: Any, verdict: str, reason: str | None, sentence: str) -> None:
    found = add_analysis(report(*ends("plain", 3.0, 4.0), *others))
    cell = found["pairwise"]["loss"]["4x16"]["plain"]
    assert (cell["verdict"], cell["reason"]) == (verdict, reason)
    assert (cell["difference"]["mean"] is None) == (verdict == "unknown")
    assert sentence in found["arm_verdicts"][0]["text"]
    assert found["arm_verdicts"][0]["loss"] == cell
    assert found["arm_verdicts"][0]["loss_2"] is None


def test_without_the_baseline_no_arm_has_a_verdict() -> None:
    assert add_analysis(report(*ends("4x8", 3.0), *ends("4x16", 2.0)))["arm_verdicts"] == []


def test_with_mtp_a_width_is_held_against_the_plain_arm_with_mtp_too() -> None:
    runs = ends("plain", 3.0, 4.0, connection="residual", mtp=0)
    runs += ends("plain+mtp", 2.9, 3.9, connection="residual", mtp=1)
    runs += ends("4x16", 2.8, 3.8, connection="ghc", mtp=0, m=4, n=16)
    runs += ends("4x16+mtp", 2.7, 3.701, connection="ghc", mtp=1, m=4, n=16)
    found = add_analysis(report(*runs, study="mtp"))["arm_verdicts"]
    assert [(entry["arm"], entry["against"]) for entry in found] == [
        *[("plain+mtp", "plain"), ("4x16", "plain"), ("4x16+mtp", "plain"), ("4x16+mtp", "plain+mtp")]
    ]
    assert "4x16+mtp ends lower than plain+mtp in next-token loss: -0.1995" in found[-1]["text"]


@pytest.mark.parametrize(
    ("control", "expected"),
    [
        ((2.95, 3.951, 4.949), "does not explain it"),
        ((2.7, 3.701, 4.699), "explains it"),
        ((2.7, 3.9, 4.85), "not decided"),
        ((2.9, None, 4.9), "not decided"),
    ],
)
def test_whether_a_control_explains_the_gain(control: tuple[float | None, ...], expected: str) -> None:
    runs = ends("plain", 3.0, 4.0, 5.0, connection="residual")
    runs += ends("4x16", 2.8, 3.801, 4.799, connection="ghc")
    runs += ends("4x4", *control, connection="ghc")
    found = add_analysis(report(*runs, study="controls"))["control_verdicts"]
    assert [(entry["arm"], entry["control"], entry["verdict"]) for entry in found] == [("4x16", "4x4", expected)]
    assert found[0]["gain"]["difference"]["mean"] == pytest.approx(-0.2)
    if control[1] is None:
        assert "no number (diverged)" in found[0]["text"]
    assert add_analysis(report(*runs))["control_verdicts"] == []


def test_without_a_gain_there_is_nothing_to_explain() -> None:
    runs = [*ends("plain", 3.0, 4.0), *ends("4x16", 3.2, 3.8), *ends("4x4", 2.9, 3.9)]
    entry = add_analysis(report(*runs, study="controls"))["control_verdicts"][0]
    assert entry["verdict"] == "nothing to explain"
    assert "not decided against plain" in entry["text"]


def test_the_analysis_is_strict_json_and_can_be_repeated() -> None:
    for study in (None, "widths", "mtp", "controls"):
        once = add_analysis({**realistic(("plain", "4x8", "4x16", "4x32")), "study": study})
        assert add_analysis(json.loads(json.dumps(once, allow_nan=False))) == once
    assert add_analysis(report())["claims"][0]["verdict"] == UNTESTED
