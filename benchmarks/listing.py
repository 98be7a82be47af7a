"""The connection as the paper's listing computes it, in our words: every mixed row is materialised.

Shapes: ``T`` tokens, ``n`` slots, ``m`` segments, ``d = D / m``; ``w`` are dynamic ``RoutingWeights``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def width_connection(state: Tensor, w: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``[T, D']`` to the sublayer's input ``[T, D]``, the carried rows ``[T, n, d]`` and ``Bᵀ`` ``[T, n, m]``."""
    h = state.unflatten(-1, (w.n, -1))
    d = h.shape[-1]
    normed = F.rms_norm(h, (d,), w.slot_norm, w.eps)
    alpha = torch.tanh(normed @ w.dynamic_alpha / d**0.5) * w.scale_alpha + w.bias_alpha  # eq. 13
    beta = torch.tanh(normed @ w.dynamic_beta / d**0.5) * w.scale_beta.mT + w.bias_beta.mT  # eq. 14
    mixed = alpha.mT @ h
    return mixed[..., : w.m, :].flatten(-2), mixed[..., w.m :, :], beta


def depth_connection(carried: Tensor, beta: Tensor, z: Tensor) -> Tensor:
    """The new state ``Bᵀ Z + Âᵀ H'`` (eq. 10), ``[T, D']``."""
    return (carried + beta @ z.unflatten(-1, (beta.shape[-1], -1))).flatten(-2)


def read_and_write(state: Tensor, z: Tensor, w: Any) -> tuple[Tensor, Tensor]:
    """Both connections of one sublayer whose output is ``z``: the new state, and what it had read."""
    x, carried, beta = width_connection(state, w)
    return depth_connection(carried, beta, z), x
