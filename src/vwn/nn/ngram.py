"""Hashed n-gram embeddings, added to the rows of an embedding table (Over-Tokenized Transformer, arXiv 2501.16975)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vwn.nn.initialisation import StatesItsInitialValues

NO_TOKEN = -1
"""Id where there is no token: before the start of a sequence and at its padding."""

# of SplitMix64, as signed numbers
_INCREMENT = 0x9E3779B97F4A7C15 - (1 << 64)
_FACTORS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


class NgramEmbedding(StatesItsInitialValues):
    """Sum, over the orders ``k = 2..K``, of the table row that the last ``k`` token ids hash to.

    The tables of all orders are one parameter, ``(K-1) buckets x width``, so that looking up is one operation. They
    start at zero: the model then starts exactly as without them, whatever the scale of the table they add to, and a
    zero row has a gradient like any other.

    Args:
        order: ``K``, 2 or more.
        buckets: rows of each order's table.
        width: of a row.
    """

    def __init__(self, order: int, buckets: int, width: int) -> None:
        super().__init__()
        self.order, self.buckets = order, buckets
        self.weight = nn.Parameter(torch.empty((order - 1) * buckets, width))
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        """All rows start at zero."""
        return {"weight": torch.zeros(self.weight.shape)}

    def forward(
        self,
        input_ids: Tensor,
        preceding_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Map ``[..., S]`` ids to ``[..., S, width]``; see :func:`with_context` and :func:`hash_ngrams`."""
        ids = with_context(input_ids, self.order, preceding_ids, attention_mask)
        first_rows = torch.arange(self.order - 1, device=ids.device) * self.buckets
        rows = F.embedding(hash_ngrams(ids, self.order, self.buckets, documents) + first_rows, self.weight)
        return rows.sum(-2).to(self.weight.dtype)  # autocast sums in float32


def with_context(
    input_ids: Tensor, order: int, preceding_ids: Tensor | None = None, attention_mask: Tensor | None = None
) -> Tensor:
    """Put the ``order - 1`` ids before ``[..., S]`` ids, :data:`NO_TOKEN` where there is none: ``[..., K-1+S]``.

    Args:
        preceding_ids: the last ``K-1`` ids before ``input_ids``, ``[..., K-1]``; without them a sequence starts.
        attention_mask: 0 at padding, 1 elsewhere, ``[..., T]``; its last column belongs to the last id, and what it
            does not reach is no padding.
    """
    shape = (*input_ids.shape[:-1], order - 1)
    if preceding_ids is None:
        preceding_ids = input_ids.new_full(shape, NO_TOKEN)
    elif preceding_ids.shape != shape:
        raise ValueError(
            f"preceding_ids must be the last {order - 1} ids before input_ids, of shape {shape} with {NO_TOKEN} where "
            f"there is none; got {tuple(preceding_ids.shape)}"
        )
    ids = torch.cat([preceding_ids, input_ids], dim=-1)
    if attention_mask is None:
        return ids
    mask = attention_mask[..., -ids.shape[-1] :]
    mask = F.pad(mask.to(torch.bool), (ids.shape[-1] - mask.shape[-1], 0), value=True)
    return ids.masked_fill(~mask, NO_TOKEN)


def hash_ngrams(ids: Tensor, order: int, buckets: int, documents: Tensor | None = None) -> Tensor:
    """Compute the bucket of the n-gram of each order ``2..K`` that ends at a position.

    64-bit integers throughout, so the same on every device and in every batch. A trained table depends on these
    numbers: they are part of a checkpoint's meaning.

    Args:
        ids: ``[..., K-1+S]``, see :func:`with_context`.
        order: ``K``.
        buckets: of each order.
        documents: numbers of the documents that the ids belong to in packed rows, ``[..., S]``: no n-gram reaches into
            another one. The ids before them belong to the first.

    Returns:
        ``[..., S, K-1]``, column ``k - 2`` for order ``k``, within 0 and ``buckets - 1``.
    """
    length = ids.shape[-1] - (order - 1)
    ids = ids.long()
    state = _mix(ids[..., order - 1 :])
    if documents is not None:
        documents = torch.cat([documents[..., :1].expand(*documents.shape[:-1], order - 1), documents], dim=-1)
    columns = []
    for back in range(1, order):
        start = order - 1 - back
        earlier = ids[..., start : start + length]
        if documents is not None:
            elsewhere = documents[..., start : start + length] != documents[..., order - 1 :]
            earlier = earlier.masked_fill(elsewhere, NO_TOKEN)
        state = _mix(state ^ earlier)
        columns.append((state & (2**63 - 1)) % buckets)
    return torch.stack(columns, dim=-1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's output function after one step: a bijection of 64-bit numbers that changes about half the bits."""
    x = x + _INCREMENT
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        x = (x ^ _shift_right(x, shift)) * factor
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch's shift copies the sign
