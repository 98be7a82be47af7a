"""Made-up comparisons whose answers are known."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from math import log2
from typing import Any

Point = dict[str, Any]


def curve(losses: Sequence[float | None], second: Sequence[float | None] | None = None, step: int = 100) -> list[Point]:
    """Points every `step` tokens, the first at `step`."""
    return [
        {
            "tokens": step * (index + 1),
            "loss": loss,
            "loss_2": None if second is None else second[index],
            "seconds": 0.5 * (index + 1),
        }
        for index, loss in enumerate(losses)
    ]


def arm(name: str, seed: int, points: list[Point], **changes: Any) -> dict[str, Any]:
    """One run; its geometry is the `MxN` in its name, if there is one."""
    found = re.match(r"(\d+)x(\d+)", name)
    m, n = (int(found[1]), int(found[2])) if found else (1, 1)
    run = {
        **{"name": name, "m": m, "n": n, "r": n / m, "seed": seed, "learning_rate": 0.006 / m},
        **{"params": 1_000_000 * n, "flops_per_token": 6e6 * n, "tokens_per_second": 20_000 / n},
        **{"peak_memory_bytes": 2**30 * n, "curve": points},
    }
    return {**run, **changes}


def report(*arms: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A report as the runner makes it."""
    return {
        "command": "vwn compare --out runs/try --arms plain 4x16",
        "created": "2025-11-24T10:12:13+00:00",
        "versions": {"vwn": "0.1.0", "python": "3.11.2"},
        "machine": {"cpu": "a processor", "cores": 2, "gpu": None, "os": "Linux"},
        "config": {"backbone": "tiny", "data": "stdlib", "seeds": [0, 1], "optim": {"betas": [0.9, 0.95]}},
        "baseline": "plain",
        "arms": list(arms),
        **changes,
    }


def power_law(
    seeds: int = 3,
    speed: float = 1.0,
    gap: float = 0.0,
    points: int = 20,
    power: float = 0.3,
    level: float = 2.0,
    noise: float = 0.0,
    budget: int = 1_000_000,
) -> list[list[Point]]:
    """One curve per seed, `loss(t) = level + 200 (speed t)^-power + gap + an offset of the seed`, in tokens t.

    `points` equal steps up to `budget`, after an untrained one at 0 tokens; `loss_2` is 0.5 higher. `noise` shifts a
    whole seed by that many nats times -1, 0 or 1, in turn.
    """
    curves = []
    for seed in range(seeds):
        shift = level + gap + seed / 50 + noise * (seed % 3 - 1)
        tokens = [budget * i // points for i in range(points + 1)]
        losses = [8.0 if t == 0 else shift + 200 * (speed * t) ** -power for t in tokens]
        curves.append(
            [
                {"tokens": t, "loss": loss, "loss_2": loss + 0.5, "seconds": t / 1000}
                for t, loss in zip(tokens, losses, strict=True)
            ]
        )
    return curves


def arms_of(name: str, curves: list[list[Point]], **changes: Any) -> list[dict[str, Any]]:
    """One run per seed."""
    return [arm(name, seed, points, **changes) for seed, points in enumerate(curves)]


def realistic(names: Sequence[str] = ("plain", "2x3", "4x16"), seeds: int = 3) -> dict[str, Any]:
    """Falling curves of 20 points, the arms ever lower, each seed with an offset of its own."""
    arms = []
    for seed in range(seeds):
        for place, name in enumerate(names):
            noise = random.Random(100 * seed + place).gauss(0, 0.004)
            losses = [3 + 5 / (1 + t) ** 0.5 - place * (0.05 + noise) * t / 20 + seed / 100 for t in range(1, 21)]
            points = curve(losses, [loss + 0.8 - place * 0.02 for loss in losses], step=100_000)
            arms.append(arm(name, seed, points))
    return report(*arms)


# What sets the arms of a study apart; the number is how far below the baseline each ends, in nats.
STUDY_ARMS: dict[str, dict[str, tuple[dict[str, Any], float]]] = {
    "widths": {
        "plain": ({"connection": "residual"}, 0.0),
        **{f"4x{n}": ({"connection": "ghc"}, 0.05 + 0.02 * log2(n / 4)) for n in (6, 8, 16, 32)},
    },
    "fraction-rate": {
        "plain": ({"connection": "residual"}, 0.0),
        **{f"{m}x{4 * m}": ({"connection": "ghc"}, 0.04 + 0.01 * log2(m)) for m in (1, 2, 4, 8)},
    },
    "mtp": {
        "plain": ({"connection": "residual", "mtp": 0}, 0.0),
        "plain+mtp": ({"connection": "residual", "mtp": 1}, 0.01),
        "4x16": ({"connection": "ghc", "mtp": 0, "m": 4, "n": 16, "r": 4.0}, 0.06),
        "4x16+mtp": ({"connection": "ghc", "mtp": 1, "m": 4, "n": 16, "r": 4.0}, 0.08),
    },
    "family": {
        "plain": ({"connection": "residual"}, 0.0),
        "hc": ({"connection": "hc", "m": 1, "n": 4, "r": 4.0}, 0.03),
        "frac": ({"connection": "hc", "m": 4, "n": 4, "r": 1.0}, 0.005),
        "mhc": ({"connection": "mhc", "m": 1, "n": 4, "r": 4.0}, -0.02),
        "4x16": ({"connection": "ghc"}, 0.06),
        "4x16-ds": ({"connection": "ghc", "m": 4, "n": 16, "r": 4.0}, 0.05),
    },
    "controls": {
        "plain": ({"connection": "residual"}, 0.0),
        "4x16": ({"connection": "ghc"}, 0.06),
        "1x1": ({"connection": "ghc"}, 0.0),
        "plain-params": ({"connection": "residual"}, 0.05),
    },
}


def study(name: str, seeds: int = 3, noise: float = 0.004, swept: bool = True) -> dict[str, Any]:
    """A study's report as the runner makes it: noisy falling curves, lower by what `STUDY_ARMS` says."""
    arms = []
    for seed in range(seeds):
        for place, (arm_name, (changes, below)) in enumerate(STUDY_ARMS[name].items()):
            random_numbers = random.Random(100 * seed + place)
            below += random_numbers.gauss(0, noise)
            points = [{"tokens": 0, "loss": 9.0, "loss_2": 9.0 if changes.get("mtp", 1) else None, "seconds": 0.0}]
            for t in range(1, 21):
                loss = 3 + 5 / (1 + t) ** 0.5 - below * (0.4 + 0.6 * t / 20) + seed / 100
                loss += random_numbers.gauss(0, noise / 4)
                second = loss + 0.8 - 0.4 * below if changes.get("mtp", 1) else None
                points.append({"tokens": t * 100_000, "loss": loss, "loss_2": second, "seconds": t * (1 + place / 10)})
            run = arm(arm_name, seed, points, **{"embedding": "direct", "mtp": 1, **changes})
            arms.append({**run, "flops_per_token": 6e6 * (1 + run["n"] / 100)})
    sweep = [sweep_of(arm_name, place) for place, arm_name in enumerate(STUDY_ARMS[name])] if swept else []
    return report(*arms, study=name, question=f"What does the study {name} ask?", sweep=sweep)


def sweep_of(name: str, place: int, bracketed: bool = True) -> dict[str, Any]:
    """A sweep of three rates whose best is the middle one, or of two, at their edge; the highest diverges sometimes."""
    losses = [3.31, 3.22 - place / 100, None if place == 1 else 3.4]
    rates = [{"learning_rate": 0.003 * 2**i, "loss": loss} for i, loss in enumerate(losses)]
    rates = rates if bracketed else rates[:2]
    return {"arm": name, "seed": 1000, "steps": 250, "rates": rates, "best": 0.006, "bracketed": bracketed}


# Decayed losses over budgets, on a law whose gap, slope and speed-up are known

SCALE, POWER = 200.0, 0.3
BUDGETS = [1_000_000 * 2**i for i in range(5)]


def law(tokens: float, speed: float = 1.0) -> float:
    return 2.0 + SCALE * (speed * tokens) ** -POWER


def budget_runs(
    name: str,
    speed: float = 1.0,
    gap: float = 0.0,
    budgets: list[int] = BUDGETS,
    seeds: tuple[int, ...] = (0, 1, 2),
    noise: float = 0.0,
    **changes: Any,
) -> list[dict[str, Any]]:
    """Runs whose decayed loss is that of the baseline after `speed` times the tokens, plus `gap`; seeds lie apart."""
    found = []
    for seed in seeds:
        shift = gap + seed / 10 + noise * (seed - 1)
        points = [
            {"tokens": t, "loss": law(t, speed) + shift, "loss_2": law(t, speed**2) + shift + 0.5, "seconds": t / 1e3}
            for t in budgets
        ]
        found.append(arm(name, seed, curve([5, 4]), decayed=points, **changes))
    return found
