"""The weights that the ops take: the parameters of a connection, and of the sublayer's own norm.

Shapes: ``n`` slots, ``m`` segments, ``d = D / m`` segment width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from vwn.common.errors import UserError


class RoutingWeights(NamedTuple):
    """All parameters of one connection (eqs. 12-16); the dynamic ones are all there or all ``None``."""

    bias_alpha: Tensor
    """``A = [Å | Â]``, ``n x (m + n)``: a read uses the first ``m`` columns, a write the last ``n``, here and below. No
    more columns than rows are ``Å`` alone, ``n x m``: the carry is the identity, and below are ``m`` columns too."""
    bias_beta: Tensor | None
    """``B``, ``m x n``; ``None``, as the others of ``B``, where the weights are for a read alone."""
    dynamic_alpha: Tensor | None = None
    """``W_α``, ``d x (m + n)``."""
    dynamic_beta: Tensor | None = None
    """``W_β``, ``d x m``."""
    scale_alpha: Tensor | None = None
    """``S_α``, ``n x (m + n)``."""
    scale_beta: Tensor | None = None
    """``S_β``, ``m x n``."""
    slot_norm: Tensor | None = None
    """Gain of the slot norm, ``d``."""
    eps: float = 1e-6
    """Added to the mean square in the slot norm."""

    @property
    def n(self) -> int:
        """Slots."""
        return self.bias_alpha.shape[0]

    @property
    def m(self) -> int:
        """Fraction rate."""
        return self.bias_alpha.shape[1] - self.carry_columns

    @property
    def carry_columns(self) -> int:
        """Columns of ``Â``: ``n``, or 0 where the carry is the identity."""
        n, columns = self.bias_alpha.shape
        return n if columns > n else 0

    @property
    def with_carry(self) -> RoutingWeights:
        """The same routing with the columns of an identity carry written out."""
        if self.carry_columns:
            return self
        bias = torch.cat([self.bias_alpha, torch.eye(self.n).to(self.bias_alpha)], dim=1)
        dynamic, scale = (None if t is None else F.pad(t, (0, self.n)) for t in (self.dynamic_alpha, self.scale_alpha))
        return self._replace(bias_alpha=bias, dynamic_alpha=dynamic, scale_alpha=scale)

    @property
    def dynamic(self) -> bool:
        """True if the routing depends on the token."""
        return self.dynamic_alpha is not None

    @property
    def to_read(self) -> RoutingWeights:
        """The weights that a read depends on."""
        return self._replace(bias_beta=None, dynamic_beta=None, scale_beta=None)


class NormWeights(NamedTuple):
    """A sublayer's own RMSNorm, as in Llama: ``round(x / rms(x)) * weight``."""

    weight: Tensor
    """``D``, in the state's dtype."""
    eps: float = 1e-6


class Inputs(NamedTuple):
    """The inputs of an op: the write of one sublayer followed by the read of the next; either may be missing."""

    state: Tensor
    """``[..., D']``."""
    z: Tensor | None = None
    """Output of the sublayer that writes, ``[..., D]``; ``None`` without a write."""
    write: RoutingWeights | None = None
    """Weights of the sublayer that writes; ``None``: the state stays."""
    read: RoutingWeights | None = None
    """Weights of the sublayer that reads; ``None`` without a read."""
    norm: NormWeights | None = None
    """The reading sublayer's RMSNorm, applied to what is read."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """``m``, ``n`` and ``d``."""
        weights = self.write if self.read is None else self.read
        assert weights is not None
        return weights.m, weights.n, self.state.shape[-1] // weights.n


class Columns(NamedTuple):
    """Columns of the routing side by side: every one of them is computed alike, row ``i`` from slot ``i`` alone."""

    static: Tensor
    """``n x k``."""
    dynamic: Tensor | None
    """``d x k``."""
    scale: Tensor | None
    """``n x k``."""
    gain: Tensor | None
    """``d``."""
    eps: float


def columns_of(w: RoutingWeights, dtype: torch.dtype) -> Columns:
    """Return the columns of ``Â``, if any, and the ``m`` of ``Bᵀ``; of weights for a read the ``m`` of ``Å``."""

    def beside(alpha: Tensor, beta: Tensor | None) -> Tensor:
        return (alpha[:, : w.m] if beta is None else torch.cat([alpha[:, w.m :], beta], dim=1)).to(dtype)

    def turned(beta: Tensor | None) -> Tensor | None:
        return None if beta is None else beta.mT

    static = beside(w.bias_alpha, turned(w.bias_beta))
    if w.dynamic_alpha is None or w.scale_alpha is None or w.slot_norm is None:
        return Columns(static, None, None, None, w.eps)
    dynamic, scale = beside(w.dynamic_alpha, w.dynamic_beta), beside(w.scale_alpha, turned(w.scale_beta))
    return Columns(static, dynamic, scale, w.slot_norm.to(dtype), w.eps)


def gradients_of(g: Columns, w: RoutingWeights) -> list[Tensor]:
    """Lay out gradients of :func:`columns_of` like the tensors of ``w``; zero where its columns do not look."""
    if w.bias_beta is None:
        return [
            *(F.pad(t, (0, w.carry_columns)) for t in g[:3] if isinstance(t, Tensor)),
            *([] if g.gain is None else [g.gain]),
        ]
    found = []
    for t, turns in ((g.static, True), (g.dynamic, False), (g.scale, True)):
        if t is not None:
            carry, beta = t.split([w.carry_columns, w.m], dim=1)
            found += [F.pad(carry, (w.m, 0)), (beta.mT if turns else beta).contiguous()]
    return [*found, *([] if g.gain is None else [g.gain])]


def state_dtype(state: Tensor) -> torch.dtype:
    """Return the dtype of an over-width state: autocast's where that is on, else its own; float64 stays."""
    device = state.device.type
    stays = device == "meta" or state.dtype is torch.float64 or not state.is_floating_point()
    return state.dtype if stays or not torch.is_autocast_enabled(device) else torch.get_autocast_dtype(device)


def check(inputs: Inputs, grad_new: Tensor | None = None, grad_x: Tensor | None = None) -> None:
    """Refuse what the kernels would read past the end of, or misread.

    Raises:
        UserError: shapes, dtypes or devices that do not fit each other, weights that are missing, or forward-mode
            differentiation, which no op has.
    """
    state, z, write, read, norm = inputs
    sides = [weights for weights in (write, read) if weights is not None]
    for w in sides:
        missing = [t is None for t in (w.bias_beta, w.dynamic_beta, w.scale_beta)]
        if missing != ([False, not w.dynamic, not w.dynamic] if w is write else [True] * 3):
            raise UserError("a write needs the weights of B, as dynamic as those of A; a read (to_read) has none")
        if not (w.dynamic_alpha is None) == (w.scale_alpha is None) == (w.slot_norm is None):
            raise UserError("dynamic routing needs dynamic_alpha, scale_alpha and slot_norm; static has none of them")
        if w.bias_alpha.ndim != 2 or w.m < 1 or w.n < 1:
            raise UserError(f"bias_alpha must be n x (m + n), or n x m with m <= n, got {_of(w.bias_alpha)}")
    first = sides[0]
    n, m = first.n, first.m
    width = state.shape[-1] if state.ndim else 0
    d = first.slot_norm.numel() if first.slot_norm is not None else width // n
    if width != n * d or not state.is_floating_point():
        wanted = f"{n * d}" if first.dynamic else f"a multiple of n = {n}"
        raise UserError(f"the over-width state must be D' = n d = {wanted} wide and floating point, got {_of(state)}")
    rows, dtype, device = state.shape[:-1], state.dtype, state.device
    beside: list[tuple[str, Tensor | None, tuple[int, ...], torch.dtype]] = [
        ("the sublayer's output", z, (*rows, m * d), dtype),
        ("the gradient of the state", grad_new, (*rows, n * d), dtype),
        ("the gradient of X", grad_x, (*rows, m * d), dtype),
        ("the norm's weight", norm and norm.weight, (m * d,), dtype),
    ]
    routing, beta = torch.promote_types(dtype, torch.float32), (m, n)
    for w in sides:
        alpha = (n, m + n if w.carry_columns else m)
        shapes = (alpha, beta, (d, alpha[1]), (d, m), alpha, beta, (d,))
        beside += zip(w._fields, w[:-1], shapes, [routing] * len(shapes), strict=False)
    for name, t, shape, kind in beside:
        if t is None:
            continue
        if t.shape != shape:
            raise UserError(f"{name} must be {shape} beside {_of(state)}, got {_of(t)}")
        if t.device != device:
            raise UserError(f"the state is on {device}, but {name} is on {t.device}; move one to the other")
        if t.dtype is not kind:
            raise UserError(f"{name} must be {kind} beside {_of(state)}, not {_of(t)}; call vwn.ops, which casts")
    if not torch.compiler.is_compiling() and getattr(forward_ad, "_current_level", -1) >= 0:
        raise UserError("the connections have no forward-mode derivative (jvp, dual numbers); use reverse mode")


def _of(t: Tensor) -> str:
    return f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}"
