"""The cross-entropy of a head, with or without its logits in memory.

A head's logits are ``V / D`` times as wide as its input, and every MTP module adds a head: on a GPU they dwarf what the
connections save, and on a CPU they do not fit the caches. Liger-Kernel and PyTorch's ``linear_cross_entropy`` compute
the loss in pieces and keep none for the backward.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vwn.common.errors import UserError
from vwn.hf.documents import within_documents

LOSS_BACKENDS = ("auto", "torch", "chunked", "liger")
CAN_CHUNK = hasattr(F, "linear_cross_entropy")  # from PyTorch 2.13 on
CHUNK = 2**20  # logits at once in the chunked loss, but of at least 64 tokens: 4 MiB in float32 fit a CPU's caches

_log = logging.getLogger("vwn.hf")


@torch.compiler.assume_constant_result
def choose_loss(name: str, device: torch.device) -> str:
    """Choose what computes the training loss when ``name`` was asked for, and say so once: ``"auto"`` is ``"liger"``
    where Liger-Kernel is installed and the model is on a GPU, else ``"torch"``."""
    return _choose_loss(name, device.type)


@cache
def _choose_loss(name: str, device_type: str) -> str:
    if name not in LOSS_BACKENDS:
        raise UserError(f"loss backend must be one of {', '.join(LOSS_BACKENDS)}; got {name!r}")
    if name == "chunked" and not CAN_CHUNK:
        raise UserError(f"loss backend 'chunked' needs PyTorch 2.13 or newer, not {torch.__version__}; use 'torch'")
    if name == "chunked":
        _log.info("training loss on %s: PyTorch's linear_cross_entropy, a piece of the tokens at a time", device_type)
    if name in ("torch", "chunked"):
        return name
    reason = None
    if device_type != "cuda" and not (name == "liger" and os.environ.get("TRITON_INTERPRET") == "1"):
        reason = f"it runs on a GPU, not on {device_type}"
    elif importlib.util.find_spec("liger_kernel") is None:
        reason = "it is not installed (pip install '.[liger]')"
    if reason is None:
        _log.info("training loss on %s: Liger-Kernel's fused linear cross-entropy", device_type)
        return "liger"
    if name == "liger":
        raise UserError(f"loss backend 'liger' cannot run here: {reason}; use 'auto' or 'torch'")
    _log.info("training loss on %s: torch, with all logits in memory (not Liger-Kernel: %s)", device_type, reason)
    return "torch"


def fused_cross_entropy(backend: str, hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """Sum the cross-entropies of ``head(hidden)`` ``[B, S, D]`` with targets ``[B, S]``, -100 where there is none;
    ``"chunked"`` computes in float32 (float64 for such hidden states), also under autocast."""
    rows, weight, targets = hidden.flatten(0, 1), head.weight, targets.flatten()
    if backend == "liger":
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return liger_fused_linear_cross_entropy(rows, weight, targets, reduction="sum", accum_dtype=torch.float32)
    dtype, size = torch.promote_types(rows.dtype, torch.float32), max(64, CHUNK // len(weight))
    options = nn.LinearCrossEntropyOptions(True, batch_chunk_size=size, chunking_method=None)
    with torch.autocast(rows.device.type, enabled=False):
        return F.linear_cross_entropy(rows.to(dtype), weight.to(dtype), targets, reduction="sum", options=options)


def targets_of_heads(
    heads: int, labels: Tensor, shift_labels: Tensor | None = None, documents: Tensor | None = None
) -> list[Tensor]:
    """Shift the labels for the next token and for each MTP module, which is one token further than the one before.

    Args:
        heads: how many.
        labels: ids ``[B, S]``, -100 where there is no target.
        shift_labels: the next token's targets, ``[B, S]``, instead of those that follow from ``labels``.
        documents: numbers of the documents in packed rows, ``[B, S]``. A module has no target in another one; for the
            next token the labels decide, as in transformers.

    Returns:
        targets ``[B, S]`` for each head.
    """
    targets = [F.pad(labels, (0, 1), value=-100)[:, 1:] if shift_labels is None else shift_labels]
    for k in range(1, heads):
        targets.append(within_documents(F.pad(targets[0], (0, k), value=-100)[:, k:], k + 1, documents))
    return [t.contiguous() for t in targets]


def denominator(k: int, counts: list[Tensor], num_items_in_batch: Tensor | int | None) -> Any:
    """Find what head ``k``'s summed loss is divided by: its own targets, of all accumulated batches.

    Args:
        k: 0 for the next token.
        counts: targets of each head in this batch.
        num_items_in_batch: None without accumulation; ``[heads]``; or a scalar, the next token's targets. The heads'
            share of these is then taken to be that of this batch.
    """
    if num_items_in_batch is None:
        return counts[k].clamp(min=1)
    if isinstance(num_items_in_batch, Tensor) and num_items_in_batch.shape == (len(counts),):
        return num_items_in_batch[k].clamp(min=1)
    return num_items_in_batch if k == 0 else num_items_in_batch * counts[k].clamp(min=1) / counts[0].clamp(min=1)
