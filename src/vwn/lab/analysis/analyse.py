"""What the curves of a comparison say, judged on the paired difference of each seed to the baseline.

Runs are paired by seed (same data order, same backbone initialisation), so everything about an arm is judged on the
per-seed difference. Where no honest number exists (a diverged run, unequal budgets, a target never reached) the
result is None with its reason beside it, never a number from the seeds that happened to survive.
"""

from __future__ import annotations

from typing import Any

from vwn.lab.analysis.budgets import budget_studies
from vwn.lab.analysis.estimates import as_json
from vwn.lab.analysis.paired import analysed_run, summarise
from vwn.lab.analysis.pairwise import pairwise_differences
from vwn.lab.analysis.runs import baseline_by_seed, runs_by_arm, with_judged_points
from vwn.lab.analysis.scaling import fit_scaling
from vwn.lab.analysis.verdicts import verdicts


def add_analysis(report: dict[str, Any]) -> dict[str, Any]:
    """A copy of `report` with the comparison to its baseline; an analysis already there is replaced.

    Below, an estimate is {"mean", "std", "n"} over seeds, and with "interval" ([low, high], 95 % of Student's t, None
    below two seeds) where that is said.

    Where all runs have decayed losses (see `budgets`), they are judged by these at the budgets that all share, and by
    their validation curves else.

    Every object of `report["arms"]` gains
      `judged`: the decayed losses it is judged by, if so;
      `tokens_to_baseline`, `tokens_to_baseline_2`: training tokens after which the validation loss (`loss`, `loss_2`)
        stays at or below the final loss of the baseline's run of the same seed; None if that is not reached;
      `paired`: {"loss": ..., "loss_2": ... or None if not measured}, each
        `final`             last loss in nats per token, None if not finite
        `difference`        `final` minus the baseline's, None unless `status` is "compared"
        `status`            "compared", "no baseline" (of this seed), "no data", "diverged" (either final loss is not
                            finite) or "different budgets" (the two runs end at different token counts)
        `tokens`            as `tokens_to_baseline`
        `tokens_at_most`    the first point is already below: `tokens` is an upper bound
        `tokens_defined`    whether the baseline's run gives a target at all
        `tokens_fraction`   `tokens` / the tokens the baseline itself needs to reach its final loss for good
        `speedup`           1 / `tokens_fraction`
        `speedup_curve`     that speed-up at every later point of the baseline's curve: a list of {"tokens", "loss",
                            "baseline_tokens", "arm_tokens", "speedup", "status"}, see `speedup.speedup_curve`;
                            its last point is `speedup`; [] for the baseline
        `equal_flops`, `equal_seconds`  {"status", "difference", "arm_share", "baseline_share"}: `difference` in nats
                            per token at the largest training FLOP count, or training time, that both have reached.
                            The shares are of the tokens each run had in all: below 1, it is read before its learning
                            rate has decayed, which makes it look worse than a run planned for that budget. `status`
                            "compared", "no FLOPs", "no clock" or as above

    `report["summary"]` holds one object per arm, in the order of the arms:
      `name`, `m`, `n`, `r`, `connection`, `mtp`, `embedding` (None where the run does not say), `seeds`,
      `is_baseline`; `params`, `flops_per_token`, `learning_rate` (None if the seeds differ); `tokens_per_second`
      and `step_seconds_median` (means), `uneven` (see `compute.is_uneven`), `peak_memory_bytes` (largest);
      and `loss`, `loss_2` (None if not measured):
        `final`, `difference`  estimates; mean None if a seed diverged
        `verdict`              "baseline", "lower", "higher", "undecided" or "unknown", see `estimates.verdict`
        `tokens_fraction`, `speedup`  estimates with n the seeds that reached it; mean None unless all did
        `tokens_pairs`         the number of seeds in which the target is defined
        `tokens_at_most`       whether `tokens_fraction` is an upper bound (and `speedup` a lower one)
        `diverged_seeds`       seeds whose final loss is not finite
        `gap_curve`            loss minus the baseline's over training: a list of {"tokens", "mean", "std", "n",
                               "interval"}, see `speedup.mean_gap_curve`
        `speedup_curve`        a list of {"tokens", "mean", "std", "n", "interval", "pairs", "status"}, see
                               `speedup.mean_speedup_curve`
        `gap_growth`, `speedup_growth`  {"half", "end", "change", "verdict", "reason"}: does the lead grow from half
                               of the budget to its end; estimates with interval; verdict "grows", "shrinks" or "not
                               significant", see `speedup.growth`
        `equal_flops`, `equal_seconds`  {"difference" (with interval), "verdict", "status", "arm_share",
                               "baseline_share"}, see `compute.over_seeds`
      the last six are [] or None for the baseline.

    `report["pairwise"]`: {"loss": ..., "loss_2": ... or None}: arm -> other arm -> {"difference" (with interval),
      "verdict", "reason"}, the final loss of the arm minus the other's, see `pairwise.difference_of`.
    `report["scaling"]`: {"paper": {"slope", "intercept", "r2"}, "loss": ..., "loss_2": ... or None}, the fit
      `loss = intercept + slope log2 r`, see `scaling.fit_family`.
    `report["budgets"]`: {"loss": ..., "loss_2": ...}, see `budgets.BudgetStudy`; {} without decayed losses.
    `report["verdicts"]`: a list of `verdicts.Verdict`.
    """
    report = {**report, "arms": with_judged_points(report["arms"])}
    references = baseline_by_seed(report)
    runs_by_arm(report)
    arms = [analysed_run(run, references.get(run["seed"])) for run in report["arms"]]
    analysed = {**report, "arms": arms}
    baseline = report.get("baseline")
    analysed["summary"] = [summarise(runs, references, baseline) for runs in runs_by_arm(analysed).values()]
    analysed["pairwise"] = pairwise_differences(analysed)
    analysed["scaling"] = fit_scaling(analysed)
    analysed["budgets"] = as_json(budget_studies(analysed))
    analysed["verdicts"] = as_json(verdicts(analysed))
    return analysed
