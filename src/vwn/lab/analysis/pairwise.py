"""Every arm against every other arm, paired by seed."""

from __future__ import annotations

from typing import Any

from vwn.lab.analysis.estimates import Estimate, verdict
from vwn.lab.analysis.runs import LOSS_KEYS, Run, has_loss, pair_status, read_curve, runs_by_arm

Cell = dict[str, Any]


def pairwise_differences(report: dict[str, Any]) -> dict[str, Any]:
    """For each loss measured (else None): arm -> other arm -> `difference_of`, for all ordered pairs of arms."""
    arms = runs_by_arm(report)
    result: dict[str, Any] = {}
    for key in LOSS_KEYS:
        measured = {name: runs for name, runs in arms.items() if any(has_loss(run, key) for run in runs)}
        result[key] = {
            name: {other: difference_of(runs, measured[other], key) for other in measured if other != name}
            for name, runs in measured.items()
        } or None
    return result


def difference_of(runs: list[Run], others: list[Run], key: str) -> Cell:
    """The final loss of one arm minus another's, paired by seed, in nats per token.

    `difference` {"mean", "std", "n", "interval"}; no mean if a seed of either diverged; `verdict` as `verdict`;
    `reason`: None, or why it is "undecided" or "unknown".
    """
    by_seed = {run["seed"]: run for run in others}
    values, statuses = [], []
    for run in runs:
        other = by_seed.get(run["seed"])
        status = pair_status(run, other, key)
        statuses.append(status)
        final, other_final = read_curve(run, key).final_loss, read_curve(other, key).final_loss
        if status == "compared" and final is not None and other_final is not None:
            values.append(final - other_final)
    difference = Estimate.over(values, honest="diverged" not in statuses)
    found, reason = verdict(difference), None
    if found == "undecided":
        reason = "one seed" if difference.n == 1 else "within the 95 % interval"
    elif found == "unknown":
        kinds = ("diverged", "different budgets", "no data")
        reason = next((kind for kind in kinds if kind in statuses), "no shared seed")
    return {"difference": difference.described(), "verdict": found, "reason": reason}
