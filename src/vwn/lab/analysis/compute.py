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
from vwn.lab.analysis.runs import Run, judged_points, pair_status, read_curve

# A run is uneven if a tenth of its steps took this many times the median, or its slowest quarter its fastest.
UNEVEN = 1.5


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
    return _read_at(curve, reference, tokens, reference_tokens)


def at_equal_seconds(run: Run, baseline: Run | None, key: str) -> dict[str, Any]:
    """The difference of two runs at the longest training time, in seconds, that both have reached; see `_read_at`.

    Where both runs have a median step time, a run's clock is that time its share of all steps: what else ran on the
    machine does not count.
    """
    status = _comparable(run, baseline, key)
    if status != "compared" or baseline is None:
        return _nothing(status)
    curve, reference = read_curve(run, key), read_curve(baseline, key)
    clock, reference_clock = _seconds(run), _seconds(baseline)
    ratio = step_ratio(run, baseline)
    if ratio is not None:
        clock, reference_clock = ratio * curve.tokens, reference.tokens
    if clock is None or reference_clock is None:
        return _nothing("no clock")
    cost = min(float(clock[-1]), float(reference_clock[-1]))
    tokens = float(np.interp(cost, clock, curve.tokens))
    return _read_at(curve, reference, tokens, float(np.interp(cost, reference_clock, reference.tokens)))


def step_ratio(run: Run, baseline: Run) -> float | None:
    """The median step time of `run` over the baseline's (both take equally many tokens a step); None if unknown."""
    step, reference = run.get("step_seconds_median"), baseline.get("step_seconds_median")
    return step / reference if step and reference else None


def speed_ratio(run: Run, baseline: Run) -> float | None:
    """Training speed of `run` over the baseline's: by the median step, in older results by tokens per second."""
    ratio = step_ratio(run, baseline)
    if ratio is not None:
        return 1 / ratio
    speed, reference = run.get("tokens_per_second"), baseline.get("tokens_per_second")
    return speed / reference if speed and reference else None


def is_uneven(run: Run) -> bool:
    """Whether the run's speed varied so much that it says little: by `UNEVEN` between its quarters or its steps."""
    median, slow = run.get("step_seconds_median"), run.get("step_seconds_p90")
    if median and slow:
        return slow / median > UNEVEN
    clock, tokens = _seconds(run), read_curve(run, "loss").tokens
    if clock is None or tokens.size < 4:
        return False
    parts = np.interp(np.linspace(tokens[0], tokens[-1], 5), tokens, clock)
    return bool(np.diff(parts).max() / np.diff(parts).min() > UNEVEN)


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


def _read_at(curve: Curve, reference: Curve, tokens: float, reference_tokens: float) -> dict[str, Any]:
    """`difference` in nats per token after these tokens, and the share of its tokens that each run had then."""
    loss, reference_loss = loss_at(curve, tokens), loss_at(reference, reference_tokens)
    if loss is None or reference_loss is None:
        return _nothing("no data")
    return {
        "status": "compared",
        "difference": loss - reference_loss,
        "arm_share": tokens / float(curve.tokens[-1]),
        "baseline_share": reference_tokens / float(reference.tokens[-1]),
    }


def _nothing(status: str) -> dict[str, Any]:
    return {"status": status, **dict.fromkeys(("difference", "arm_share", "baseline_share"))}


def _seconds(run: Run) -> np.ndarray | None:
    """Training time at each validation point; None if one is missing or the clock does not run forward."""
    seconds = [point.get("seconds") for point in judged_points(run)]
    if any(value is None or not np.isfinite(value) for value in seconds):
        return None
    found = np.array(seconds, dtype=np.float64)
    return found if (np.diff(found) > 0).all() else None
