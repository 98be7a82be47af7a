"""The analysis of a comparison, on curves whose answers are known by hand."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import numpy as np
import pytest

from curves import arm, curve, realistic, report
from vwn.lab.analysis.analyse import add_analysis
from vwn.lab.analysis.curves import Curve, Reached, loss_at, mean_curve, tokens_to_loss
from vwn.lab.analysis.estimates import Estimate, verdict

NAN = math.nan


def analysed(*arms: dict[str, Any], **changes: Any) -> tuple[dict[tuple[str, int], Any], dict[str, Any]]:
    """The analysed report's arms by (name, seed), and its summary by name."""
    result = add_analysis(report(*arms, **changes))
    return {(run["name"], run["seed"]): run for run in result["arms"]}, {row["name"]: row for row in result["summary"]}


def losses(values: list[float], tokens: list[float] | None = None) -> Curve:
    return Curve(np.array(tokens or range(100, 100 * len(values) + 1, 100), dtype=float), np.array(values, dtype=float))


@pytest.mark.parametrize(
    ("values", "target", "expected"),
    [
        ([4.0, 3.0, 2.0], 2.5, Reached(math.sqrt(200 * 300), False)),
        ([4.0, 3.0, 2.0], 2.0, Reached(300.0, False)),
        ([4.0, 3.0, 2.0], 1.9, None),
        ([4.0, 2.0, 3.0, 1.0], 2.5, Reached(300 * (4 / 3) ** 0.25, False)),
        ([4.0, 2.0, 2.6], 2.5, None),
        ([4.0, 2.0, 2.0, 2.0], 2.0, Reached(200.0, False)),
        ([2.0, 1.0], 2.5, Reached(100.0, True)),
        ([2.0], 2.0, Reached(100.0, True)),
        ([4.0, NAN, 2.0], 2.5, None),
        ([4.0, 3.0, NAN], 3.5, None),
        ([NAN, 3.0, 2.0], 2.5, None),
        ([], 2.5, None),
        ([4.0, 2.0], None, None),
    ],
)
def test_tokens_to_loss(values: list[float], target: float | None, expected: Reached | None) -> None:
    found = tokens_to_loss(losses(values), target)
    assert (found and found.at_most) == (expected and expected.at_most)
    assert (found and found.tokens) == (expected and pytest.approx(expected.tokens, rel=1e-12))


def test_nothing_is_interpolated_from_an_untrained_model() -> None:
    # Loss falls steeply from 0 tokens on: the first point after a step is all that is known.
    assert tokens_to_loss(losses([8.0, 3.0, 2.0], [0, 100, 200]), 5.0) == Reached(100.0, True)
    assert tokens_to_loss(losses([8.0, 3.0, 2.0], [0, 100, 200]), 3.0) == Reached(100.0, False)
    assert loss_at(losses([8.0, 3.0, 2.0], [0, 100, 200]), 50.0) is None


def test_loss_at_inverts_tokens_to_loss() -> None:
    found = losses([8.0, 5.0, 4.5, 3.0, NAN], [0, 10, 20, 60, 80])
    assert loss_at(found, 10.0) == 5.0
    assert loss_at(found, 0.0) == 8.0
    needed = tokens_to_loss(Curve(found.tokens[:-1], found.losses[:-1]), 3.7)
    assert needed is not None
    assert loss_at(found, needed.tokens) == pytest.approx(3.7)
    assert loss_at(found, 70.0) is None
    assert loss_at(found, 81.0) is None
    assert loss_at(losses([]), 1.0) is None


@pytest.mark.parametrize("speedup", [1.25, 1.6, 2.5])
def test_a_known_speedup_is_recovered_for_both_losses(speedup: float) -> None:
    # Loss falls with the logarithm of the tokens, each of which counts `speedup` times for the arm.
    points = range(1, 2001)
    base = [5 - 0.3 * math.log(p) for p in points]
    fast = [5 - 0.3 * math.log(p * speedup) for p in points]
    runs, rows = analysed(arm("plain", 0, curve(base, base)), arm("4x16", 0, curve(fast, fast)))
    run, row = runs["4x16", 0], rows["4x16"]
    for key in ("loss", "loss_2"):
        assert run["paired"][key]["tokens"] == pytest.approx(2000 * 100 / speedup, rel=1e-4)
        assert run["paired"][key]["difference"] == pytest.approx(-0.3 * math.log(speedup))
        assert row[key]["tokens_fraction"]["mean"] == pytest.approx(1 / speedup, rel=1e-4)


@pytest.mark.parametrize("values", [[4, 3, 2], [4, 2, 2], [4, 2, 1.5, 2.5], [5, 3, 4, 2]])
def test_an_equal_curve_has_speedup_one(values: list[float]) -> None:
    runs, rows = analysed(arm("plain", 0, curve(values)), arm("1x1", 0, curve(values)))
    assert (rows["plain"]["loss"]["verdict"], rows["plain"]["loss"]["tokens_fraction"]["mean"]) == ("baseline", 1)
    assert runs["1x1", 0]["paired"]["loss"]["tokens_fraction"] == 1
    assert runs["1x1", 0]["paired"]["loss"]["difference"] == 0


@pytest.mark.parametrize(
    ("estimate", "expected"),
    [
        (Estimate(-0.1, 0.05, 4), "lower"),
        (Estimate(0.1, 0.05, 4), "higher"),
        (Estimate(-0.05, 0.05, 4), "undecided"),
        (Estimate(-0.0621, 0.05, 5), "lower"),  # t = 2.776 standard errors of 0.05 / sqrt(5) are 0.0621
        (Estimate(-0.0620, 0.05, 5), "undecided"),
        (Estimate(-0.0129, 0.05, 61), "lower"),  # t = 2.000 standard errors of 0.05 / sqrt(61) are 0.0128
        (Estimate(-0.0127, 0.05, 61), "undecided"),
        (Estimate(0.0, 0.0, 2), "undecided"),
        (Estimate(-0.1, 0.0, 2), "lower"),
        (Estimate(-0.1, None, 1), "undecided"),
        (Estimate(-1e-12, 1e-14, 3), "undecided"),  # rounding, however alike the seeds
        (Estimate(None, None, 3), "unknown"),
    ],
)
def test_verdict_asks_that_zero_lies_outside_the_95_percent_interval(estimate: Estimate, expected: str) -> None:
    assert verdict(estimate) == expected


def test_without_a_baseline_nothing_is_compared() -> None:
    runs, rows = analysed(arm("4x16", 0, curve([4, 3], [5, 4])))
    assert runs["4x16", 0]["paired"]["loss"]["tokens"] is None
    assert runs["4x16", 0]["paired"]["loss"]["status"] == "no baseline"
    assert rows["4x16"]["loss"]["final"]["mean"] == 3
    assert rows["4x16"]["loss"]["difference"] == {"mean": None, "std": None, "n": 0, "interval": None}
    assert rows["4x16"]["loss"]["verdict"] == "unknown"
    assert rows["4x16"]["loss"]["tokens_pairs"] == 0


def test_not_reached_in_one_seed_leaves_no_mean() -> None:
    arms = [arm("plain", seed, curve([4, 3, 2])) for seed in (0, 1)]
    runs, rows = analysed(*arms, arm("2x3", 0, curve([4, 2, 1])), arm("2x3", 1, curve([4, 3, 2.1])))
    row = rows["2x3"]["loss"]
    assert runs["2x3", 0]["paired"]["loss"]["tokens"] == 200
    assert runs["2x3", 1]["paired"]["loss"]["tokens"] is None
    assert row["tokens_fraction"] == {"mean": None, "std": None, "n": 1, "interval": None}
    assert row["tokens_pairs"] == 2


def test_a_diverged_seed_leaves_no_mean_of_the_survivors() -> None:
    arms = [arm("plain", seed, curve([4, 3])) for seed in (0, 1)]
    runs, rows = analysed(*arms, arm("4x16", 0, curve([4, 2])), arm("4x16", 1, curve([4, NAN])))
    row = rows["4x16"]["loss"]
    assert row["final"] == {"mean": None, "std": None, "n": 1, "interval": None}
    assert row["difference"]["mean"] is None
    assert row["verdict"] == "unknown"
    assert row["diverged_seeds"] == [1]
    assert row["tokens_fraction"]["mean"] is None
    assert runs["4x16", 1]["paired"]["loss"]["status"] == "diverged"


def test_a_first_point_below_the_target_is_an_upper_bound() -> None:
    runs, rows = analysed(arm("plain", 0, curve([4, 3, 2, 1.5])), arm("4x16", 0, curve([1.4, 1, 1, 1])))
    assert runs["4x16", 0]["paired"]["loss"]["tokens"] == 100
    assert runs["4x16", 0]["paired"]["loss"]["tokens_at_most"]
    assert rows["4x16"]["loss"]["tokens_at_most"]
    assert rows["4x16"]["loss"]["tokens_fraction"]["mean"] == 0.25


def test_the_second_loss_is_optional() -> None:
    runs, rows = analysed(arm("plain", 0, curve([4, 3])), arm("4x16", 0, curve([4, 2], [5, 4])))
    assert rows["plain"]["loss_2"] is None
    assert runs["plain", 0]["paired"]["loss_2"] is None
    assert rows["4x16"]["loss_2"]["final"]["mean"] == 4
    assert rows["4x16"]["loss_2"]["difference"]["mean"] is None


def test_a_field_that_differs_between_seeds_is_not_given_as_one_number() -> None:
    arms = [arm("plain", 0, curve([4])), arm("plain", 1, curve([4]), learning_rate=0.1, peak_memory_bytes=7 * 2**30)]
    _, rows = analysed(*arms)
    assert rows["plain"]["learning_rate"] is None
    assert rows["plain"]["params"] == 1_000_000
    assert rows["plain"]["peak_memory_bytes"] == 7 * 2**30


def test_analysis_leaves_its_input_alone_and_can_be_repeated() -> None:
    original = realistic()
    before = copy.deepcopy(original)
    once = add_analysis(original)
    assert original == before
    assert add_analysis(json.loads(json.dumps(once))) == once


def test_mistakes_of_the_runner_are_refused() -> None:
    with pytest.raises(ValueError, match="seed 0 twice"):
        analysed(arm("plain", 0, curve([4])), arm("plain", 0, curve([4])))
    with pytest.raises(ValueError, match="does not increase"):
        analysed(arm("plain", 0, [*curve([4, 3]), *curve([2])]))


def test_mean_curves() -> None:
    mean = mean_curve([losses([4, 3, 2]), losses([6, 4], [100, 300]), losses([])])
    assert mean.tokens.tolist() == [100, 300]
    assert mean.losses.tolist() == [5, 3]
    assert np.isnan(mean_curve([losses([4, NAN]), losses([4, 3])]).losses[1])


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
