"""What a pipeline boundary has to send: the over-width state, or the outputs from which it can be rebuilt.

The state after ``l`` sublayers is a function of the embedding and of the outputs ``Z_1 … Z_l`` (eq. 17): the carries
and their coefficients follow from the state before. So a stage that makes ``H'_0`` from the token ids can rebuild the
state from ``l`` vectors of width ``D``, and from nothing less: a ``D``-wide read of it says nothing of the other
``(r - 1) D`` numbers. Sending the state takes ``r D``. Outputs win where ``l < r``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Boundary:
    """One boundary between stages: what can be sent per token and direction, in units of ``D``.

    Backwards the same holds: the gradient of the state takes ``r D``, those of the outputs ``l D``.
    """

    sublayers: int
    """In front of it, ``l``."""
    state: float
    """``r``: the state itself. Nothing is computed twice."""
    outputs: float
    """``l``: all outputs so far; the next stage embeds again (it needs the table) and repeats ``l`` carries."""
    since_last: float
    """``r`` + the sublayers of the stage before: its first state and its outputs. More than the state alone, always."""

    @property
    def least(self) -> float:
        """``min(r, l)``: no fewer numbers say what the state is."""
        return min(self.state, self.outputs)

    @property
    def best(self) -> str:
        """``"state"`` or ``"outputs"``; the state where they tie."""
        return "outputs" if self.outputs < self.state else "state"


def boundary(ratio: float, sublayers: int, of_last_stage: int) -> Boundary:
    """The boundary behind ``sublayers`` sublayers, ``of_last_stage`` of which are in the stage that it ends."""
    return Boundary(sublayers, ratio, sublayers, ratio + of_last_stage)
