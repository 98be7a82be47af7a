"""The loss over the virtual width factor: the log-linear law `loss = a + b log2 r` (section 8 of the method's page)."""

from __future__ import annotations

from typing import Any

import numpy as np

from vwn.lab.analysis.estimates import ROUNDING, Estimate
from vwn.lab.analysis.runs import LOSS_KEYS, Run, has_loss, is_generalized, judged_points, read_curve, runs_by_arm

# The paper's fit, next-token loss of MoE-A0.8B at m = 8 after 500 B tokens.
PAPER = {"slope": -0.0069, "intercept": 1.6212, "r2": 0.9986}
FEWEST_WIDTHS = 3

Arms = dict[str, list[Run]]


def fit_scaling(report: dict[str, Any]) -> dict[str, Any]:
    """The law fitted to the final losses of the report's width family: {"paper", "loss", "loss_2"}.

    `paper` holds its constants; each loss the fit of `fit_family`, or None if it was not measured. The baseline is not
    fitted: it does not lie on the paper's own line either (0.020 from there to r = 2, then 0.008 and 0.007).
    """
    family = width_family(report)
    fits = {
        key: fit_family(family, key) if any(has_loss(run, key) for runs in family.values() for run in runs) else None
        for key in LOSS_KEYS
    }
    return {"paper": PAPER, **fits}


def width_family(report: dict[str, Any]) -> Arms:
    """The largest set of Generalized Hyper-Connections arms that differ in width alone, by name.

    They share the embedding form, the MTP depth and the fraction rate m, and have no other options of their own. Of
    sets with equally many widths, the first in the report's order.
    """
    families: dict[tuple[Any, ...], Arms] = {}
    for name, runs in runs_by_arm(report).items():
        run = runs[0]
        if is_generalized(run, report.get("baseline")):
            kind = (run.get("embedding"), run.get("mtp"), run["m"])
            families.setdefault(kind, {})[name] = runs
    return max(families.values(), key=lambda arms: len({runs[0]["r"] for runs in arms.values()}), default={})


def fit_family(arms: Arms, key: str) -> dict[str, Any]:
    """Fit `loss = intercept + slope * log2 r` by least squares over `arms` within each seed; average over seeds.

    Fitting within a seed cancels what the seed does to all widths alike. The uncertainty of the mean slope is Student's
    t-interval of the per-seed slopes.

      `arms`, `widths` (r), `seeds`  what was fitted: the seeds that all arms share
      `losses`              mean final losses in nats per token, one per arm
      `slope`, `intercept`  {"mean", "std", "n", "interval"} over seeds, nats per token per doubling and at r = 1
      `r2`                  of the mean losses; None if all are equal
      `curvature`           the quadratic coefficient in log2 r, likewise over seeds
      `verdict`             "falls", "rises" or "not significant"
      `reason`              why it is not significant, or why there is no fit; else None
    """
    widths = np.array([runs[0]["r"] for runs in arms.values()], dtype=np.float64)
    seeds = _shared_seeds(arms)
    finals = np.array([[_final(runs, seed, key) for runs in arms.values()] for seed in seeds], dtype=np.float64)
    reason = _no_fit(arms, widths, finals, key)
    about: dict[str, Any] = {"arms": list(arms), "widths": widths.tolist(), "seeds": seeds}
    if reason is not None:
        empty = ("losses", "slope", "intercept", "r2", "curvature")
        return {**about, **dict.fromkeys(empty), "verdict": "not significant", "reason": reason}
    x = np.log2(widths)
    slopes, intercepts = np.polyfit(x, finals.T, 1)
    slope, means = Estimate.over(slopes.tolist()), finals.mean(axis=0)
    if slope.n == 1:
        reason = "one seed"
    elif slope.sign() == 0:
        reason = "within the 95 % interval"
    return {
        **about,
        "losses": means.tolist(),
        "slope": slope.described(),
        "intercept": Estimate.over(intercepts.tolist()).described(),
        "r2": _r2(x, means),
        "curvature": Estimate.over(np.polyfit(x, finals.T, 2)[0].tolist()).described(),
        "verdict": {-1: "falls", 0: "not significant", 1: "rises"}[slope.sign()],
        "reason": reason,
    }


def _shared_seeds(arms: Arms) -> list[int]:
    """Seeds that every arm was run with, diverged or not, in the first arm's order."""
    if not arms:
        return []
    first, *others = [[run["seed"] for run in runs] for runs in arms.values()]
    return [seed for seed in first if all(seed in seeds for seeds in others)]


def _run(runs: list[Run], seed: int) -> Run:
    return next(run for run in runs if run["seed"] == seed)


def _final(runs: list[Run], seed: int, key: str) -> float:
    final = read_curve(_run(runs, seed), key).final_loss
    return np.nan if final is None else final


def _no_fit(arms: Arms, widths: np.ndarray, finals: np.ndarray, key: str) -> str | None:
    distinct = np.unique(widths).size
    if distinct < FEWEST_WIDTHS:
        return f"{distinct} different {'width' if distinct == 1 else 'widths'}, where a line needs {FEWEST_WIDTHS}"
    if finals.size == 0:
        return "the arms share no seed"
    shared = [_run(runs, seed) for runs in arms.values() for seed in _shared_seeds(arms)]
    if not all(judged_points(run) and has_loss(run, key) for run in shared):
        return "an arm has no data"
    if not np.isfinite(finals).all():
        return "a run diverged"
    if len({judged_points(run)[-1]["tokens"] for run in shared}) > 1:
        return "different budgets"
    return None


def _r2(x: np.ndarray, losses: np.ndarray) -> float | None:
    if np.ptp(losses) <= ROUNDING:
        return None
    rest = losses - np.polyval(np.polyfit(x, losses, 1), x)
    return float(1 - (rest**2).sum() / ((losses - losses.mean()) ** 2).sum())
