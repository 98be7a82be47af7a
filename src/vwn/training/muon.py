"""Muon for the backbone's matrices and AdamW for everything else, as one optimiser that a Trainer can use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import AdamW, Muon, Optimizer


class MuonWithAdamW(Optimizer):
    """Muon and AdamW with one state and one list of groups, Muon's first, as :func:`vwn.parameter_groups` makes."""

    def __init__(self, muon: list[dict[str, Any]], adamw: list[dict[str, Any]], betas: tuple[float, float]) -> None:
        self.parts: tuple[Optimizer, ...] = (
            Muon(muon, adjust_lr_fn="match_rms_adamw"),
            AdamW(adamw, betas=betas),
        )
        self.matrices = len(muon)
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step both; what was loaded or scheduled stands in this optimiser's groups and state."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups[: self.matrices], self.param_groups[self.matrices :]
        for part, own in zip(self.parts, groups, strict=True):
            part.param_groups, part.state = own, self.state
            part.step()
        return loss
