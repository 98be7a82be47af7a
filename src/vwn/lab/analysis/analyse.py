"""Analysis of a comparison: every arm against the baseline, by the paired difference of each seed.

Runs are paired by seed (same data order, same backbone initialisation), so everything about an arm is judged on the
per-seed difference. Where no honest number exists (a diverged run, unequal budgets, a target never reached) the
result is None with its reason beside it, never a number from the seeds that happened to survive.
"""

from __future__ import annotations

from typing import Any

from vwn.lab.analysis.budgets import budget_studies
from vwn.lab.analysis.estimates import as_json
from vwn.lab.analysis.paired import pairwise_differences, summarise, with_pairs
from vwn.lab.analysis.runs import baseline_by_seed, runs_by_arm, with_judged_points
from vwn.lab.analysis.scaling import fit_scaling


def add_analysis(report: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of `report` with the comparison to its baseline; an analysis already there is replaced.

    Below, an estimate is {"mean", "std", "n", "interval"} over seeds; the interval is [low, high], 95 % of Student's t,
    None below two seeds. Runs are judged by their decayed losses at the budgets that all share (see `budgets`), else
    by their validation curves.

    Every object of `report["arms"]` gains
      `judged`: the decayed losses it is judged by, if so;
      `paired`: {"loss": ..., "loss_2": ... or None if not measured}, each
        `final`             last loss in nats per token, None if not finite
        `difference`        `final` minus the baseline's, None unless `status` is "compared"
        `status`            "compared", "no baseline" (of this seed), "no data", "diverged" (either final loss is not
                            finite) or "different budgets" (the two runs end at different token counts)
        `tokens`            training tokens after which the loss stays at or below the final loss of the baseline's
                            run of the same seed; None if that is not reached
        `tokens_at_most`    the first point is already below: `tokens` is an upper bound
        `tokens_defined`    whether the baseline's run gives a target at all
        `tokens_fraction`   `tokens` / the tokens the baseline itself needs to reach its final loss for good
        `equal_flops`, `equal_seconds`  see `compute.at_equal_cost`

    `report["summary"]` holds one object per arm, in the order of the arms: its geometry and options, `seeds`,
    `is_baseline`, cost and speed (None if the seeds differ, or means), and `loss`, `loss_2` (None if not measured):
        `final`, `difference`  estimates; mean None if a seed diverged
        `verdict`              "baseline", "lower", "higher", "undecided" or "unknown", see `estimates.verdict`
        `reason`               why it is undecided or unknown, else None
        `tokens_fraction`      an estimate with n the seeds that reached it; mean None unless all did
        `tokens_pairs`         the number of seeds in which the target is defined
        `tokens_at_most`       whether `tokens_fraction` is an upper bound
        `diverged_seeds`       seeds whose final loss is not finite
        `equal_flops`, `equal_seconds`  see `compute.over_seeds`; None for the baseline

    There are also, by loss, `pairwise` (arm -> other arm -> `paired.difference_of`), `scaling` (`scaling.fit_scaling`)
    and `budgets` (`budgets.BudgetStudy`; {} without decayed losses).
    """
    report = {**report, "arms": with_judged_points(report["arms"])}
    references = baseline_by_seed(report)
    runs_by_arm(report)
    analysed = {**report, "arms": [with_pairs(run, references.get(run["seed"])) for run in report["arms"]]}
    analysed.pop("claims", None)  # of reports that were made before
    baseline = report.get("baseline")
    analysed["summary"] = [summarise(runs, references, baseline) for runs in runs_by_arm(analysed).values()]
    analysed["pairwise"] = pairwise_differences(analysed)
    analysed["scaling"] = fit_scaling(analysed)
    analysed["budgets"] = as_json(budget_studies(analysed))
    return analysed
