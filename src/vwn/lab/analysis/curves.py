"""Validation curves: where one stays below a loss, its loss at a token count, means over seeds.

Between two validation points the loss is taken as linear in the logarithm of the tokens. Loss curves bend far less
there than over the tokens themselves, and the chord of a bent curve lies above it: over plain tokens a curve of few
points would give speed-ups that are too small, the more so the earlier, and so seem to grow.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Curve:
    """A validation curve: `tokens` [points], strictly increasing; `losses` [points], in nats per token or NaN."""

    tokens: np.ndarray
    losses: np.ndarray

    @property
    def is_empty(self) -> bool:
        return self.tokens.size == 0

    @property
    def is_finite(self) -> bool:
        return not self.is_empty and bool(np.isfinite(self.losses).all())

    @property
    def final_loss(self) -> float | None:
        """The last loss, in nats per token; None for an empty curve or a last point that is not finite."""
        return None if self.is_empty else _finite(self.losses[-1])

    @property
    def budget(self) -> float | None:
        """Tokens at the last point; None for an empty curve."""
        return None if self.is_empty else float(self.tokens[-1])


EMPTY = Curve(np.empty(0), np.empty(0))


@dataclass(frozen=True)
class Reached:
    """The tokens after which a curve stays at or below a target; `at_most` if it was there at its first point."""

    tokens: float
    at_most: bool


def tokens_to_loss(curve: Curve, target: float | None) -> Reached | None:
    """Find where `curve` falls to `target` (nats per token) for good, interpolated in the logarithm of the tokens.

    None if it ends above the target, is empty or holds a loss that is not finite, or if there is no target. A curve
    that was not above the target at its first point after a step gives that point, as an upper bound.
    """
    if target is None or not curve.is_finite:
        return None
    above = np.flatnonzero(curve.losses > target)
    if above.size == 0:
        return Reached(float(curve.tokens[0]), at_most=True)
    last = int(above[-1])
    if last == curve.losses.size - 1:
        return None
    before, after = float(curve.tokens[last]), float(curve.tokens[last + 1])
    share = float((curve.losses[last] - target) / (curve.losses[last] - curve.losses[last + 1]))
    if share == 1.0 or before == 0.0:
        return Reached(after, at_most=share < 1.0)
    return Reached(before * (after / before) ** share, at_most=False)


def loss_at(curve: Curve, tokens: float) -> float | None:
    """Return the loss of `curve` after `tokens`, in nats per token, interpolated as in `tokens_to_loss`.

    None outside the curve, beside a loss that is not finite, and between an untrained model and its first point.
    """
    if curve.is_empty or not curve.tokens[0] <= tokens <= curve.tokens[-1]:
        return None
    place = int(np.searchsorted(curve.tokens, tokens))
    after = float(curve.tokens[place])
    if after == tokens:
        return _finite(curve.losses[place])
    before = float(curve.tokens[place - 1])
    if before == 0.0:
        return None
    share = np.log(tokens / before) / np.log(after / before)
    return _finite((1 - share) * curve.losses[place - 1] + share * curve.losses[place])


def mean_curve(curves: Iterable[Curve]) -> Curve:
    """Average the non-empty curves at the token counts they share; a point where any curve is NaN is NaN."""
    filled = [curve for curve in curves if not curve.is_empty]
    if not filled:
        return EMPTY
    shared = filled[0].tokens
    for curve in filled[1:]:
        shared = np.intersect1d(shared, curve.tokens)
    return Curve(shared, np.mean([curve.losses[np.isin(curve.tokens, shared)] for curve in filled], axis=0))


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
