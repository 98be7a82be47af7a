"""Each arm's learning rate, found on a shorter budget and another seed than the measured runs, and bracketed.

At one shared rate a comparison says nothing: the best rates of arms differ by more than the arms do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from math import inf
from typing import Any

from vwn.common.errors import UserError
from vwn.lab.compare.arms import Arm
from vwn.lab.compare.config import CompareConfig
from vwn.training.config import TrainConfig
from vwn.training.result import RunResult

FACTOR = 2.0
"""Between neighbouring rates."""

Losses = dict[str, float | None]


def sweep_run(config: CompareConfig, run: TrainConfig, name: str, rate: float) -> TrainConfig:
    """Return the run that tries ``rate`` for the arm ``name``, whose measured run is ``run``."""
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
    """Return the optimiser steps of each of a sweep's runs, which cool down as the measured ones do."""
    run = config.run(config.parsed[0], config.seeds[0])
    return config.sweep.sweep_steps or (shortest(run) if run.branches else max(1, config.optim.steps // 2))


def shortest(run: TrainConfig) -> int:
    """Return the optimiser steps of a run, or of the smallest of its budgets."""
    return run.branches[0].steps if run.branches else run.optim.steps


def first_rates(config: CompareConfig, start: float) -> tuple[float, ...]:
    """Return the rates a sweep begins with, around ``start``."""
    return tuple(sorted(set(config.sweep.sweep_rates))) or (start / FACTOR, start, start * FACTOR)


def sweep(config: CompareConfig, arm: Arm, start: float, final_loss: Callable[[float], Losses]) -> dict[str, Any]:
    """Try rates for one arm until the best one has worse neighbours on both sides.

    Args:
        config: the comparison.
        arm: whose rate is sought.
        start: rate around which to begin.
        final_loss: trains at a rate and returns the final validation losses, see :func:`outcome`.

    Returns:
        ``{arm, seed, steps, rates: [{learning_rate, loss, next_token, next_2_token}], best, bracketed}``, rates
        ascending; ``loss``, of the validation text at the end, is what the arm was trained on, and what decides.

    Raises:
        UserError: the arm diverged at every rate.
    """
    found = {rate: final_loss(rate) for rate in first_rates(config, start)}
    best = _best(found)
    for _ in range(config.sweep.sweep_extensions):
        if min(found) < best < max(found):
            break
        further = best / FACTOR if best == min(found) else best * FACTOR
        found[further] = final_loss(further)
        best = _best(found)
    if found[best]["loss"] is None:
        tried = ", ".join(f"{rate:.3g}" for rate in sorted(found))
        raise UserError(f"the arm {arm.name} diverged at every rate of its sweep ({tried}); give lower --sweep-rates")
    return {
        "arm": arm.name,
        "seed": config.sweep.sweep_seed,
        "steps": sweep_steps(config),
        "rates": [{"learning_rate": rate, **found[rate]} for rate in sorted(found)],
        "best": best,
        "bracketed": min(found) < best < max(found),
    }


def _best(found: Mapping[float, Losses]) -> float:
    """Return the rate with the lowest loss, of equal ones the lowest; a diverged run is worse than any other."""
    return min(found, key=lambda rate: (inf if found[rate]["loss"] is None else found[rate]["loss"], rate))


def outcome(result: RunResult, weight: float) -> Losses:
    """Return ``{loss, next_token, next_2_token}`` at a run's end, None where there is none; ``weight`` is λ."""
    last = result.curve[-1]
    first, second = last["loss"], last["loss_2"]
    judged = first if first is None or second is None else first + weight * second
    return {"loss": judged, "next_token": first, "next_2_token": second}
