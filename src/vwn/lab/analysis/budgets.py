"""Decayed losses over training budgets: gap, slope and speed-up at each.

A run has one cool-down per budget, branched off a constant-rate trunk; its field `decayed` holds their final losses.
Between its budgets the baseline's decayed loss is interpolated over log tokens. Up to three times beyond them a law
`E + B T^-β` is used, with B and β fitted to all seeds and E such that it meets the seed's nearest budget; such numbers
are marked.

The speed-up of an arm at budget T is T'/T: T' are the tokens the baseline needs for the arm's decayed loss at T. It
is about exp(gap / slope), where the slope is the fall of the baseline's decayed loss per e-fold of tokens. The paper
counts the other way round: T over the tokens that the arm needs for the baseline's loss at T, here `tokens_factors`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import Any

import numpy as np

from vwn.lab.analysis.compute import cost_ratio
from vwn.lab.analysis.curves import Curve, loss_at, tokens_to_loss
from vwn.lab.analysis.estimates import Estimate, Ratio
from vwn.lab.analysis.runs import LOSS_KEYS, Run, runs_by_arm
from vwn.lab.analysis.scaling import FEWEST_WIDTHS, fit_family, width_family
from vwn.lab.analysis.wording import bounded

COSTS = ("tokens", "flops", "seconds")
# Budgets that a law of three numbers needs.
FEWEST_BUDGETS = 3
# A law of few points says nothing further than so many times beyond the budgets it was fitted to.
REACH = 3.0


@dataclass(frozen=True)
class Law:
    """The baseline's decayed loss `E + scale T^-power` in nats per token; E depends on the seed."""

    scale: float
    power: float

    def slope(self, tokens: float) -> float:
        """Return the fall of the loss per e-fold of tokens at `tokens`, in nats per token."""
        return self.power * self.scale * tokens**-self.power


@dataclass(frozen=True)
class Measured:
    """One number of an arm over seeds; `over_seeds` has no mean if some seed has no number.

    `at_least` is what every seed of a speed-up reaches without extrapolation, if each shows such a bound.
    """

    by_seed: dict[int, float]
    over_seeds: Estimate
    extrapolated: bool
    at_least: float | None = None

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The 95 % interval over three seeds or more, the range of two; None of one, and without a mean."""
        interval, values = self.over_seeds.interval, self.by_seed.values()
        if interval is None:
            return None
        return (interval[0], interval[1]) if len(values) > 2 else (min(values), max(values))

    def text(self, form: str, unit: str = "") -> str:
        """Write `1.19× (1.12 to 1.26)`, the mean and its bounds, `1.19× (one seed)`, or a dash without a mean."""
        return bounded(self.over_seeds.mean, self.bounds, form, unit)


@dataclass(frozen=True)
class EqualCost:
    """An arm against the baseline at equal training tokens, FLOPs or seconds.

    Args:
        gap: the arm's decayed loss minus the baseline's, in nats per token.
        speedup: the baseline's cost of the arm's loss over the arm's cost.
        reason: why some seed has no number, else None.
    """

    gap: Measured
    speedup: Measured
    reason: str | None


@dataclass(frozen=True)
class BudgetPoint:
    """One arm at one budget."""

    tokens: int
    equal: dict[str, EqualCost]

    @property
    def speedup(self) -> Measured:
        """The speed-up in tokens."""
        return self.equal["tokens"].speedup


@dataclass(frozen=True)
class BaselinePoint:
    """The baseline at one budget: its decayed loss, and the law's slope there (None without a law)."""

    tokens: int
    loss: Estimate
    slope: float | None


@dataclass(frozen=True)
class BudgetStudy:
    """The budgets of a comparison in one loss."""

    baseline: list[BaselinePoint]
    law: Law | None
    arms: dict[str, list[BudgetPoint]]
    """Points of each arm but the baseline; only budgets that the arm and the baseline share a seed at."""
    tokens_factors: dict[str, dict[int, Measured]]
    """Arm and budget -> the budget over the tokens that the arm needs for the baseline's decayed loss there."""
    widths: list[dict[str, Any]]
    """The fit of `fit_family` to the decayed losses of each budget that has three widths or more, with its `tokens`."""


@dataclass(frozen=True)
class Decayed:
    """The decayed losses of one run, of the baseline or of an arm whose law is fitted."""

    curve: Curve
    law: Law | None

    def loss_at(self, tokens: float) -> tuple[float | None, bool]:
        """Return the loss of a run of `tokens`, and whether it is extrapolated."""
        first, last = self.curve.tokens[0], self.curve.tokens[-1]
        if first <= tokens <= last:
            return loss_at(self.curve, tokens), False
        if self.law is None or not first / REACH <= tokens <= last * REACH:
            return None, True
        gain = self.law.scale * (tokens**-self.law.power - (first if tokens < first else last) ** -self.law.power)
        return self.curve.losses[0 if tokens < first else -1] + gain, True

    def tokens_for(self, loss: float) -> tuple[float | None, bool]:
        """Return the tokens of a run that ends at `loss`, and whether they are extrapolated."""
        first, last = self.curve.tokens[0], self.curve.tokens[-1]
        found = tokens_to_loss(self.curve, loss)
        if found is not None and (not found.at_most or loss == self.curve.losses[0]):
            return found.tokens, False
        if self.law is None:
            return None, True
        place = 0 if found is not None else -1
        rest = (loss - self.curve.losses[place]) / self.law.scale + self.curve.tokens[place] ** -self.law.power
        tokens = float(rest ** (-1 / self.law.power)) if rest > 0 else inf
        return (tokens if first / REACH <= tokens <= last * REACH else None), True


def budget_studies(report: dict[str, Any]) -> dict[str, BudgetStudy]:
    """Return the study of each loss (`"loss"`, `"loss_2"`) that the baseline has decayed losses in; often empty."""
    studies = {}
    for key in LOSS_KEYS:
        baseline = [run for run in report["arms"] if run["name"] == report.get("baseline") and _budgets(run, key)]
        if baseline:
            studies[key] = _study(report, baseline, key)
    return studies


def fit_law(curves: list[Curve]) -> Law | None:
    """Fit `E + B T^-β` by least squares, E for each curve and B, β for all; None if the loss does not fall so.

    For each β of a grid that closes in on the best one, E and B solve a linear problem.
    """
    if np.unique([tokens for curve in curves for tokens in curve.tokens]).size < FEWEST_BUDGETS:
        return None
    tokens = np.concatenate([curve.tokens for curve in curves])
    losses = np.concatenate([curve.losses for curve in curves])
    seeds = np.repeat(np.eye(len(curves)), [curve.tokens.size for curve in curves], axis=0)

    def solve(power: float) -> tuple[float, float]:
        design = np.column_stack([seeds, (tokens / tokens.max()) ** -power])
        found = np.linalg.lstsq(design, losses, rcond=None)[0]
        return float(((design @ found - losses) ** 2).sum()), float(found[-1])

    powers = np.geomspace(0.01, 3.0, 60)
    for _ in range(6):
        best = int(np.argmin([solve(power)[0] for power in powers]))
        lower, upper = powers[max(best - 1, 0)], powers[min(best + 1, powers.size - 1)]
        power, powers = float(powers[best]), np.geomspace(lower, upper, 30)
    scale = solve(power)[1]
    return Law(scale * tokens.max() ** power, power) if scale > 0 else None


def _study(report: dict[str, Any], baseline: list[Run], key: str) -> BudgetStudy:
    arms = runs_by_arm(report)
    law = fit_law([curve for run in baseline if (curve := _curve(run, key)).is_finite])
    references = {run["seed"]: (run, Decayed(_curve(run, key), law)) for run in baseline}
    budgets = sorted({tokens for run in baseline for tokens in _budgets(run, key)})
    found, factors = {}, {}
    for name, runs in arms.items():
        if name != report.get("baseline"):
            points = [_point(runs, references, tokens, key) for tokens in budgets]
            found[name] = [point for point in points if point is not None]
            factors[name] = _tokens_factors(runs, references, budgets, key)
    family = width_family(report)
    fits = []
    for tokens in sorted({tokens for runs in family.values() for run in runs for tokens in _budgets(run, key)}):
        cut = {name: [at_budget(run, tokens) for run in runs] for name, runs in family.items()}
        some = {name: [run for run in runs if run is not None] for name, runs in cut.items()}
        some = {name: runs for name, runs in some.items() if runs}
        if len({runs[0]["r"] for runs in some.values()}) >= FEWEST_WIDTHS:
            fits.append({"tokens": tokens, **fit_family(some, key)})
    rows = [
        BaselinePoint(
            tokens,
            Estimate.over([loss for run in baseline if (loss := _loss(run, tokens, key))]),
            None if law is None else law.slope(tokens),
        )
        for tokens in budgets
    ]
    return BudgetStudy(rows, law, {name: points for name, points in found.items() if points}, factors, fits)


def at_budget(run: Run, tokens: int) -> Run | None:
    """Return `run` as one that ends with its cool-down at `tokens`, or None if it has none there."""
    point = next((point for point in run.get("decayed") or [] if point["tokens"] == tokens), None)
    return None if point is None else {**run, "judged": [point]}


def _point(runs: list[Run], references: dict[int, tuple[Run, Decayed]], tokens: int, key: str) -> BudgetPoint | None:
    pairs = [
        (run, *references[run["seed"]])
        for run in runs
        if run["seed"] in references
        and tokens in _budgets(run, key)
        and tokens in _budgets(references[run["seed"]][0], key)
    ]
    if not pairs:
        return None
    return BudgetPoint(tokens, {cost: _equal_cost(pairs, tokens, cost, key) for cost in COSTS})


def _equal_cost(pairs: list[tuple[Run, Run, Decayed]], tokens: int, cost: str, key: str) -> EqualCost:
    gaps: dict[int, float] = {}
    speedups: dict[int, float] = {}
    reasons: list[str] = []
    least: list[float] = []  # speed-ups that the baseline's own budgets show
    gap_beyond = speedup_beyond = False
    for run, baseline, decayed in pairs:
        ratio, loss = cost_ratio(run, baseline, cost), _loss(run, tokens, key)
        if loss is None or not decayed.curve.is_finite:
            reasons.insert(0, "diverged")
            continue
        if ratio is None:
            reasons.append("no FLOPs" if cost == "flops" else "no clock")
            continue
        reference, outside = decayed.loss_at(ratio * tokens)
        needed, further = decayed.tokens_for(loss)
        gap_beyond, speedup_beyond = gap_beyond or outside, speedup_beyond or further
        if reference is not None:
            gaps[run["seed"]] = float(loss - reference)
        if needed is not None:
            speedups[run["seed"]] = needed / (ratio * tokens)
        measured = decayed.curve.tokens[-1] if loss < decayed.curve.losses.min() else 0.0 if further else needed or 0.0
        least.append(float(measured / (ratio * tokens)))
        if reference is None or needed is None:
            reasons.append(f"beyond {'' if decayed.law is None else f'{REACH:.0f} times '}the baseline’s budgets")
    gap, speedup = (
        Measured(by_seed, estimate.over([*by_seed.values()], honest=len(by_seed) == len(pairs)), extrapolated)
        for estimate, by_seed, extrapolated in ((Estimate, gaps, gap_beyond), (Ratio, speedups, speedup_beyond))
    )
    speedup = replace(speedup, at_least=min(least) or None if len(least) == len(pairs) else None)
    return EqualCost(gap, speedup, reasons[0] if reasons else None)


def _tokens_factors(
    runs: list[Run], references: dict[int, tuple[Run, Decayed]], budgets: list[int], key: str
) -> dict[int, Measured]:
    """Return `BudgetStudy.tokens_factors` of one arm.

    A seed of the arm that was trained for fewer tokens counts only if all of its seeds come to the baseline's loss.
    """
    runs = [run for run in runs if run["seed"] in references and _budgets(run, key)]
    curves = {run["seed"]: _curve(run, key) for run in runs}
    law = fit_law([curve for curve in curves.values() if curve.is_finite])
    found = {}
    for budget in budgets:
        losses = {seed: loss for seed in curves if (loss := _loss(references[seed][0], budget, key)) is not None}
        if not all(tokens_to_loss(curves[seed], loss) for seed, loss in losses.items()):
            losses = {seed: loss for seed, loss in losses.items() if curves[seed].tokens[-1] >= budget}
        finite = {seed: Decayed(curves[seed], law) for seed in losses if curves[seed].is_finite}
        needed = {seed: decayed.tokens_for(losses[seed]) for seed, decayed in finite.items()}
        factors = {seed: budget / tokens for seed, (tokens, _) in needed.items() if tokens}
        if factors:
            over_seeds = Ratio.over([*factors.values()], honest=len(factors) == len(losses))
            found[budget] = Measured(factors, over_seeds, any(outside for _, outside in needed.values()))
    return found


def _budgets(run: Run, key: str) -> list[int]:
    """Return the budgets that the run has a cool-down at; in next-2-token loss only if that was measured."""
    points = run.get("decayed") or []
    measured = key == "loss" or any(point.get(key) is not None for point in points)
    return [point["tokens"] for point in points] if measured else []


def _loss(run: Run, tokens: int, key: str) -> float | None:
    loss = next((point.get(key) for point in run.get("decayed") or [] if point["tokens"] == tokens), None)
    return None if loss is None or not np.isfinite(loss) else float(loss)


def _curve(run: Run, key: str) -> Curve:
    points = sorted(run["decayed"], key=lambda point: point["tokens"])
    losses = [np.nan if point.get(key) is None else point[key] for point in points]
    return Curve(np.array([point["tokens"] for point in points], dtype=np.float64), np.array(losses, dtype=np.float64))
