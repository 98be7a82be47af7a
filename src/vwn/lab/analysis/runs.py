"""The runs of a report by arm and seed, and what kind of arm each is."""

from __future__ import annotations

from typing import Any

import numpy as np

from vwn.lab.analysis.curves import EMPTY, Curve

LOSS_KEYS = ("loss", "loss_2")

Run = dict[str, Any]


def judged_points(run: Run) -> list[dict[str, Any]]:
    """Return what `run` is judged by: its decayed losses at the shared budgets, else its validation curve."""
    return run.get("judged") or run["curve"]


def with_judged_points(runs: list[Run]) -> list[Run]:
    """Add to `runs` the decayed losses at the budgets that all share, as `judged`; one that diverged has none."""
    clean = [{field: value for field, value in run.items() if field != "judged"} for run in runs]
    whole = [read_curve(run, "loss").final_loss is not None for run in clean]  # also if a smaller budget had ended
    points = [(run.get("decayed") or []) if ended else [] for run, ended in zip(clean, whole, strict=True)]
    budgets = [{point["tokens"] for point in some} for some, ended in zip(points, whole, strict=True) if ended]
    shared = set.intersection(*budgets) if budgets else set()
    judged = [[point for point in some if point["tokens"] in shared] for some in points]
    return [{**run, "judged": some} if some else run for run, some in zip(clean, judged, strict=True)]


def read_curve(run: Run | None, key: str) -> Curve:
    """Return the judged points of a loss (`"loss"` or `"loss_2"`); null and infinite ones become NaN; empty for None.

    Raises ValueError if the token counts do not increase strictly.
    """
    if run is None:
        return EMPTY
    points = judged_points(run)
    tokens = np.array([point["tokens"] for point in points], dtype=np.float64)
    raw = [point.get(key) for point in points]
    losses = np.array([np.nan if value is None else value for value in raw], dtype=np.float64)
    if not (np.diff(tokens) > 0).all():
        raise ValueError(f"the curve of arm {run['name']!r}, seed {run['seed']}, does not increase in tokens")
    return Curve(tokens, np.where(np.isfinite(losses), losses, np.nan))


def has_loss(run: Run, key: str) -> bool:
    """Return whether `run` was measured in this loss at all; the next-token loss always is."""
    return key == "loss" or any(point.get(key) is not None for point in judged_points(run))


def measured_losses(report: dict[str, Any]) -> list[str]:
    """Return the losses that some arm of an analysed report was measured in."""
    return [key for key in LOSS_KEYS if any(arm[key] is not None for arm in report["summary"])]


def runs_by_arm(report: dict[str, Any]) -> dict[str, list[Run]]:
    """Return arm name -> its runs, both in the report's order. Raises ValueError if an arm holds a seed twice."""
    grouped: dict[str, list[Run]] = {}
    for run in report["arms"]:
        runs = grouped.setdefault(run["name"], [])
        if any(other["seed"] == run["seed"] for other in runs):
            raise ValueError(f"arm {run['name']!r} holds seed {run['seed']} twice")
        runs.append(run)
    return grouped


def baseline_by_seed(report: dict[str, Any]) -> dict[int, Run]:
    """Return seed -> the baseline's run; empty if the report has no baseline arm."""
    return {run["seed"]: run for run in report["arms"] if run["name"] == report.get("baseline")}


def pair_status(run: Run, other: Run | None, key: str) -> str:
    """Return whether the final losses of two runs of one seed can be compared; `"compared"` if so.

    Else `"no baseline"` (there is no other run), `"no data"` (an empty curve, or a loss not measured), `"diverged"`
    (a final loss is not finite) or `"different budgets"` (the runs end at different token counts).
    """
    if other is None:
        return "no baseline"
    curve, reference = read_curve(run, key), read_curve(other, key)
    if curve.is_empty or reference.is_empty or not (has_loss(run, key) and has_loss(other, key)):
        return "no data"
    if curve.final_loss is None or reference.final_loss is None:
        return "diverged"
    return "compared" if curve.budget == reference.budget else "different budgets"


def is_generalized(run: Run, baseline: str | None) -> bool:
    """Return whether the arm has Generalized Hyper-Connections with the comparison's options, but for its width, its
    embedding and its MTP modules; where the run does not say, all but the baseline have."""
    own = run.get("options", {}).keys() - {"connection", "embedding", "mtp", "learning_rate"}
    return run["name"] != baseline and run.get("connection", "ghc") == "ghc" and not own
