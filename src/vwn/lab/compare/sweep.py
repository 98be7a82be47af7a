"""Each arm's learning rate, found on a shorter budget and another seed than the measured runs, and bracketed.

At one shared rate a comparison says nothing: the best rates of arms differ by more than the arms do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from vwn.common.errors import UserError
from vwn.lab.compare.arms import Arm
from vwn.lab.compare.config import CompareConfig
from vwn.training.config import TrainConfig
from vwn.training.result import RunResult

FACTOR = 2.0
"""Between neighbouring rates."""
CRITERIA = ("next-token loss", "next-token loss + λ · next-2-token loss")
"""What a rate is judged by, of the validation text at the end: the loss that is trained on, without and with MTP."""

Losses = dict[str, float | None]


def sweep_run(config: CompareConfig, run: TrainConfig, name: str, rate: float) -> TrainConfig:
    """The run that tries ``rate`` for the arm ``name``, whose measured run is ``run``."""
    steps = sweep_steps(config)
    warmup = config.optim.warmup_steps
    if warmup is not None:
        warmup = round(warmup * steps / shortest(run))
    return dataclasses.replace(
        run,
        out=config.out / "sweep" / f"{name}-lr{rate:.6g}",
        seed=config.sweep.sweep_seed,
        optim=dataclasses.replace(run.optim, steps=steps, budgets=(), warmup_steps=warmup, learning_rate=rate),
        eval_every=steps,
    )


def sweep_steps(config: CompareConfig) -> int:
    """Optimiser steps of each of a sweep's runs, which cool down as the measured ones do."""
    run = config.run(config.parsed[0], config.seeds[0])
    return config.sweep.sweep_steps or (shortest(run) if run.branches else max(1, config.optim.steps // 2))


def shortest(run: TrainConfig) -> int:
    """Optimiser steps of a run, or of the smallest of its budgets."""
    return run.branches[0].steps if run.branches else run.optim.steps


def first_rates(config: CompareConfig, start: float) -> tuple[float, ...]:
    """The rates a sweep begins with, around ``start``."""
    return tuple(sorted(set(config.sweep.sweep_rates))) or (start / FACTOR, start, start * FACTOR)


def sweep(config: CompareConfig, arm: Arm, start: float, final_loss: Callable[[float], Losses]) -> dict[str, Any]:
    """Try rates for one arm until the best one has worse neighbours on both sides.

    Args:
        config: the comparison.
        arm: whose rate is sought.
        start: rate around which to begin.
        final_loss: trains at a rate and returns the final validation losses, see :func:`outcome`.

    Returns:
        ``{arm, seed, steps, criterion, rates: [{learning_rate, loss, next_token, next_2_token}], best, bracketed}``,
        rates ascending; ``loss`` is the criterion, what the arm was trained on.

    Raises:
        UserError: the arm diverged at every rate.
    """
    found = {rate: final_loss(rate) for rate in first_rates(config, start)}
    for _ in range(config.sweep.sweep_extensions):
        further = _beyond({rate: outcome["loss"] for rate, outcome in found.items()})
        if further is None:
            break
        found[further] = final_loss(further)
    losses = {rate: outcome["loss"] for rate, outcome in found.items()}
    finite = {rate: loss for rate, loss in losses.items() if loss is not None}
    if not finite:
        tried = ", ".join(f"{rate:.3g}" for rate in sorted(losses))
        raise UserError(f"the arm {arm.name} diverged at every rate of its sweep ({tried}); give lower --sweep-rates")
    best = min(finite, key=lambda rate: (finite[rate], rate))
    return {
        "arm": arm.name,
        "seed": config.sweep.sweep_seed,
        "steps": sweep_steps(config),
        "criterion": CRITERIA[arm.options(config.common_width).mtp > 0],
        "rates": [{"learning_rate": rate, **found[rate]} for rate in sorted(found)],
        "best": best,
        "bracketed": min(losses) < best < max(losses),
    }


def _beyond(losses: Mapping[float, float | None]) -> float | None:
    """The next rate to try: beyond the edge at which the best one lies; None if it lies inside."""
    worst = float("inf")
    best = min(losses, key=lambda rate: (worst if losses[rate] is None else losses[rate], rate))
    if best == min(losses) or losses[best] is None:
        return min(losses) / FACTOR
    return best * FACTOR if best == max(losses) else None


def as_given(name: str, rate: float) -> dict[str, Any]:
    """The entry of an arm whose rate was not swept."""
    return {"arm": name, "seed": None, "steps": None, "criterion": None, "rates": [], "best": rate, "bracketed": False}


def outcome(result: RunResult, weight: float) -> Losses:
    """``{loss, next_token, next_2_token}`` at the end of a sweep's run; None where it diverged or there is no MTP.

    Args:
        result: of the run.
        weight: λ, of the next-2-token loss.
    """
    last = result.curve[-1]
    first, second = last["loss"], last["loss_2"]
    judged = first if first is None or second is None else first + weight * second
    return {"loss": judged, "next_token": first, "next_2_token": second}
