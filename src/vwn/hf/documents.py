"""Packed rows: where in a row one document ends and the next begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def number_documents(
    shape: Sequence[int], attention_mask: Any = None, position_ids: Tensor | None = None, **packing: Any
) -> Tensor | None:
    """Number the documents of packed rows, by what the attention goes by.

    Args:
        shape: ``(B, S)`` of the ids.
        attention_mask: a mask ``[B, 1, S, S]``, or a dict of them, that keeps documents apart.
        position_ids: ``[1 or B, S]``. A position that does not rise begins a document; without a mask so does one that
            is not the one before plus one, as in transformers.
        packing: what transformers' ``DataCollatorWithFlattening`` gives besides: ``seq_idx`` ``[B, S]`` and
            ``cu_seq_lens_q`` ``[documents + 1]``, boundaries in the row after row of the batch.

    Returns:
        ``[B, S]``, rising by one where a document begins, or None where nothing says so.
    """
    starts = []
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask.get("full_attention")
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 4 and shape[1] == attention_mask.shape[-1]:
        before = attention_mask[:, 0].diagonal(-1, dim1=-2, dim2=-1)  # what a token sees of the one before
        floating = attention_mask.is_floating_point()
        starts.append(before <= torch.finfo(before.dtype).min / 2 if floating else ~before.bool())
    if position_ids is not None and position_ids.ndim == 2 and position_ids.shape[-1] == shape[1]:
        steps = position_ids.diff(dim=-1)
        starts.append(steps != 1 if attention_mask is None else steps < 1)
    if (index := packing.get("seq_idx")) is not None:
        starts.append(index.diff(dim=-1) != 0)
    if (bounds := packing.get("cu_seq_lens_q")) is not None:
        starts.append(torch.isin(torch.arange(shape[0] * shape[1], device=bounds.device), bounds).view(shape)[:, 1:])
    if not starts:
        return None
    first = starts[0].new_zeros(shape[0], 1)
    together = torch.stack([start.to(first.device).expand(shape[0], -1) for start in starts]).any(0)
    return torch.cat([first, together], dim=1).cumsum(-1)


def within_documents(targets: Tensor, ahead: int, documents: Tensor | None) -> Tensor:
    """Ignore (-100) the targets ``[B, S]`` that are ``ahead`` tokens from their position, in another document."""
    if documents is None:
        return targets
    return targets.masked_fill(torch.nn.functional.pad(documents[:, ahead:], (0, ahead), value=-1) != documents, -100)
