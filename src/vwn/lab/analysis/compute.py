"""Arms at equal training compute and at equal training time.

Both curves are read where the run that spent less ended. The other run is read before its end, where its learning rate
has not decayed yet: it stands there worse than a run planned for that budget would. `arm_share` and `baseline_share`
below 1 say whom that disadvantages.
"""

from __future__ import annotations

from typing import Any

from vwn.lab.analysis.curves import loss_at
from vwn.lab.analysis.estimates import Estimate, verdict
from vwn.lab.analysis.runs import Run, pair_status, read_curve

# A run is uneven if a tenth of its steps took this many times the median.
UNEVEN = 1.5


def cost_ratio(run: Run, baseline: Run, cost: str) -> float | None:
    """Divide the cost of a token of `run` by the baseline's, in `"tokens"`, `"flops"` or `"seconds"`; None if unknown.

    Seconds are those of the median step (both runs take equally many tokens a step), in older results the mean.
    """
    if cost == "tokens":
        return 1.0
    if cost == "flops":
        return _quotient(run.get("flops_per_token"), baseline.get("flops_per_token"))
    ratio = _quotient(run.get("step_seconds_median"), baseline.get("step_seconds_median"))
    return ratio or _quotient(baseline.get("tokens_per_second"), run.get("tokens_per_second"))


def at_equal_cost(run: Run, baseline: Run | None, key: str, cost: str) -> dict[str, Any]:
    """Give the loss of `run` minus the baseline's at the largest cost that both have reached, `"flops"` or `"seconds"`.

    `difference` in nats per token; `arm_share` and `baseline_share`, the share of its tokens that each run had then;
    `status`: "compared", "no FLOPs", "no clock", or that of `pair_status`. Runs may end at different token counts.
    """
    nothing = dict.fromkeys(("difference", "arm_share", "baseline_share"))
    status = pair_status(run, baseline, key)
    if baseline is None or status not in ("compared", "different budgets"):
        return {"status": status, **nothing}
    ratio = cost_ratio(run, baseline, cost)
    if ratio is None:
        return {"status": "no FLOPs" if cost == "flops" else "no clock", **nothing}
    curve, reference = read_curve(run, key), read_curve(baseline, key)
    end, reference_end = float(curve.tokens[-1]), float(reference.tokens[-1])
    # The run that spent less is read at its very end, whatever rounding does to a quotient.
    arm_first = ratio * end <= reference_end
    tokens, reference_tokens = (end, ratio * end) if arm_first else (reference_end / ratio, reference_end)
    loss, reference_loss = loss_at(curve, tokens), loss_at(reference, reference_tokens)
    if loss is None or reference_loss is None:
        return {"status": "no data", **nothing}
    return {
        "status": "compared",
        "difference": loss - reference_loss,
        "arm_share": tokens / end,
        "baseline_share": reference_tokens / reference_end,
    }


def over_seeds(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what `at_equal_cost` gave for each seed, over seeds: no mean if a seed diverged.

    `difference` {"mean", "std", "n", "interval"}; `verdict` as `verdict`; `status` of the first seed that could not be
    compared, else "compared"; `arm_share`, `baseline_share`: means.
    """
    used = [pair for pair in pairs if pair["difference"] is not None]
    honest = all(pair["status"] in ("compared", "no baseline") for pair in pairs)
    difference = Estimate.over([pair["difference"] for pair in used], honest)
    return {
        "difference": difference.described(),
        "verdict": verdict(difference),
        "status": next((pair["status"] for pair in pairs if pair["status"] != "compared"), "compared"),
        **{f: Estimate.over([pair[f] for pair in used], honest).mean for f in ("arm_share", "baseline_share")},
    }


def is_uneven(run: Run) -> bool:
    """Return whether the run's speed varied so much that it says little."""
    median, slow = run.get("step_seconds_median"), run.get("step_seconds_p90")
    return bool(median and slow and slow / median > UNEVEN)


def _quotient(value: float | None, reference: float | None) -> float | None:
    return value / reference if value and reference else None
