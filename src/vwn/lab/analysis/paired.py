"""Every run against the baseline's run of its seed, and every arm over its seeds."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from vwn.lab.analysis.compute import at_equal_flops, at_equal_seconds, is_uneven, over_seeds
from vwn.lab.analysis.curves import Curve, tokens_to_loss
from vwn.lab.analysis.estimates import Estimate, verdict
from vwn.lab.analysis.runs import LOSS_KEYS, Run, has_loss, pair_status, read_curve
from vwn.lab.analysis.speedup import growth, mean_gap_curve, mean_speedup_curve, seed_gap, speedup_curve

UNPAIRED = ("no baseline", "no data")
# The baseline against itself.
NO_COURSE: dict[str, Any] = {
    "gap_curve": [],
    "speedup_curve": [],
    **dict.fromkeys(("gap_growth", "speedup_growth", "equal_flops", "equal_seconds")),
}


def analysed_run(run: Run, baseline: Run | None) -> Run:
    """`run` with its comparison to the baseline's run of its seed; the fields are under `add_analysis`."""
    paired = {key: compare_run(run, baseline, key) if has_loss(run, key) else None for key in LOSS_KEYS}
    tokens, tokens_2 = (None if pair is None else pair["tokens"] for pair in paired.values())
    return {**run, "tokens_to_baseline": tokens, "tokens_to_baseline_2": tokens_2, "paired": paired}


def compare_run(run: Run, baseline: Run | None, key: str) -> dict[str, Any]:
    """One run against the baseline's run of the same seed; the fields are under `add_analysis`."""
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
    difference = final - target if status == "compared" and final is not None and target is not None else None
    return {
        "final": final,
        "difference": difference,
        "status": status,
        "tokens": None if needed is None else needed.tokens,
        "tokens_at_most": needed is not None and needed.at_most and not is_baseline,
        "tokens_defined": defined,
        "tokens_fraction": fraction,
        "speedup": 1.0 / fraction if fraction else None,
        "speedup_curve": speedup_curve(run, baseline, key),
        "equal_flops": at_equal_flops(run, baseline, key),
        "equal_seconds": at_equal_seconds(run, baseline, key),
    }


def summarise(runs: list[Run], references: dict[int, Run], baseline: str | None) -> dict[str, Any]:
    """One arm over its seeds, from its analysed runs; the fields are under `add_analysis`."""
    first = runs[0]
    paces = {
        field: Estimate.over([run[field] for run in runs if run.get(field) is not None]).mean
        for field in ("tokens_per_second", "step_seconds_median")
    }
    memory = [run["peak_memory_bytes"] for run in runs if run.get("peak_memory_bytes") is not None]
    is_baseline = first["name"] == baseline
    return {
        **{field: first[field] for field in ("name", "m", "n", "r")},
        **{field: first.get(field) for field in ("connection", "mtp", "embedding")},
        "seeds": [run["seed"] for run in runs],
        "is_baseline": is_baseline,
        **{field: _common(runs, field) for field in ("params", "flops_per_token", "learning_rate")},
        **paces,
        "uneven": any(is_uneven(run) for run in runs),
        "peak_memory_bytes": max(memory, default=None),
        **{key: _summarise_loss(runs, references, key, is_baseline) for key in LOSS_KEYS},
    }


def _summarise_loss(runs: list[Run], references: dict[int, Run], key: str, is_baseline: bool) -> dict[str, Any] | None:
    measured = [run for run in runs if run["paired"][key] is not None]
    if not measured:
        return None
    pairs = [run["paired"][key] for run in measured]
    curves = [read_curve(run, key) for run in measured]
    diverged = [run["seed"] for run, curve in zip(measured, curves, strict=True) if _diverged(curve)]
    same_budget = len({curve.budget for curve in curves if not curve.is_empty}) <= 1
    any_diverged = any(pair["status"] == "diverged" for pair in pairs)
    difference = Estimate.over(
        [pair["difference"] for pair in pairs if pair["difference"] is not None], honest=not any_diverged
    )
    defined = [pair for pair in pairs if pair["tokens_defined"]]
    reached = [pair for pair in defined if pair["tokens_fraction"] is not None]
    everywhere = len(reached) == len(defined) and not any_diverged
    finals = [pair["final"] for pair in pairs if pair["final"] is not None]
    # A speed-up is infinite where the target is met before any training, so it has no mean there.
    speedups = [pair["speedup"] for pair in reached if pair["speedup"] is not None]
    return {
        "final": asdict(Estimate.over(finals, honest=not diverged and same_budget)),
        "difference": asdict(difference),
        "verdict": "baseline" if is_baseline else verdict(difference),
        "tokens_fraction": asdict(Estimate.over([pair["tokens_fraction"] for pair in reached], honest=everywhere)),
        "speedup": asdict(Estimate.over(speedups, honest=everywhere and len(speedups) == len(reached))),
        "tokens_pairs": len(defined),
        "tokens_at_most": any(pair["tokens_at_most"] for pair in reached),
        "diverged_seeds": diverged,
        **(NO_COURSE if is_baseline else _course(measured, references, key, any_diverged)),
    }


def _course(runs: list[Run], references: dict[int, Run], key: str, diverged: bool) -> dict[str, Any]:
    """How an arm and its baseline compare over training, and at equal cost."""
    pairs = [(run, references[run["seed"]]) for run in runs if run["paired"][key]["status"] not in UNPAIRED]
    grown = growth(pairs, key)
    return {
        "gap_curve": mean_gap_curve([seed_gap(run, baseline, key) for run, baseline in pairs], diverged),
        "speedup_curve": mean_speedup_curve([run["paired"][key]["speedup_curve"] for run, _ in pairs], diverged),
        "gap_growth": grown["gap"],
        "speedup_growth": grown["speedup"],
        "equal_flops": over_seeds([run["paired"][key]["equal_flops"] for run in runs]),
        "equal_seconds": over_seeds([run["paired"][key]["equal_seconds"] for run in runs]),
    }


def _diverged(curve: Curve) -> bool:
    return not curve.is_empty and curve.final_loss is None


def _common(runs: list[Run], field: str) -> Any:
    values = [run.get(field) for run in runs]
    return values[0] if all(value == values[0] for value in values) else None
