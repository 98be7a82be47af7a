"""Verdicts on the four claims, and on every pair of arms: each word, and never one that is not earned."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest

from curves import arm, arms_of, curve, power_law, realistic, report
from vwn.lab.analysis.analyse import add_analysis

HELD, NOT_HELD, UNDECIDED, UNTESTED = "supported", "contradicted", "inconclusive", "not tested"


def judged(*runs: dict[str, Any], **changes: Any) -> dict[str, dict[str, Any]]:
    """The claims by their letter: each {"title", "word", "rows", "rule"}."""
    return {claim["title"][1]: claim for claim in add_analysis(report(*runs, **changes))["claims"]}


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
def test_compute_is_judged_by_flops(factors: tuple[Any, ...], expected: str) -> None:
    runs = plain(flops_per_token=1e6)
    for name, factor in zip(("4x8", "4x16"), factors, strict=True):
        flops = None if factor is None else factor * 1e6
        runs += arms_of(name, power_law(), flops_per_token=flops)
    claim = judged(*runs)["a"]
    assert claim["word"] == expected
    if factors[0]:
        assert claim["rows"][0][:2] == ["4x8", f"{factors[0]:.3f}× the FLOPs"]


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
    ((arm_name, numbers, word),) = claim["rows"]
    next_token, next_2_token, difference = numbers.split("; ")
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
    assert claim["rows"][0][1].endswith("; no target; –")
    assert claim["word"] == UNTESTED


def test_runs_that_diverged_or_ended_early_decide_nothing_about_tokens() -> None:
    short = [points[:-1] for points in spread(FAST)]
    claim = judged(*plain(), *arms_of("4x16", short))["b"]
    assert (claim["word"], claim["rows"][0][1]) == (UNDECIDED, "different budgets")
    broken = copy.deepcopy(spread(FAST))
    broken[1][-1].update(loss=None, loss_2=None)
    claim = judged(*plain(), *arms_of("4x16", broken))["b"]
    assert (claim["word"], claim["rows"][0][1]) == (UNDECIDED, "diverged")


def decayed(name: str, gaps: tuple[float, float], factors: tuple[float, ...], budgets: int = 4) -> list[dict[str, Any]]:
    """Runs whose decayed loss is the law's minus a gap, from `gaps[0]` to `gaps[1]`, times the seed's factor."""
    found = []
    for seed, factor in enumerate(factors):
        points = []
        for place in range(budgets):
            tokens = 1_000_000 * 2**place
            gap = factor * (gaps[0] + (gaps[1] - gaps[0]) * place / max(budgets - 1, 1))
            loss = 2 + seed / 10 + 200 * tokens**-0.3 - gap
            points.append({"tokens": tokens, "loss": loss, "loss_2": loss + 0.5, "seconds": tokens / 1e3})
        found.append(arm(name, seed, curve([5, 4]), decayed=points))
    return found


@pytest.mark.parametrize(
    ("gaps", "factors", "expected"),
    [
        ((0.1, 0.2), (0.98, 1.0, 1.02), HELD),
        ((0.1, 0.2), (-0.2, 1.0, 2.0), UNDECIDED),
        ((0.1, 0.2), (1.0,), UNDECIDED),
        ((0.2, 0.1), (0.98, 1.0, 1.02), NOT_HELD),  # a lead that shrinks
        ((-0.1, -0.2), (0.98, 1.0, 1.02), NOT_HELD),  # a lag that grows
        ((-0.2, -0.1), (0.98, 1.0, 1.02), NOT_HELD),  # a lag that melts is no lead
        ((-0.2, 0.0), (0.98, 1.0, 1.02), UNDECIDED),  # a lag that melts to nothing
    ],
)
def test_gap_and_speedup_grow_over_budgets(
    gaps: tuple[float, float], factors: tuple[float, ...], expected: str
) -> None:
    claim = judged(*decayed("plain", (0, 0), factors), *decayed("4x16", gaps, factors))["c"]
    assert claim["word"] == expected
    ((name, numbers, word),) = claim["rows"]
    assert (name, word) == ("4x16", expected)
    change = (gaps[1] - gaps[0]) * sum(factors) / len(factors)
    assert numbers.startswith(f"next-token loss: gap {change:+.4f} (")
    if expected == HELD:
        # Beyond the last budget the fit is the law itself, so that the speed-up is exact.
        start, end = (
            [((200 * t**-0.3 - gap * factor) / 200) ** (-1 / 0.3) / t for factor in factors]
            for t, gap in ((1e6, gaps[0]), (8e6, gaps[1]))
        )
        grown = sum(end) / len(end) - sum(start) / len(start)
        assert float(numbers.split("speed-up ")[1].split()[0]) == pytest.approx(grown, abs=0.1)


def test_one_validation_curve_tells_nothing_about_growth() -> None:
    for runs in (
        plain() + arms_of("4x16", spread(FAST)),
        decayed("plain", (0, 0), (1.0, 1.0), 1) + decayed("4x16", (0.1, 0.1), (1.0, 1.1), 1),
    ):
        claim = judged(*runs)["c"]
        assert claim["word"] == UNTESTED
        assert claim["rows"][0][1] == "fewer than two budgets"


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
        ((loss, numbers, word),) = claim["rows"]
        assert (loss, word) == ("next-token loss", HELD)
        assert numbers.startswith("-0.0500 (-0.05")
        assert numbers.endswith("per doubling of r, R² 1.000")
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
    assert found["claims"][3]["word"] == UNDECIDED


def test_claims_are_not_tested_without_a_baseline_or_a_width() -> None:
    hyper = arms_of("hc", power_law(), connection="hc", m=1, n=4, r=4.0)
    for runs in (plain(), plain() + hyper, plain() + arms_of("4x4", power_law()), [], widths({2.0: 3.0, 4.0: 2.9})):
        claims = judged(*runs)
        assert [claim["word"] for claim in claims.values()] == [UNTESTED] * 4
        assert not any(claim["rows"] for claim in claims.values())


@pytest.mark.parametrize("study", ["family", "mtp", "embedding", "controls"])
def test_other_studies_have_no_claims(study: str) -> None:
    assert add_analysis({**realistic(), "study": study})["claims"] == []
    assert len(add_analysis({**realistic(), "study": "widths"})["claims"]) == 4


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
