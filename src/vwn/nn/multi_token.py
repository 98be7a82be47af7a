"""Multi-token prediction on the over-width state (section 3.4); DeepSeek-V3's module (arXiv 2412.19437) is the base."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vwn.nn.embedding import OverWidthReduce
from vwn.nn.geometry import Geometry
from vwn.nn.initialisation import StatesItsInitialValues
from vwn.ops.reference import inverse_rms


class BlockLinear(StatesItsInitialValues):
    """One small matrix applied to each of the ``n`` slots, shared by all: ``[..., n, d_in] -> [..., n, d_out]``.

    A dense ``2D' -> D'`` would cost ``r²`` times more; with ``n = 1`` this is that dense linear.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        """Normal with variance ``1 / d_in``: unit-variance slots stay unit-variance."""
        return {"weight": torch.randn(self.weight.shape) * self.weight.shape[1] ** -0.5}

    def forward(self, slots: Tensor) -> Tensor:
        """Map ``[..., n, d_in]`` to ``[..., n, d_out]``."""
        return F.linear(slots, self.weight)


class MultiTokenPredictor(StatesItsInitialValues):
    """Predicts one token further than the state it is given.

    The state at position ``t`` and the over-width embedding of the next known token are normalised per slot, fused by
    a :class:`BlockLinear` ``2d -> d``, passed through one more transformer layer (over-width in, over-width out), and
    reduced. Its own over-width output feeds the next predictor of a chain.

    Args:
        geometry: ``(D, m, n)``.
        layer: the extra transformer layer, ``[B, T, D'] -> [B, T, D']``.
        reduce: ``[B, T, D'] -> [B, T, D]``.
        norm: the final norm, ``[B, T, D] -> [B, T, D]``.
        eps: of the two slot norms.
    """

    def __init__(
        self, geometry: Geometry, layer: nn.Module, reduce: OverWidthReduce, norm: nn.Module, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.geometry, self.eps = geometry, eps
        self.state_norm = nn.Parameter(torch.empty(geometry.segment_size))
        self.embedding_norm = nn.Parameter(torch.empty(geometry.segment_size))
        self.fuse = BlockLinear(2 * geometry.segment_size, geometry.segment_size)
        self.layer, self.reduce, self.norm = layer, reduce, norm
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        """Gains one; everything else belongs to the submodules."""
        ones = torch.ones(self.geometry.segment_size)
        return {"state_norm": ones, "embedding_norm": ones}

    def forward(
        self, state: Tensor, embedding: Tensor, run: Callable[[nn.Module, Tensor], Tensor] = nn.Module.__call__
    ) -> tuple[Tensor, Tensor]:
        """Fuse, run the layer, reduce.

        Args:
            state: over-width state at positions ``t``, ``[B, T, D']``.
            embedding: over-width embedding of the token one step ahead of what ``state`` has seen, ``[B, T, D']``.
            run: how to call the layer, for layers that need more than their input.

        Returns:
            the hidden state for the unembedding, ``[B, T, D]``, and the over-width state for the next predictor.
        """
        state = run(self.layer, self._fused(state, embedding))
        return self.norm(self.reduce(state)), state

    def _fused(self, state: Tensor, embedding: Tensor) -> Tensor:
        pair = self._slot_norm(state, self.state_norm), self._slot_norm(embedding, self.embedding_norm)
        return self.fuse(torch.cat(pair, dim=-1)).flatten(-2).to(state.dtype)  # the stream's, also under autocast

    def _slot_norm(self, state: Tensor, gain: Tensor) -> Tensor:
        slots = state.unflatten(-1, (self.geometry.n, self.geometry.segment_size))
        slots = slots.to(torch.promote_types(state.dtype, torch.float32))
        slots = slots * inverse_rms(slots, self.eps)
        return slots.to(state.dtype) * gain
