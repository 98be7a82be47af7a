"""Arms at equal training compute and at equal wall-clock time.

Both curves are read where the run that spent less ended. The other run is read before its end, where its learning rate
has not decayed yet: it stands there worse than a run planned for that budget would. `arm_share` and `baseline_share`
below 1 say whom that disadvantages.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vwn.lab.analysis.curves import Curve, loss_at
from vwn.lab.analysis.estimates import Estimate, verdict
from vwn.lab.analysis.runs import Run, pair_status, read_curve

# A training step is a forward pass and a backward pass of twice its FLOPs.
FLOPS_OF_TRAINING = 3


def at_equal_flops(run: Run, baseline: Run | None, key: str) -> dict[str, Any]:
    """The difference of two runs at the largest training FLOP count that both have reached; see `_read_at`."""
    status = _comparable(run, baseline, key)
    if status != "compared" or baseline is None:
        return _nothing(status)
    flops, reference_flops = run.get("flops_per_token"), baseline.get("flops_per_token")
    if not flops or not reference_flops:
        return _nothing("no FLOPs")
    curve, reference = read_curve(run, key), read_curve(baseline, key)
    end, reference_end = float(curve.tokens[-1]), float(reference.tokens[-1])
    # The run that spent less is read at its very end, whatever rounding does to a quotient.
    cost = min(flops * end, reference_flops * reference_end)
    tokens = end if cost == flops * end else min(cost / flops, end)
    reference_tokens = (
        reference_end if cost == reference_flops * reference_end else min(cost / reference_flops, reference_end)
    )
    return _read_at(curve, reference, tokens, reference_tokens, FLOPS_OF_TRAINING * cost)


def at_equal_seconds(run: Run, baseline: Run | None, key: str) -> dict[str, Any]:
    """The difference of two runs at the longest training time, in seconds, that both have reached; see `_read_at`."""
    status = _comparable(run, baseline, key)
    if status != "compared" or baseline is None:
        return _nothing(status)
    clock, reference_clock = _seconds(run), _seconds(baseline)
    if clock is None or reference_clock is None:
        return _nothing("no clock")
    curve, reference = read_curve(run, key), read_curve(baseline, key)
    cost = min(float(clock[-1]), float(reference_clock[-1]))
    tokens = float(np.interp(cost, clock, curve.tokens))
    return _read_at(curve, reference, tokens, float(np.interp(cost, reference_clock, reference.tokens)), cost)


def over_seeds(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """The paired difference at equal cost over seeds, of what `at_equal_flops` or `at_equal_seconds` gave for each.

    `difference` {"mean", "std", "n", "interval"}; `verdict` as `verdict`; `status` of the first seed that could not be
    compared, else "compared"; `arm_share`, `baseline_share`: means. No mean if a seed diverged.
    """
    used = [pair for pair in pairs if pair["difference"] is not None]
    honest = all(pair["status"] in ("compared", "no baseline") for pair in pairs)
    difference = Estimate.over([pair["difference"] for pair in used], honest=honest)
    return {
        "difference": difference.described(),
        "verdict": verdict(difference),
        "status": next((pair["status"] for pair in pairs if pair["status"] != "compared"), "compared"),
        **{f: Estimate.over([p[f] for p in used], honest=honest).mean for f in ("arm_share", "baseline_share")},
    }


def _comparable(run: Run, baseline: Run | None, key: str) -> str:
    status = pair_status(run, baseline, key)
    return "compared" if status == "different budgets" else status


def _read_at(curve: Curve, reference: Curve, tokens: float, reference_tokens: float, cost: float) -> dict[str, Any]:
    """`difference` in nats per token at `cost` (FLOPs or seconds), and the share of its tokens each run had then."""
    loss, reference_loss = loss_at(curve, tokens), loss_at(reference, reference_tokens)
    if loss is None or reference_loss is None:
        return _nothing("no data")
    return {
        "status": "compared",
        "difference": loss - reference_loss,
        "cost": cost,
        "arm_share": tokens / float(curve.tokens[-1]),
        "baseline_share": reference_tokens / float(reference.tokens[-1]),
    }


def _nothing(status: str) -> dict[str, Any]:
    return {"status": status, **dict.fromkeys(("difference", "cost", "arm_share", "baseline_share"))}


def _seconds(run: Run) -> np.ndarray | None:
    """Training time at each validation point; None if one is missing or the clock does not run forward."""
    seconds = [point.get("seconds") for point in run["curve"]]
    if any(value is None or not np.isfinite(value) for value in seconds):
        return None
    found = np.array(seconds, dtype=np.float64)
    return found if (np.diff(found) > 0).all() else None
