"""Measure how far a comparison is, and estimate when it will be done."""

from __future__ import annotations

import time
from collections.abc import Mapping


class Progress:
    """Work done and to come over all runs of a comparison, sweeps included.

    Work is counted in optimiser steps times the arm's FLOPs per token. How long it takes is learnt from the time since
    the first run of this process began.

    Args:
        flops: FLOPs per token of each arm, by name; of unknown ones any equal number.
    """

    def __init__(self, flops: Mapping[str, float]) -> None:
        self._flops = flops
        self._planned = self._done = self._taken = 0.0  # taken: in this process
        self._since: float | None = None

    def plan(self, arm: str, steps: int) -> None:
        """Add steps of an arm that are to come."""
        self._planned += steps * self._flops[arm]

    def skip(self, arm: str, steps: int) -> None:
        """Count steps of an arm that are done and were not counted."""
        self._done += steps * self._flops[arm]

    def take(self, arm: str, steps: int) -> None:
        """Count steps of an arm that were taken in this process; the first call, with 0 steps, starts the clock."""
        self._since = time.monotonic() if self._since is None else self._since
        self._taken += steps * self._flops[arm]
        self.skip(arm, steps)

    def text(self) -> str:
        """Say such as ``31 %, 1 h 12 min left``; no time before there is anything to learn from."""
        share = f"{min(1.0, self._done / self._planned):.0%}" if self._planned else "100%"
        if not self._taken or self._since is None:
            return share
        pace = (time.monotonic() - self._since) / self._taken
        return f"{share}, {duration(max(0.0, self._planned - self._done) * pace)} left"


def duration(seconds: float) -> str:
    """Write a duration, such as ``40 s``, ``12 min`` or ``1 h 05 min``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
