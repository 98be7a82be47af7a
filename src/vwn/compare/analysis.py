"""What the curves of a comparison say: paired differences to the baseline, and tokens to the baseline's loss.

Runs are paired by seed (same data order, same backbone initialisation), so everything about an arm is judged on the
per-seed difference. Where no honest number exists (a diverged run, unequal budgets, a target never reached) the
result is None with its reason beside it, never a number from the seeds that happened to survive.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

LOSS_KEYS = ("loss", "loss_2")
# Student's t, two-sided 95 %, by seeds minus one; more seeds than these take the normal distribution's.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)

Run = dict[str, Any]


@dataclass(frozen=True)
class Curve:
    """A validation curve: `tokens` [points], strictly increasing; `losses` [points], in nats per token or NaN."""

    tokens: np.ndarray
    losses: np.ndarray

    @property
    def is_empty(self) -> bool:
        return self.tokens.size == 0

    @property
    def is_finite(self) -> bool:
        return not self.is_empty and bool(np.isfinite(self.losses).all())

    @property
    def final_loss(self) -> float | None:
        """The last loss, in nats per token; None for an empty curve or a last point that is not finite."""
        return None if self.is_empty else _finite(self.losses[-1])

    @property
    def budget(self) -> float | None:
        """Tokens at the last point; None for an empty curve."""
        return None if self.is_empty else float(self.tokens[-1])


@dataclass(frozen=True)
class Estimate:
    """Over `n` seeds: the mean (None if there is no honest one) and the sample standard deviation (None below two)."""

    mean: float | None
    std: float | None
    n: int

    @classmethod
    def over(cls, values: Sequence[float], honest: bool = True) -> Estimate:
        """Mean and spread of `values`; with `honest=False` only their count is kept."""
        if not values or not honest:
            return cls(None, None, len(values))
        return cls(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None, len(values))

    @property
    def standard_error(self) -> float | None:
        return None if self.std is None else self.std / self.n**0.5


@dataclass(frozen=True)
class Reached:
    """Tokens after which a curve stays at or below a target; `at_most` if it already was there at its first point."""

    tokens: float
    at_most: bool


def read_curve(run: Run, key: str) -> Curve:
    """The curve of `run` in one loss (`"loss"` or `"loss_2"`); null and infinite losses become NaN.

    Raises ValueError if the token counts do not increase strictly.
    """
    points = run["curve"]
    tokens = np.array([point["tokens"] for point in points], dtype=np.float64)
    raw = [point.get(key) for point in points]
    losses = np.array([np.nan if value is None else value for value in raw], dtype=np.float64)
    if not (np.diff(tokens) > 0).all():
        raise ValueError(f"the curve of arm {run['name']!r}, seed {run['seed']}, does not increase in tokens")
    return Curve(tokens, np.where(np.isfinite(losses), losses, np.nan))


def has_loss(run: Run, key: str) -> bool:
    """Whether `run` was measured in this loss at all; the next-token loss always is."""
    return key == "loss" or any(point.get(key) is not None for point in run["curve"])


def tokens_to_loss(curve: Curve, target: float | None) -> Reached | None:
    """Where `curve` goes to or below `target` (nats per token) for good, by linear interpolation between its points.

    None if it ends above the target, is empty or holds a loss that is not finite, or if there is no target. A curve
    that never was above the target gives its first point, as an upper bound.
    """
    if target is None or not curve.is_finite:
        return None
    above = np.flatnonzero(curve.losses > target)
    if above.size == 0:
        return Reached(float(curve.tokens[0]), at_most=True)
    last = int(above[-1])
    if last == curve.losses.size - 1:
        return None
    share = (curve.losses[last] - target) / (curve.losses[last] - curve.losses[last + 1])
    return Reached(float(curve.tokens[last] + share * (curve.tokens[last + 1] - curve.tokens[last])), at_most=False)


def verdict(difference: Estimate) -> str:
    """`"lower"` or `"higher"` if the 95 % interval of Student's t leaves zero out; `"undecided"` if not, or with one
    seed; else `"unknown"`, when there is no mean."""
    if difference.mean is None:
        return "unknown"
    error = difference.standard_error
    if error is None or abs(difference.mean) <= t_95(difference.n) * error:
        return "undecided"
    return "lower" if difference.mean < 0 else "higher"


def t_95(seeds: int) -> float:
    """How many standard errors a mean over `seeds` runs must lie from zero for its 95 % interval to leave it out."""
    return T_95[seeds - 2] if seeds - 2 < len(T_95) else 1.96


def mean_curve(curves: Iterable[Curve]) -> tuple[Curve, np.ndarray]:
    """Mean over the non-empty curves at the token counts they share, and the sample deviations [points].

    A point where any curve is NaN is NaN; the deviations of a single curve are NaN.
    """
    filled = [curve for curve in curves if not curve.is_empty]
    if not filled:
        return Curve(np.empty(0), np.empty(0)), np.empty(0)
    shared = filled[0].tokens
    for curve in filled[1:]:
        shared = np.intersect1d(shared, curve.tokens)
    losses = np.stack([curve.losses[np.isin(curve.tokens, shared)] for curve in filled])
    spread = losses.std(axis=0, ddof=1) if len(filled) > 1 else np.full(shared.size, np.nan)
    return Curve(shared, losses.mean(axis=0)), spread


def gap_curve(curve: Curve, baseline: Curve) -> Curve:
    """`curve` minus `baseline` (interpolated linearly), at the points of `curve` inside the baseline's range."""
    if curve.is_empty or baseline.is_empty:
        return Curve(np.empty(0), np.empty(0))
    inside = (curve.tokens >= baseline.tokens[0]) & (curve.tokens <= baseline.tokens[-1])
    tokens = curve.tokens[inside]
    return Curve(tokens, curve.losses[inside] - np.interp(tokens, baseline.tokens, baseline.losses))


def runs_by_arm(report: dict[str, Any]) -> dict[str, list[Run]]:
    """Arm name -> its runs, both in the report's order. Raises ValueError if an arm holds a seed twice."""
    grouped: dict[str, list[Run]] = {}
    for run in report["arms"]:
        runs = grouped.setdefault(run["name"], [])
        if any(other["seed"] == run["seed"] for other in runs):
            raise ValueError(f"arm {run['name']!r} holds seed {run['seed']} twice")
        runs.append(run)
    return grouped


def baseline_by_seed(report: dict[str, Any]) -> dict[int, Run]:
    """Seed -> the baseline's run; empty if the report has no baseline arm."""
    return {run["seed"]: run for run in report["arms"] if run["name"] == report.get("baseline")}


def compare_run(run: Run, baseline: Run | None, key: str) -> dict[str, Any]:
    """One run against the baseline's run of the same seed; the shape is under `add_analysis`."""
    curve = read_curve(run, key)
    reference = Curve(np.empty(0), np.empty(0)) if baseline is None else read_curve(baseline, key)
    status = _pair_status(curve, reference, baseline)
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
    }


def add_analysis(report: dict[str, Any]) -> dict[str, Any]:
    """A copy of `report` with the comparison to its baseline; an analysis already there is replaced.

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

    `report["summary"]` holds one object per arm, in the order of the arms:
      `name`, `m`, `n`, `r`, `seeds`, `is_baseline`; `params`, `flops_per_token`, `learning_rate` (None if the seeds
      differ); `tokens_per_second` (mean), `peak_memory_bytes` (largest); and `loss`, `loss_2` (None if not measured):
        `final`, `difference`  {"mean", "std", "n"} over seeds; mean None if a seed diverged
        `verdict`              "baseline", "lower", "higher", "undecided" or "unknown", see `verdict`
        `tokens_fraction`, `speedup`  {"mean", "std", "n"} with n the seeds that reached it; mean None unless all did
        `tokens_pairs`         the number of seeds in which the target is defined
        `tokens_at_most`       whether `tokens_fraction` is an upper bound (and `speedup` a lower one)
        `diverged_seeds`       seeds whose final loss is not finite
    """
    references = baseline_by_seed(report)
    runs_by_arm(report)
    arms = [_analysed(run, references.get(run["seed"])) for run in report["arms"]]
    analysed = {**report, "arms": arms}
    summary = [_summarise(runs, report.get("baseline")) for runs in runs_by_arm(analysed).values()]
    return {**analysed, "summary": summary}


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _pair_status(curve: Curve, reference: Curve, baseline: Run | None) -> str:
    if baseline is None:
        return "no baseline"
    if curve.is_empty or reference.is_empty:
        return "no data"
    if curve.final_loss is None or reference.final_loss is None:
        return "diverged"
    return "compared" if curve.budget == reference.budget else "different budgets"


def _analysed(run: Run, baseline: Run | None) -> Run:
    paired = {key: compare_run(run, baseline, key) if has_loss(run, key) else None for key in LOSS_KEYS}
    tokens, tokens_2 = (None if pair is None else pair["tokens"] for pair in paired.values())
    return {**run, "tokens_to_baseline": tokens, "tokens_to_baseline_2": tokens_2, "paired": paired}


def _summarise(runs: list[Run], baseline: str | None) -> dict[str, Any]:
    first = runs[0]
    speeds = [run["tokens_per_second"] for run in runs if run.get("tokens_per_second") is not None]
    memory = [run["peak_memory_bytes"] for run in runs if run.get("peak_memory_bytes") is not None]
    is_baseline = first["name"] == baseline
    return {
        **{field: first[field] for field in ("name", "m", "n", "r")},
        "seeds": [run["seed"] for run in runs],
        "is_baseline": is_baseline,
        **{field: _common(runs, field) for field in ("params", "flops_per_token", "learning_rate")},
        "tokens_per_second": Estimate.over(speeds).mean,
        "peak_memory_bytes": max(memory, default=None),
        **{key: _summarise_loss(runs, key, is_baseline) for key in LOSS_KEYS},
    }


def _summarise_loss(runs: list[Run], key: str, is_baseline: bool) -> dict[str, Any] | None:
    measured = [run for run in runs if run["paired"][key] is not None]
    if not measured:
        return None
    pairs = [run["paired"][key] for run in measured]
    curves = [read_curve(run, key) for run in measured]
    diverged = [run["seed"] for run, curve in zip(measured, curves, strict=True) if _diverged(curve)]
    same_budget = len({curve.budget for curve in curves if not curve.is_empty}) <= 1
    difference = Estimate.over(
        [pair["difference"] for pair in pairs if pair["difference"] is not None],
        honest=all(pair["status"] != "diverged" for pair in pairs),
    )
    defined = [pair for pair in pairs if pair["tokens_defined"]]
    reached = [pair for pair in defined if pair["tokens_fraction"] is not None]
    everywhere = len(reached) == len(defined)
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
    }


def _diverged(curve: Curve) -> bool:
    return not curve.is_empty and curve.final_loss is None


def _common(runs: list[Run], field: str) -> Any:
    values = [run.get(field) for run in runs]
    return values[0] if all(value == values[0] for value in values) else None
