"""The loss over the virtual width factor: the log-linear law `loss = a + b log2 r` (section 8 of the method's page)."""

from __future__ import annotations

from typing import Any

import numpy as np

from vwn.lab.analysis.curves import Curve
from vwn.lab.analysis.estimates import ROUNDING, Estimate
from vwn.lab.analysis.runs import LOSS_KEYS, Run, has_loss, is_generalized, read_curve, runs_by_arm

FEWEST_WIDTHS = 3

Arms = dict[str, list[Run]]


def fit_scaling(report: dict[str, Any]) -> dict[str, Any]:
    """Return the law fitted to the final losses of the report's width family, by loss; None if it was not measured.

    The baseline is not fitted: it does not lie on the paper's own line either (0.020 from there to r = 2, then 0.008
    and 0.007).
    """
    family = width_family(report)
    return {
        key: fit_family(family, key) if any(has_loss(run, key) for runs in family.values() for run in runs) else None
        for key in LOSS_KEYS
    }


def width_family(report: dict[str, Any]) -> Arms:
    """Return the largest set of Generalized Hyper-Connections arms that differ in width alone, by name.

    They share the embedding form, the MTP depth and the fraction rate m, and have no other options of their own. Of
    sets with equally many widths, the first in the report's order.
    """
    families: dict[tuple[Any, ...], Arms] = {}
    for name, runs in runs_by_arm(report).items():
        run = runs[0]
        if is_generalized(run, report.get("baseline")):
            families.setdefault((run.get("embedding"), run.get("mtp"), run["m"]), {})[name] = runs
    return max(families.values(), key=lambda arms: len({runs[0]["r"] for runs in arms.values()}), default={})


def fit_family(arms: Arms, key: str) -> dict[str, Any]:
    """Fit `loss = intercept + slope * log2 r` by least squares over `arms` within each seed; average over seeds.

    Fitting within a seed cancels what the seed does to all widths alike. The uncertainty of the mean slope is Student's
    t-interval of the per-seed slopes.

      `arms`, `widths` (r), `seeds`  what was fitted: the seeds that all arms share
      `losses`              mean final losses in nats per token, one per arm
      `slope`, `intercept`  {"mean", "std", "n", "interval"} over seeds, nats per token per doubling and at r = 1
      `r2`                  of the mean losses; None if all are equal
      `reason`              why there is no fit; else None
    """
    widths = np.array([runs[0]["r"] for runs in arms.values()], dtype=np.float64)
    by_seed = [{run["seed"]: run for run in runs} for runs in arms.values()]
    seeds = [seed for seed in (by_seed[0] if by_seed else {}) if all(seed in runs for runs in by_seed)]
    curves = [[read_curve(runs[seed], key) for runs in by_seed] for seed in seeds]
    finals = np.array([[curve.final_loss for curve in row] for row in curves], dtype=np.float64)
    reason = _no_fit(widths, curves)
    about: dict[str, Any] = {"arms": list(arms), "widths": widths.tolist(), "seeds": seeds}
    if reason is not None:
        return {**about, **dict.fromkeys(("losses", "slope", "intercept", "r2")), "reason": reason}
    x = np.log2(widths)
    slopes, intercepts = np.polyfit(x, finals.T, 1)
    means = finals.mean(axis=0)
    return {
        **about,
        "losses": means.tolist(),
        "slope": Estimate.over(slopes.tolist()).described(),
        "intercept": Estimate.over(intercepts.tolist()).described(),
        "r2": _r2(x, means),
        "reason": None,
    }


def _no_fit(widths: np.ndarray, curves: list[list[Curve]]) -> str | None:
    distinct = np.unique(widths).size
    if distinct < FEWEST_WIDTHS:
        return f"{distinct} different {'width' if distinct == 1 else 'widths'}, where a line needs {FEWEST_WIDTHS}"
    if not curves:
        return "the arms share no seed"
    every = [curve for row in curves for curve in row]
    if any(np.isnan(curve.losses).all() for curve in every):
        return "an arm has no data"
    if any(curve.final_loss is None for curve in every):
        return "a run diverged"
    return None if len({curve.budget for curve in every}) == 1 else "different budgets"


def _r2(x: np.ndarray, losses: np.ndarray) -> float | None:
    if np.ptp(losses) <= ROUNDING:
        return None
    rest = losses - np.polyval(np.polyfit(x, losses, 1), x)
    return float(1 - (rest**2).sum() / ((losses - losses.mean()) ** 2).sum())
