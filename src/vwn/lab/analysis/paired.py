"""Runs paired by seed: each against the baseline's, every arm over its seeds, and every arm against every other."""

from __future__ import annotations

from typing import Any

from vwn.lab.analysis.compute import at_equal_cost, is_uneven, over_seeds
from vwn.lab.analysis.curves import tokens_to_loss
from vwn.lab.analysis.estimates import Estimate, verdict
from vwn.lab.analysis.runs import LOSS_KEYS, Run, has_loss, pair_status, read_curve, runs_by_arm

COSTS = ("flops", "seconds")


def with_pairs(run: Run, baseline: Run | None) -> Run:
    """Return `run` with `paired`: its comparison to the baseline's run of its seed in each loss or None."""
    return {**run, "paired": {key: _pair(run, baseline, key) if has_loss(run, key) else None for key in LOSS_KEYS}}


def _pair(run: Run, baseline: Run | None, key: str) -> dict[str, Any]:
    curve, reference = read_curve(run, key), read_curve(baseline, key)
    status = pair_status(run, baseline, key)
    final, target = curve.final_loss, reference.final_loss
    needed = tokens_to_loss(curve, target)
    # By the same rule as the arm, not its whole budget: an equal curve must give exactly 1, even if it ends flat.
    reference_needed = tokens_to_loss(reference, target)
    is_baseline = run is baseline
    defined = not curve.is_empty and reference_needed is not None and (is_baseline or not reference_needed.at_most)
    fraction = None
    if defined and needed is not None and reference_needed is not None:
        fraction = 1.0 if is_baseline else needed.tokens / reference_needed.tokens
    return {
        "final": final,
        "difference": final - target if status == "compared" and final is not None and target is not None else None,
        "status": status,
        "tokens": None if needed is None else needed.tokens,
        "tokens_at_most": needed is not None and needed.at_most and not is_baseline,
        "tokens_defined": defined,
        "tokens_fraction": fraction,
        **{f"equal_{cost}": at_equal_cost(run, baseline, key, cost) for cost in COSTS},
    }


def summarise(runs: list[Run], references: dict[int, Run], baseline: str | None) -> dict[str, Any]:
    """Summarise one arm over its seeds, from its runs `with_pairs`; the fields are under `add_analysis`."""
    first = runs[0]
    memory = [run["peak_memory_bytes"] for run in runs if run.get("peak_memory_bytes") is not None]
    paces = {
        field: Estimate.over([run[field] for run in runs if run.get(field) is not None]).mean
        for field in ("tokens_per_second", "step_seconds_median")
    }
    return {
        **{field: first[field] for field in ("name", "m", "n", "r")},
        **{field: first.get(field) for field in ("connection", "mtp", "embedding")},
        "seeds": [run["seed"] for run in runs],
        "is_baseline": first["name"] == baseline,
        **{field: _common(runs, field) for field in ("params", "flops_per_token", "learning_rate")},
        **paces,
        "uneven": any(is_uneven(run) for run in runs),
        "peak_memory_bytes": max(memory, default=None),
        **{key: _summarise_loss(runs, references, key, first["name"] == baseline) for key in LOSS_KEYS},
    }


def _summarise_loss(runs: list[Run], references: dict[int, Run], key: str, is_baseline: bool) -> dict[str, Any] | None:
    runs = [run for run in runs if run["paired"][key] is not None]
    if not runs:
        return None
    pairs = [run["paired"][key] for run in runs]
    curves = [curve for run in runs if not (curve := read_curve(run, key)).is_empty]
    diverged = [
        run["seed"] for run in runs if not (curve := read_curve(run, key)).is_empty and curve.final_loss is None
    ]
    same_budget = len({curve.budget for curve in curves}) <= 1
    any_diverged = any(pair["status"] == "diverged" for pair in pairs)
    defined = [pair for pair in pairs if pair["tokens_defined"]]
    reached = [pair for pair in defined if pair["tokens_fraction"] is not None]
    everywhere = len(reached) == len(defined) and not any_diverged
    finals = [pair["final"] for pair in pairs if pair["final"] is not None]
    found = {
        "final": Estimate.over(finals, honest=not diverged and same_budget).described(),
        **difference_of(runs, list(references.values()), key),
        "tokens_fraction": Estimate.over([pair["tokens_fraction"] for pair in reached], everywhere).described(),
        "tokens_pairs": len(defined),
        "tokens_at_most": any(pair["tokens_at_most"] for pair in reached),
        "diverged_seeds": diverged,
    }
    if is_baseline:
        return {**found, "verdict": "baseline", "equal_flops": None, "equal_seconds": None}
    return {**found, **{f"equal_{cost}": over_seeds([pair[f"equal_{cost}"] for pair in pairs]) for cost in COSTS}}


def pairwise_differences(report: dict[str, Any]) -> dict[str, Any]:
    """Compare all ordered pairs of arms: loss -> arm -> other arm -> `difference_of`; None for a loss not measured."""
    arms = runs_by_arm(report)
    result: dict[str, Any] = {}
    for key in LOSS_KEYS:
        measured = {name: runs for name, runs in arms.items() if any(has_loss(run, key) for run in runs)}
        result[key] = {
            name: {other: difference_of(runs, measured[other], key) for other in measured if other != name}
            for name, runs in measured.items()
        } or None
    return result


def difference_of(runs: list[Run], others: list[Run], key: str) -> dict[str, Any]:
    """Return the final loss of one arm minus another's, paired by seed, in nats per token.

    `difference` {"mean", "std", "n", "interval"}; no mean if a seed of either diverged; `verdict` as `verdict`;
    `reason`: None, or why it is "undecided" or "unknown".
    """
    values, statuses = differences(runs, others, key)
    difference = Estimate.over(values, honest="diverged" not in statuses)
    found, reason = verdict(difference), None
    if found == "undecided":
        reason = "one seed" if difference.n == 1 else "within the 95 % interval"
    elif found == "unknown":
        kinds = ("diverged", "different budgets", "no data")
        reason = next((kind for kind in kinds if kind in statuses), "no shared seed")
    return {"difference": difference.described(), "verdict": found, "reason": reason}


def differences(runs: list[Run], others: list[Run], key: str) -> tuple[list[float], list[str]]:
    """Return final losses minus those of the same seed, where both are known, and the `pair_status` of every run."""
    by_seed = {run["seed"]: run for run in others}
    values, statuses = [], []
    for run in runs:
        other = by_seed.get(run["seed"])
        status = pair_status(run, other, key)
        statuses.append(status)
        final, other_final = read_curve(run, key).final_loss, read_curve(other, key).final_loss
        if status == "compared" and final is not None and other_final is not None:
            values.append(final - other_final)
    return values, statuses


def _common(runs: list[Run], field: str) -> Any:
    values = [run.get(field) for run in runs]
    return values[0] if all(value == values[0] for value in values) else None
