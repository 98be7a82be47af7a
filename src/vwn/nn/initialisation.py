"""How modules of virtual width start: each states its initial values, and one rule copies them in."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class StatesItsInitialValues(nn.Module):
    """A module whose own parameters start at :meth:`initial_values`, standalone and inside a Hugging Face model."""

    def initial_values(self) -> dict[str, Tensor]:
        """Initial value of each of this module's own parameters, by name."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every own parameter to its initial value."""
        for name, value in self.initial_values().items():
            getattr(self, name).copy_(value)
