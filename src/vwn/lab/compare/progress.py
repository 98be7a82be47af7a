"""How far a whole comparison is, and when it will be done."""

from __future__ import annotations

import time
from collections import defaultdict


class Progress:
    """Work done and to come over all runs of a comparison, sweeps included.

    Work is counted in optimiser steps times the arm's FLOPs per token; how long that takes is learnt from each arm's
    own steps, and for an arm not run yet from the others'.

    Args:
        flops: FLOPs per token of each arm, by name; of unknown ones any equal number.
    """

    def __init__(self, flops: dict[str, float]) -> None:
        self._flops = flops
        self._planned: dict[str, int] = defaultdict(int)
        self._done: dict[str, int] = defaultdict(int)
        self._timed: dict[str, tuple[int, float]] = {}
        self._running: tuple[str, float, int] | None = None

    def plan(self, arm: str, steps: int) -> None:
        """More steps of an arm are to come."""
        self._planned[arm] += steps

    def skip(self, arm: str, steps: int) -> None:
        """So many of its steps had been taken before."""
        self._done[arm] += steps

    def start(self, arm: str) -> None:
        """A run of this arm begins."""
        self._running = arm, time.monotonic(), 0

    def advance(self, steps: int) -> None:
        """So many steps of the present run were taken in this process."""
        assert self._running is not None
        self._running = *self._running[:2], steps

    def finish(self, steps: int) -> None:
        """The present run, of ``steps`` in all, is over."""
        assert self._running is not None
        arm = self._running[0]
        self._timed = self._timings()
        self._done[arm] += steps
        self._running = None

    @property
    def fraction(self) -> float:
        """Share of the work that is done."""
        total = sum(steps * self._flops[arm] for arm, steps in self._planned.items())
        done = sum(steps * self._flops[arm] for arm, steps in self._steps_done().items())
        return min(1.0, done / total) if total else 1.0

    @property
    def seconds_left(self) -> float | None:
        """Until everything is done, or None before there is anything to learn from."""
        timings = self._timings()
        work = sum(steps * self._flops[arm] for arm, (steps, _) in timings.items())
        if work <= 0:
            return None
        per_flop = sum(seconds for _, seconds in timings.values()) / work
        left, done = 0.0, self._steps_done()
        for arm, planned in self._planned.items():
            steps, seconds = timings.get(arm, (0, 0.0))
            per_step = seconds / steps if steps else per_flop * self._flops[arm]
            left += max(0, planned - done.get(arm, 0)) * per_step
        return left

    def text(self) -> str:
        """Such as ``31 %, 1 h 12 min left``."""
        left = self.seconds_left
        return f"{self.fraction:.0%}" if left is None else f"{self.fraction:.0%}, {duration(left)} left"

    def _steps_done(self) -> dict[str, int]:
        done = dict(self._done)
        if self._running:
            arm, _, steps = self._running
            done[arm] = done.get(arm, 0) + steps
        return done

    def _timings(self) -> dict[str, tuple[int, float]]:
        timings = dict(self._timed)
        if self._running and self._running[2]:
            arm, since, steps = self._running
            known = timings.get(arm, (0, 0.0))
            timings[arm] = known[0] + steps, known[1] + time.monotonic() - since
        return timings


def duration(seconds: float) -> str:
    """Such as ``40 s``, ``12 min`` or ``1 h 05 min``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
