"""Decayed losses over budgets, on laws whose gap, slope and speed-up are known."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from curves import BUDGETS, POWER, SCALE, arm, budget_runs, curve, law, report
from vwn.lab.analysis.analyse import add_analysis
from vwn.lab.analysis.budgets import REACH, BudgetStudy, budget_studies, fit_law
from vwn.lab.analysis.curves import Curve
from vwn.lab.analysis.estimates import Ratio
from vwn.lab.analysis.story import budget_explanation, budget_sentence, cautions
from vwn.lab.report.tables import Cell, budget_table


def studied(*arms: dict[str, Any]) -> BudgetStudy:
    return budget_studies(report(*arms))["loss"]


def test_ratios_and_their_inverses_give_the_same_interval() -> None:
    ratios, inverses = (Ratio.over([x**sign for x in (1, 2, 4)]) for sign in (1, -1))
    assert ratios.interval[0] == pytest.approx(2 ** (1 - 4.303 / 3**0.5))
    assert ratios.interval == pytest.approx([1 / bound for bound in reversed(inverses.interval)])


@pytest.mark.parametrize("speed", [0.7, 1.0, 1.3, 3.0])
def test_a_known_speedup_is_recovered_at_every_budget(speed: float) -> None:
    found = budget_studies(report(*budget_runs("plain"), *budget_runs("4x16", speed)))
    for key, expected in (("loss", speed), ("loss_2", speed**2)):
        points = found[key].arms["4x16"]
        assert [point.tokens for point in points] == BUDGETS
        for point in points:
            tokens = point.tokens * expected
            outside = not BUDGETS[0] <= tokens <= BUDGETS[-1]
            assert point.equal["tokens"].speedup.extrapolated == (outside and expected != 1)
            # The chord between two budgets lies above the law, by which the baseline comes late.
            mean = point.speedup.over_seeds.mean
            if tokens > REACH * BUDGETS[-1]:  # a guess, of which there is no number
                assert (mean, point.speedup.at_least) == (None, BUDGETS[-1] / point.tokens)
                assert point.equal["tokens"].reason == "beyond 3 times the baseline’s budgets"
                continue
            assert mean == pytest.approx(expected, rel=1e-3 if outside else 0.04)
            assert mean >= expected * (1 - 1e-3)
            assert point.speedup.at_least is None or point.speedup.at_least <= mean * (1 + 1e-9)
            assert point.equal["tokens"].gap.over_seeds.mean == pytest.approx(
                law(point.tokens, expected) - law(point.tokens), abs=1e-12
            )


@pytest.mark.parametrize("speed", [0.7, 1.3, 2.5])
def test_the_tokens_to_the_baselines_loss_are_recovered(speed: float) -> None:
    found = budget_studies(report(*budget_runs("plain"), *budget_runs("4x16", speed)))
    for key, expected in (("loss", speed), ("loss_2", speed**2)):
        for tokens, factor in found[key].tokens_factors["4x16"].items():
            assert factor.extrapolated == (not BUDGETS[0] <= tokens / expected <= BUDGETS[-1])
            assert factor.over_seeds.mean == pytest.approx(expected, rel=0.04)
    short = budget_runs("4x16", speed, seeds=(0,)) + budget_runs("4x16", speed, seeds=(1, 2), budgets=BUDGETS[:3])
    asked = report(*budget_runs("plain"), *short)
    studies, reached = budget_studies(asked), BUDGETS[2] * max(speed, 1)  # a short seed's last loss, or its own end
    counts = {tokens: factor.over_seeds.n for tokens, factor in studies["loss"].tokens_factors["4x16"].items()}
    assert counts == {tokens: 3 if tokens <= reached else 1 for tokens in BUDGETS}
    notes = {row[1].text: row[5].notes for row in budget_table(asked, studies, "loss").rows}
    assert ("3 seeds" in notes["8M"]) == (speed == 2.5)  # where the gap beside it has one


def test_the_law_and_its_slope_are_recovered_whatever_the_seeds_lie_apart() -> None:
    study = studied(*budget_runs("plain"), *budget_runs("4x16", gap=-0.02))
    assert study.law is not None
    assert (study.law.power, study.law.scale) == pytest.approx((POWER, SCALE), rel=1e-3)
    for row in study.baseline:
        assert row.slope == pytest.approx(POWER * SCALE * row.tokens**-POWER, rel=1e-3)
        assert row.loss.mean == pytest.approx(law(row.tokens) + 0.1)
    last = study.arms["4x16"][-1]
    assert last.speedup.over_seeds.mean == pytest.approx(math.exp(0.02 / study.baseline[-1].slope), rel=0.02)


def test_beyond_the_last_budget_without_a_law_there_is_no_number() -> None:
    few = BUDGETS[:2]
    study = studied(*budget_runs("plain", budgets=few), *budget_runs("4x16", gap=-0.05, budgets=few))
    assert study.law is None
    early, late = (point.equal["tokens"] for point in study.arms["4x16"])
    assert early.speedup.over_seeds.mean == pytest.approx((few[1] / few[0]) ** (0.05 / (law(few[0]) - law(few[1]))))
    assert not early.speedup.extrapolated
    assert (late.speedup.over_seeds.mean, late.speedup.at_least) == (None, 1)
    assert late.reason == "beyond the baseline’s budgets"
    assert study.baseline[0].slope is None
    plain = budget_runs("plain", budgets=few)
    for run in plain:  # a baseline that was there once, and rose again, shows no bound
        run["decayed"][0]["loss"] = 0.1
    late = studied(*plain, *budget_runs("4x16", gap=-0.05, budgets=few)).arms["4x16"][-1]
    assert late.speedup.at_least is None


def test_a_loss_below_the_laws_floor_is_never_reached() -> None:
    asked = report(*budget_runs("plain"), *budget_runs("4x16", gap=-2.0))
    studies = budget_studies(asked)
    point, row = studies["loss"].arms["4x16"][-1], budget_table(asked, studies, "loss").rows[-2]
    assert row[6] == Cell(f"≥ {BUDGETS[-1] / BUDGETS[-2]:.2f}×")
    assert point.equal["tokens"].gap.over_seeds.mean == pytest.approx(-2.0)
    assert point.speedup.over_seeds.mean is None
    assert point.equal["tokens"].reason == "beyond 3 times the baseline’s budgets"


def test_missing_budgets_and_seeds_are_left_out() -> None:
    plain = budget_runs("plain", seeds=(0,)) + budget_runs("plain", seeds=(1, 2), budgets=BUDGETS[:3])
    wide = budget_runs("4x16", 1.5, seeds=(0,), budgets=BUDGETS[1:])
    wide += budget_runs("4x16", 1.5, seeds=(2, 7), budgets=BUDGETS[:3])
    study = studied(*plain, *wide, *budget_runs("4x32", seeds=(7,)), arm("4x8", 0, curve([5, 4])))
    assert [(point.tokens, point.equal["tokens"].gap.over_seeds.n) for point in study.arms["4x16"]] == list(
        zip(BUDGETS, (1, 2, 2, 1, 1), strict=True)
    )
    # Where seed 2 ends its budgets, it is extrapolated by the law of all seeds.
    extrapolated = [point.equal["tokens"].speedup.extrapolated for point in study.arms["4x16"]]
    assert extrapolated == [False, False, True, False, True]
    assert all(point.speedup.over_seeds.mean == pytest.approx(1.5, rel=0.03) for point in study.arms["4x16"])
    assert list(study.arms) == ["4x16"]
    assert [row.loss.n for row in study.baseline] == [3, 3, 3, 1, 1]
    assert budget_studies(report(*budget_runs("4x16"))) == {}
    assert add_analysis(report(arm("plain", 0, curve([5, 4]))))["budgets"] == {}


def test_a_run_that_diverges_behind_a_budget_is_said_to_and_the_others_keep_theirs() -> None:
    wide = budget_runs("4x16", 1.5)
    ended = wide[1]["decayed"][:1]
    end = {"tokens": BUDGETS[1], "loss": None, "loss_2": None, "seconds": 1.0}
    for decayed in (ended, [*ended, end]):  # on the trunk, or in the next budget's cool-down
        wide[1] |= {"decayed": decayed, "curve": [*wide[0]["curve"][:1], end]}
        analysed = add_analysis(report(*budget_runs("plain"), *wide))
        assert [arm["loss"]["diverged_seeds"] for arm in analysed["summary"]] == [[], [1]]
        assert "not finite in seed 1" in " ".join(cautions(analysed))
        judged = [[point["tokens"] for point in run.get("judged", [])] for run in analysed["arms"]]
        assert judged == [BUDGETS] * 4 + [[], BUDGETS]


def test_a_diverged_run_leaves_no_mean() -> None:
    wide = budget_runs("4x16", 1.5)
    wide[1]["decayed"][2]["loss"] = None
    study = studied(*budget_runs("plain"), *wide)
    assert {factor.over_seeds.mean for factor in study.tokens_factors["4x16"].values()} == {None}
    point, gap = study.arms["4x16"][2], study.arms["4x16"][2].equal["tokens"].gap
    assert (gap.over_seeds.mean, point.speedup.over_seeds.mean, gap.over_seeds.n, gap.bounds) == (None, None, 2, None)
    assert point.equal["flops"].reason == "diverged"
    plain = budget_runs("plain")
    plain[0]["decayed"][4]["loss"] = math.nan
    study = studied(*plain, *budget_runs("4x16", 1.5))
    assert study.law is not None
    assert study.arms["4x16"][0].equal["tokens"].gap.over_seeds.mean is None


def test_a_loss_that_was_not_measured_has_no_study() -> None:
    plain, wide = budget_runs("plain"), budget_runs("4x16")
    for run in plain:
        run["decayed"] = [{**point, "loss_2": None} for point in run["decayed"]]
    assert list(budget_studies(report(*plain, *wide))) == ["loss"]


def test_at_equal_cost_the_baseline_has_more_tokens() -> None:
    plain = budget_runs("plain", flops_per_token=1e6, step_seconds_median=0.1)
    wide = budget_runs("4x16", 2.0, flops_per_token=1.25e6, step_seconds_median=0.16)
    for point in studied(*plain, *wide).arms["4x16"]:
        for cost, ratio in (("flops", 1.25), ("seconds", 1.6)):
            found = point.equal[cost]
            assert found.speedup.over_seeds.mean == pytest.approx(2.0 / ratio, rel=0.04)
            assert found.gap.over_seeds.mean == pytest.approx(
                law(point.tokens, 2.0) - law(ratio * point.tokens), abs=0.02
            )
            assert found.gap.extrapolated == (point.tokens == BUDGETS[-1])
    for run in wide:
        run |= {"step_seconds_median": None, "flops_per_token": None, "tokens_per_second": 20_000 / 3}
    point = studied(*plain, *wide).arms["4x16"][1]
    assert point.equal["seconds"].speedup.over_seeds.mean == pytest.approx(2 / 3, rel=0.04)
    assert (point.equal["flops"].speedup.over_seeds.mean, point.equal["flops"].reason) == (None, "no FLOPs")


def test_the_widths_are_fitted_at_each_budget() -> None:
    gaps = {"plain": 0.0, "4x8": -0.02, "4x16": -0.03, "4x32": -0.04}
    arms = [run for name, gap in gaps.items() for run in budget_runs(name, gap=gap)]
    arms += budget_runs("4x6", gap=-0.02 + 0.01 * 0.415, budgets=BUDGETS[:2])
    fits = studied(*arms).widths
    assert [fit["tokens"] for fit in fits] == BUDGETS
    assert [len(fit["arms"]) for fit in fits] == [4, 4, 3, 3, 3]
    assert all(fit["slope"]["mean"] == pytest.approx(-0.01, rel=1e-3) for fit in fits)


def test_runs_with_decayed_losses_are_judged_by_them_at_the_budgets_all_share() -> None:
    plain, fewer = budget_runs("plain"), budget_runs("4x8", 1.1, seeds=(0,), budgets=BUDGETS[1:4])
    wide = budget_runs("4x16", gap=-0.05, noise=0.01) + fewer
    found = add_analysis(report(*plain, *wide))
    assert {tuple(point["tokens"] for point in run["judged"]) for run in found["arms"]} == {tuple(BUDGETS[1:4])}
    row = found["summary"][1]["loss"]
    assert row["difference"]["mean"] == pytest.approx(-0.05)
    assert row["final"]["mean"] == pytest.approx(law(BUDGETS[3]) + 0.1 - 0.05)
    assert found["arms"][0]["curve"] == curve([5, 4])
    without = add_analysis(report(*plain, *wide, arm("4x32", 0, curve([5, 4.5]))))
    assert not any("judged" in run for run in without["arms"])
    assert without["summary"][1]["loss"]["difference"]["mean"] == 0


def test_a_rising_or_flat_baseline_has_no_law() -> None:
    assert fit_law([Curve(np.array(BUDGETS, dtype=float), np.linspace(3, 4, 5))]) is None
    assert fit_law([]) is None


def test_the_analysis_is_json_with_intervals() -> None:
    found = add_analysis(report(*budget_runs("plain"), *budget_runs("4x16", 1.5, noise=0.01)))
    again = json.loads(json.dumps(found, allow_nan=False))
    assert again["budgets"]["loss"]["arms"]["4x16"][0]["equal"]["tokens"]["gap"]["over_seeds"]["interval"] is not None
    assert add_analysis(again) == found


def test_a_number_lies_within_the_interval_of_three_seeds_or_the_range_of_two() -> None:
    runs = budget_runs("4x16", gap=-0.05, noise=0.01), budget_runs("4x16", gap=-0.05, noise=0.01, seeds=(0, 2))
    three, two = (studied(*budget_runs("plain"), *wide).arms["4x16"][0].equal["tokens"].gap for wide in runs)
    half = 4.303 * 0.01 / math.sqrt(3)
    assert three.bounds == pytest.approx((-0.05 - half, -0.05 + half), rel=1e-4)
    assert two.bounds == pytest.approx((-0.06, -0.04))
    assert two.text("+.4f") == "-0.0500 (-0.0600 to -0.0400)"
    wide = budget_runs("4x16", gap=-0.05, seeds=(1,))
    one = studied(*budget_runs("plain"), *wide).arms["4x16"][0].equal["tokens"].gap
    assert (one.bounds, one.text("+.4f")) == (None, "-0.0500 (one seed)")


def test_the_first_sentence_is_of_the_last_budget_of_most_seeds() -> None:
    wide = budget_runs("4x16", 1.5, seeds=(0,)) + budget_runs("4x16", 1.5, seeds=(1, 2), budgets=BUDGETS[:2])
    source = add_analysis(report(*budget_runs("plain"), *budget_runs("4x8", 1.1), *wide))
    studies = budget_studies(source)
    assert budget_sentence(source, studies) == (
        "4x16 reaches plain’s losses at 2M tokens (3 seeds) with 1.47× (1.47 to 1.47) fewer tokens in next-token loss "
        "and 2.25× (2.25 to 2.25, extrapolated) fewer in next-2-token loss."
    )
    wide = budget_runs("4x16", 1.5)
    for point in (point for run in wide for point in run["decayed"]):
        point["loss_2"] += 1  # no longer ahead in that loss
    source = add_analysis(report(*budget_runs("plain"), *wide))
    assert "next-2-token" not in budget_sentence(source, budget_studies(source))
    slow = add_analysis(report(*budget_runs("plain"), *budget_runs("4x16", 0.7)))
    assert budget_sentence(slow, budget_studies(slow)) == ""
    assert "by 0.414 at 16M" in budget_explanation(source, studies["loss"])
    assert budget_sentence(source, {}) == ""
