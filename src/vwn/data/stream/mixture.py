"""Several sources in one stream: their weights, and which of them each window of a batch comes from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import inf

import numpy as np

from vwn.common.errors import UserError

_GOLDEN = (5**0.5 - 1) / 2


def parse_sources(specs: Sequence[str]) -> dict[str, float]:
    """`SOURCE` or `SOURCE=WEIGHT` to shares of the tokens, which sum to 1; a weight is 1 where none is given.

    Raises `UserError` for a weight that is no positive number and a source that is named twice.
    """
    weights: dict[str, float] = {}
    for spec in specs:
        source, given, number = spec.rpartition("=")
        if not given or os.path.exists(os.path.expanduser(spec)) or any(c in number for c in "/*?["):
            source, number = spec, "1"
        try:
            weight = float(number)
        except ValueError:
            weight = -1.0
        if not (source and 0 < weight < inf):
            raise UserError(
                f"--stream {spec} must be SOURCE or SOURCE=WEIGHT with a positive weight, such as books=0.3"
            )
        if source in weights:
            raise UserError(f"--stream names {source} twice; give it once, with the sum of the weights")
        weights[source] = weight
    total = sum(weights.values())
    return {source: weight / total for source, weight in weights.items()}


def sources_of_step(weights: Sequence[float], batch: int, step: int, seed: int) -> np.ndarray:
    """The source of every window of a step's global batch, `[batch]`.

    Every batch holds of each source its share of windows, rounded up or down; over many steps the shares are exact.
    It depends on the arguments alone, so that any rank and worker knows it. Which slot has which source is shuffled
    anew in every step, so that each reader reads from all of them.
    """
    if len(weights) == 1:
        return np.zeros(batch, dtype=np.int64)
    offset = (step + 1) * _GOLDEN % 1.0
    points = (np.arange(batch) + offset) / batch
    found = np.searchsorted(np.cumsum(weights[:-1]), points, side="right")
    # RandomState's numbers are frozen; those of numpy's newer generators may change with its version.
    return np.random.RandomState([seed, step & 0xFFFFFFFF, step >> 32]).permutation(found)
