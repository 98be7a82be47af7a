"""How far a whole comparison is, and when it will be done."""

from __future__ import annotations

import time
from collections.abc import Mapping


class Progress:
    """Work done and to come over all runs of a comparison, sweeps included.

    Work is counted in optimiser steps times the arm's FLOPs per token. How long it takes is learnt from the steps that
    were taken in this process.

    Args:
        flops: FLOPs per token of each arm, by name; of unknown ones any equal number.
    """

    def __init__(self, flops: Mapping[str, float]) -> None:
        self._flops = flops
        self._planned = self._done = 0.0  # in all
        self._taken = self._seconds = 0.0  # in this process
        self._running: tuple[str, float, int] | None = None

    def plan(self, arm: str, steps: int) -> None:
        """More steps of an arm are to come."""
        self._planned += steps * self._flops[arm]

    def skip(self, arm: str, steps: int) -> None:
        """So many of its steps had been taken before."""
        self._done += steps * self._flops[arm]

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
        work, seconds = self._of_running()
        self._taken, self._seconds = self._taken + work, self._seconds + seconds
        self.skip(self._running[0], steps)
        self._running = None

    def text(self) -> str:
        """Such as ``31 %, 1 h 12 min left``; no time before there is anything to learn from."""
        work, seconds = self._of_running()
        done, taken, seconds = self._done + work, self._taken + work, self._seconds + seconds
        share = f"{min(1.0, done / self._planned):.0%}" if self._planned else "100%"
        if not taken:
            return share
        return f"{share}, {duration(max(0.0, self._planned - done) * seconds / taken)} left"

    def _of_running(self) -> tuple[float, float]:
        """Work and seconds of the present run so far."""
        if self._running is None or not self._running[2]:
            return 0.0, 0.0
        arm, since, steps = self._running
        return steps * self._flops[arm], time.monotonic() - since


def duration(seconds: float) -> str:
    """Such as ``40 s``, ``12 min`` or ``1 h 05 min``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
