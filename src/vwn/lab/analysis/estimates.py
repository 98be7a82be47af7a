"""Means over seeds with their spread, their 95 % interval, and what that interval decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from math import exp, log
from typing import Any

import numpy as np

# Student's t, two-sided 95 %, by seeds minus one.
T_95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
# Differences below this, in nats or as a ratio, are rounding: equal seeds would make them significant.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Estimate:
    """Over `n` seeds: the mean (None if there is no honest one) and the sample standard deviation (None below two)."""

    mean: float | None
    std: float | None
    n: int

    @classmethod
    def over(cls, values: Sequence[float], honest: bool = True) -> Estimate:
        """Return the mean and spread of `values`; with `honest=False` only their count is kept."""
        if not values or not honest:
            return cls(None, None, len(values))
        return cls(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None, len(values))

    @property
    def interval(self) -> list[float] | None:
        """`[low, high]`, the 95 % interval of Student's t; None below two seeds."""
        if self.mean is None or self.std is None:
            return None
        half = t_95(self.n) * self.std / self.n**0.5
        return [self.mean - half, self.mean + half]

    def sign(self) -> int:
        """Return -1 or 1 if the 95 % interval lies below or above zero; 0 if it does not decide, or there is none."""
        if self.mean is None or self.interval is None or abs(self.mean) <= ROUNDING:
            return 0
        return (self.interval[0] > 0) - (self.interval[1] < 0)

    def described(self) -> dict[str, Any]:
        """Return `{"mean", "std", "n", "interval"}`, JSON types only."""
        return {**asdict(self), "interval": self.interval}


class Ratio(Estimate):
    """The geometric mean of ratios; `std` is that of their logarithms, in which the interval is symmetric."""

    @classmethod
    def over(cls, values: Sequence[float], honest: bool = True) -> Ratio:
        logs = Estimate.over([log(value) for value in values], honest)
        return cls(None if logs.mean is None else exp(logs.mean), logs.std, logs.n)

    @property
    def interval(self) -> list[float] | None:
        logs = None if self.mean is None else Estimate(log(self.mean), self.std, self.n).interval
        return logs and [exp(bound) for bound in logs]


def verdict(difference: Estimate) -> str:
    """Return `"lower"` or `"higher"` if the 95 % interval of Student's t leaves zero out; `"undecided"` if not, or with
    one seed; `"unknown"` without a mean."""
    return "unknown" if difference.mean is None else {-1: "lower", 0: "undecided", 1: "higher"}[difference.sign()]


def t_95(seeds: int) -> float:
    """Return how many standard errors from zero a mean over `seeds` runs must lie to be significant at 95 %."""
    freedom = seeds - 1
    if freedom <= len(T_95):
        return T_95[freedom - 1]
    return 1.95996 + 2.3723 / freedom + 2.8225 / freedom**2  # Cornish-Fisher, to 1e-4


def as_json(value: Any) -> Any:
    """Return dataclasses as dicts of JSON types, estimates with their interval."""
    if isinstance(value, Estimate):
        return value.described()
    if is_dataclass(value):
        return {f.name: as_json(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    return [as_json(item) for item in value] if isinstance(value, list | tuple) else value
