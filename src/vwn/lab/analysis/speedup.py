"""How the lead of an arm develops: its speed-up and its gap to the baseline over training, and whether they grow."""

from __future__ import annotations

from typing import Any

import numpy as np

from vwn.lab.analysis.curves import Curve, gap_curve, loss_at, tokens_to_loss
from vwn.lab.analysis.estimates import Estimate
from vwn.lab.analysis.runs import Run, pair_status, read_curve

# The share of the baseline's tokens that is skipped: warm-up, where losses fall too steeply to be told apart.
EARLY = 0.1


def speedup_at(curve: Curve, reference: Curve, target: float) -> dict[str, Any]:
    """Tokens that each of two curves needs to stay at or below `target` (nats per token), and their ratio.

    `baseline_tokens`, `arm_tokens`; `speedup` (the first over the second); `status`:
      "reached"
      "lower bound"  the arm was there at its first point after a step, so that `speedup` is a lower bound
      "not reached"  the arm does not stay at or below the target within its budget
      "diverged"     the arm's curve holds a loss that is not finite
      "no target"    nor does the baseline itself, or its first point already does
    All but the first two leave `speedup` None.
    """
    needed, reference_needed = tokens_to_loss(curve, target), tokens_to_loss(reference, target)
    has_target = reference_needed is not None and not reference_needed.at_most
    if not has_target:
        status = "no target"
    elif needed is None:
        status = "not reached" if curve.is_finite else "diverged"
    else:
        status = "lower bound" if needed.at_most else "reached"
    ratio = None
    if has_target and needed is not None and reference_needed is not None and needed.tokens > 0:
        ratio = reference_needed.tokens / needed.tokens
    return {
        "baseline_tokens": reference_needed.tokens if has_target and reference_needed is not None else None,
        "arm_tokens": None if needed is None else needed.tokens,
        "speedup": ratio,
        "status": status,
    }


def speedup_curve(run: Run, baseline: Run | None, key: str) -> list[dict[str, Any]]:
    """`speedup_at` the baseline's loss at each of its points after the first `EARLY` share of its tokens.

    Each point also holds `tokens` (the baseline's there) and `loss` (the target). Empty for the baseline itself,
    without a baseline of this seed, and where the baseline's curve is empty or not finite.
    """
    reference = read_curve(baseline, key)
    if run is baseline or not reference.is_finite or read_curve(run, key).is_empty:
        return []
    curve, start = read_curve(run, key), EARLY * float(reference.tokens[-1])
    return [
        {"tokens": float(tokens), "loss": float(loss), **speedup_at(curve, reference, float(loss))}
        for tokens, loss in zip(reference.tokens, reference.losses, strict=True)
        if tokens >= start and tokens > 0
    ]


def mean_speedup_curve(curves: list[list[dict[str, Any]]], diverged: bool) -> list[dict[str, Any]]:
    """`speedup_curve` over seeds, at the points that all seeds share.

    Each point: `tokens`; `mean`, `std`, `n`, `interval` of the speed-up, with n the seeds that reached the target and
    a mean only if all did; `pairs`, the number of seeds; `status`: "reached", "lower bound", "not reached"
    (by no seed), "not reached in every seed", "no target" (of some seed) or "diverged" (some seed's arm or baseline).
    """
    if not curves:
        return []
    by_tokens = [{point["tokens"]: point for point in curve} for curve in curves]
    shared = [tokens for tokens in by_tokens[0] if all(tokens in points for points in by_tokens)]
    return [_mean_point(tokens, [points[tokens] for points in by_tokens], diverged) for tokens in shared]


def mean_gap_curve(gaps: list[Curve], diverged: bool) -> list[dict[str, Any]]:
    """Loss minus the baseline's, in nats per token, over seeds, at the token counts that all seeds share.

    Each point: `tokens`; `mean`, `std`, `n`, `interval`. No mean where a seed's gap is not finite, nor anywhere in
    a curve of a `diverged` seed.
    """
    gaps = [gap for gap in gaps if not gap.is_empty]
    if not gaps:
        return []
    shared = gaps[0].tokens
    for gap in gaps[1:]:
        shared = np.intersect1d(shared, gap.tokens)
    columns = np.stack([gap.losses[np.isin(gap.tokens, shared)] for gap in gaps]).T
    return [
        {
            "tokens": float(tokens),
            **Estimate.over(values.tolist(), honest=not diverged and bool(np.isfinite(values).all())).described(),
        }
        for tokens, values in zip(shared, columns, strict=True)
    ]


def growth(pairs: list[tuple[Run, Run]], key: str) -> dict[str, Any]:
    """Whether the lead of an arm over its baseline grows from half of the budget to its end.

    `pairs` holds the arm's run and the baseline's of each seed; only pairs that end at the same token count are
    judged. `gap`: the lead is the baseline's loss minus the arm's, signed, so that a lag that melts grows too;
    `speedup`: the lead is the speed-up at the baseline's loss. Each holds
      `half`, `end`  the lead there, {"mean", "std", "n", "interval"} over seeds
      `change`       `end` minus `half`, paired by seed
      `verdict`      "grows" or "shrinks" if the 95 % interval of `change` leaves zero out, else "not significant"
      `reason`       why it is not significant, else None
    """
    statuses = [pair_status(run, baseline, key) for run, baseline in pairs]
    judged = [pair for pair, status in zip(pairs, statuses, strict=True) if status == "compared"]
    curves = [(read_curve(run, key), read_curve(baseline, key)) for run, baseline in judged]
    blocked = None
    if "diverged" in statuses or not all(c.is_finite and r.is_finite for c, r in curves):
        blocked = "a run diverged"
    elif not curves:
        blocked = "no pair of runs with one budget"
    gaps = [_gap_leads(curve, reference) for curve, reference in curves]
    speedups = [_speedup_leads(curve, reference) for curve, reference in curves]
    return {"gap": _growth(gaps, blocked), "speedup": _growth(speedups, blocked)}


def seed_gap(run: Run, baseline: Run, key: str) -> Curve:
    """The gap of one run to the baseline's run of its seed."""
    return gap_curve(read_curve(run, key), read_curve(baseline, key))


def _mean_point(tokens: float, points: list[dict[str, Any]], diverged: bool) -> dict[str, Any]:
    found = {point["status"] for point in points}
    speedups = [point["speedup"] for point in points if point["speedup"] is not None]
    if diverged or "diverged" in found:
        status = "diverged"
    elif "no target" in found:
        status = "no target"
    elif "not reached" in found:
        status = "not reached" if found == {"not reached"} else "not reached in every seed"
    else:
        status = "lower bound" if "lower bound" in found else "reached"
    honest = status in ("reached", "lower bound") and len(speedups) == len(points)
    return {
        "tokens": tokens,
        **Estimate.over(speedups, honest=honest).described(),
        "pairs": len(points),
        "status": status,
    }


# The lead at half of the budget and at its end, or the reason why there is none.
Leads = tuple[float, float] | str


def _gap_leads(curve: Curve, reference: Curve) -> Leads:
    end = float(reference.tokens[-1])
    losses = [loss_at(c, at) for at in (end / 2, end) for c in (reference, curve)]
    if any(loss is None for loss in losses):
        return "no validation point in the first half of the budget"
    half, half_arm, final, final_arm = (float(loss) for loss in losses if loss is not None)
    return half - half_arm, final - final_arm


def _speedup_leads(curve: Curve, reference: Curve) -> Leads:
    leads = []
    for at in (float(reference.tokens[-1]) / 2, float(reference.tokens[-1])):
        target = loss_at(reference, at)
        if target is None:
            return "no validation point in the first half of the budget"
        found = speedup_at(curve, reference, target)
        if found["status"] == "lower bound":
            return "the speed-up is only bounded: too few early validation points"
        if found["status"] != "reached":
            return f"the baseline’s loss is {found['status']}" if found["status"] == "not reached" else "no target"
        leads.append(found["speedup"])
    return leads[0], leads[1]


def _growth(leads: list[Leads], blocked: str | None) -> dict[str, Any]:
    reasons = [lead for lead in leads if isinstance(lead, str)]
    pairs = [lead for lead in leads if not isinstance(lead, str)]
    if blocked is None and reasons:
        blocked = (
            f"{reasons[0]} in {reasons.count(reasons[0])} of {len(leads)} {'seed' if len(leads) == 1 else 'seeds'}"
        )
    honest = blocked is None
    change = Estimate.over([end - half for half, end in pairs], honest)
    if honest and change.n == 1:
        blocked = "one seed"
    elif honest and change.sign() == 0:
        blocked = "within the 95 % interval"
    return {
        "half": Estimate.over([half for half, _ in pairs], honest).described(),
        "end": Estimate.over([end for _, end in pairs], honest).described(),
        "change": change.described(),
        "verdict": {-1: "shrinks", 0: "not significant", 1: "grows"}[change.sign()],
        "reason": blocked,
    }
