"""The cross-entropy of a head, with or without its logits in memory.

A head's logits are ``V / D`` times as wide as its input, and every MTP module adds a head: on a GPU they dwarf what the
connections save. Liger-Kernel computes the loss in pieces and never holds them all.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache

import torch
from torch import Tensor, nn

from vwn.common.errors import UserError

LOSS_BACKENDS = ("auto", "torch", "liger")

_log = logging.getLogger("vwn.hf")


@torch.compiler.assume_constant_result
def choose_loss(name: str, device: torch.device) -> str:
    """``"liger"`` or ``"torch"``: what computes the training loss when ``name`` was asked for.

    ``"auto"`` is Liger-Kernel where it is installed and the model is on a GPU, and says once what it took.

    Raises:
        UserError: unknown, or Liger-Kernel asked for by name where it cannot run.
    """
    return _choose_loss(name, device.type)


@cache
def _choose_loss(name: str, device_type: str) -> str:
    if name not in LOSS_BACKENDS:
        raise UserError(f"loss backend must be one of {', '.join(LOSS_BACKENDS)}; got {name!r}")
    if name == "torch":
        return name
    reason = _liger_unavailable(device_type, interpreted=name == "liger")
    if reason is None:
        _log.info("training loss on %s: Liger-Kernel's fused linear cross-entropy", device_type)
        return "liger"
    if name == "liger":
        raise UserError(f"loss backend 'liger' cannot run here: {reason}; use 'auto' or 'torch'")
    _log.info("training loss on %s: torch, with all logits in memory (not Liger-Kernel: %s)", device_type, reason)
    return "torch"


def _liger_unavailable(device_type: str, interpreted: bool) -> str | None:
    if device_type != "cuda" and not (interpreted and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"it runs on a GPU, not on {device_type}"
    if importlib.util.find_spec("liger_kernel") is None:
        return "it is not installed (pip install 'vwn[liger]')"
    return None


def fused_cross_entropy(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """Sum of the cross-entropies of ``head(hidden)``, by Liger-Kernel.

    Args:
        hidden: ``[B, S, D]``.
        head: the unembedding, ``D -> V``, without a bias.
        targets: ids ``[B, S]``, -100 where there is none.

    Returns:
        a scalar.
    """
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(
        hidden.flatten(0, 1), head.weight, targets.flatten(), reduction="sum", accum_dtype=torch.float32
    )
