"""Initialise modules of virtual width, and load weights by the names that they had in earlier checkpoints."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

_EARLIER = {
    "bias_alpha": "static_alpha",
    "bias_beta": "static_beta",
    "slot_norm": "norm_weight",
    "slot_norm_bias": "norm_bias",
    "group_norm": "norm_weight",
    "group_norm_bias": "norm_bias",
    "state_norm": "state_norm_weight",
    "embedding_norm": "embedding_norm_weight",
}
OLD_NAMES = {  # the same for the weights of a whole model, as patterns that apply in turn
    "static_alpha": "bias_alpha",
    "static_beta": "bias_beta",
    "state_norm_weight": "state_norm",
    "embedding_norm_weight": "embedding_norm",
    r"reduce\.norm_weight$": "reduce.group_norm",
    r"reduce\.norm_bias$": "reduce.group_norm_bias",
    r"\.norm_weight$": ".slot_norm",
    r"\.norm_bias$": ".slot_norm_bias",
}


def current_name(name: str) -> str:
    """Return the name that a weight of an earlier checkpoint has now."""
    for old, new in OLD_NAMES.items():
        name = re.sub(old, new, name)
    return name


class StatesItsInitialValues(nn.Module):
    """A module whose own parameters start at :meth:`initial_values`, standalone and inside a Hugging Face model."""

    def initial_values(self) -> dict[str, Tensor]:
        """Return the initial value of each of this module's own parameters, by name."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every own parameter to its initial value."""
        for name, value in self.initial_values().items():
            getattr(self, name).copy_(value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, own in (*self._parameters.items(), *self._buffers.items()):
            key, earlier = prefix + name, prefix + _EARLIER.get(name, name)
            if key not in state_dict and earlier in state_dict:
                state_dict[key] = state_dict.pop(earlier)
            if own is not None and own.shape == (1,) and key in state_dict and state_dict[key].ndim == 0:
                state_dict[key] = state_dict[key].reshape(1)  # scales had no dimension
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
