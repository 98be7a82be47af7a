"""What the curves of a comparison say, judged on the paired difference of each seed to the baseline.

Runs are paired by seed (same data order, same backbone initialisation), so everything about an arm is judged on the
per-seed difference. Where no honest number exists (a diverged run, unequal budgets, a target never reached) the
result is None with its reason beside it, never a number from the seeds that happened to survive.
"""

from __future__ import annotations

from typing import Any

from vwn.lab.analysis.claims import judge_claims
from vwn.lab.analysis.curves import Curve, Reached, gap_curve, mean_curve, tokens_to_loss
from vwn.lab.analysis.estimates import Estimate, verdict
from vwn.lab.analysis.paired import analysed_run, summarise
from vwn.lab.analysis.pairwise import arm_verdicts, control_verdicts, pairwise_differences
from vwn.lab.analysis.runs import baseline_by_seed, has_loss, read_curve, runs_by_arm
from vwn.lab.analysis.scaling import fit_scaling

__all__ = [
    "Curve",
    "Estimate",
    "Reached",
    "add_analysis",
    "baseline_by_seed",
    "gap_curve",
    "has_loss",
    "mean_curve",
    "read_curve",
    "runs_by_arm",
    "tokens_to_loss",
    "verdict",
]


def add_analysis(report: dict[str, Any]) -> dict[str, Any]:
    """A copy of `report` with the comparison to its baseline; an analysis already there is replaced.

    Below, an estimate is {"mean", "std", "n"} over seeds, and with "interval" ([low, high], 95 % of Student's t, None
    below two seeds) where that is said.

    Every object of `report["arms"]` gains
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
                            "baseline_tokens", "arm_tokens", "speedup", "status", "crossings"}, see
                            `speedup.speedup_curve`; its last point is `speedup`; [] for the baseline
        `equal_flops`, `equal_seconds`  {"status", "difference", "cost", "arm_share", "baseline_share"}: `difference`
                            (nats per token) at `cost`, the largest training FLOP count, or training seconds, that
                            both runs have reached; the shares are of the tokens each run had in all: below 1, it is
                            read before its learning rate has decayed, which makes it look worse than a run planned
                            for that budget; `status` "compared", "no FLOPs", "no clock" or as above

    `report["summary"]` holds one object per arm, in the order of the arms:
      `name`, `m`, `n`, `r`, `connection`, `mtp`, `embedding` (None where the run does not say), `seeds`,
      `is_baseline`; `params`, `flops_per_token`, `learning_rate` (None if the seeds differ); `tokens_per_second`
      (mean), `peak_memory_bytes` (largest); and `loss`, `loss_2` (None if not measured):
        `final`, `difference`  estimates; mean None if a seed diverged
        `verdict`              "baseline", "lower", "higher", "undecided" or "unknown", see `estimates.verdict`
        `tokens_fraction`, `speedup`  estimates with n the seeds that reached it; mean None unless all did
        `tokens_pairs`         the number of seeds in which the target is defined
        `tokens_at_most`       whether `tokens_fraction` is an upper bound (and `speedup` a lower one)
        `diverged_seeds`       seeds whose final loss is not finite
        `gap_curve`            loss minus the baseline's over training: a list of {"tokens", "mean", "std", "n",
                               "interval"}, see `speedup.mean_gap_curve`
        `speedup_curve`        a list of {"tokens", "mean", "std", "n", "interval", "pairs", "crossed_again",
                               "status"}, see `speedup.mean_speedup_curve`
        `gap_growth`, `speedup_growth`  {"half", "end", "change", "verdict", "reason"}: does the lead grow from half
                               of the budget to its end; estimates with interval; verdict "grows", "shrinks" or "not
                               decided", see `speedup.growth`
        `equal_flops`, `equal_seconds`  {"difference" (with interval), "verdict", "status", "arm_share",
                               "baseline_share"}, see `compute.over_seeds`
      the last six are [] or None for the baseline.

    `report["pairwise"]`: {"loss": ..., "loss_2": ... or None}: arm -> other arm -> {"difference" (with interval),
      "verdict", "reason"}, the final loss of the arm minus the other's, see `pairwise.difference_of`.
    `report["scaling"]`: {"paper": {"slope", "intercept", "r2"}, "loss": ..., "loss_2": ... or None}, each
      {"without_baseline", "with_baseline"}, the fit `loss = intercept + slope log2 r`, see `scaling.fit_family`.
    `report["claims"]`: a list of {"claim" ("a" to "d"), "title", "verdict" ("held", "not held", "not decided by this
      budget", "not tested"), "text", "numbers"}, see `claims.judge_claims`; [] for studies of other things than width.
    `report["arm_verdicts"]`: a list of {"arm", "against", "loss", "loss_2", "text"}, one per arm but the baseline, and
      in the study "mtp" one more per width arm, see `pairwise.arm_verdicts`.
    `report["control_verdicts"]`: a list of {"arm", "control", "difference", "gain", "control_gain", "verdict",
      "text"}: does a control explain the gain of virtual width, see `pairwise.control_verdicts`; [] but in the study
      "controls".
    """
    references = baseline_by_seed(report)
    runs_by_arm(report)
    arms = [analysed_run(run, references.get(run["seed"])) for run in report["arms"]]
    analysed = {**report, "arms": arms}
    baseline = report.get("baseline")
    analysed["summary"] = [summarise(runs, references, baseline) for runs in runs_by_arm(analysed).values()]
    analysed["pairwise"] = pairwise_differences(analysed)
    analysed["scaling"] = fit_scaling(analysed)
    analysed["claims"] = judge_claims(analysed)
    analysed["arm_verdicts"] = arm_verdicts(analysed, analysed["pairwise"])
    analysed["control_verdicts"] = control_verdicts(analysed, analysed["pairwise"])
    return analysed
