"""The weights that the ops take: the parameters of a connection, and of the sublayer's own norm.

Shapes: ``n`` slots, ``m`` segments, ``d = D / m`` segment width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from vwn.common.errors import UserError


class ReadWeights(NamedTuple):
    """The weights that the read ``Å`` of one connection depends on; the dynamic ones are all there or all ``None``."""

    bias_alpha: Tensor
    """``A = [Å | Â]``, ``n x (m + n)``; a read uses the first ``m`` columns, here and below."""
    dynamic_alpha: Tensor | None = None
    """``W_α``, ``d x (m + n)``."""
    scale_alpha: Tensor | None = None
    """``S_α``, ``n x (m + n)``."""
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
        return self.bias_alpha.shape[1] - self.bias_alpha.shape[0]

    @property
    def dynamic(self) -> bool:
        """True if the routing depends on the token."""
        return self.dynamic_alpha is not None


class RoutingWeights(NamedTuple):
    """All parameters of one connection (eqs. 12-16); the dynamic ones are all there or all ``None``."""

    bias_alpha: Tensor
    """``A = [Å | Â]``, ``n x (m + n)``; a write uses the last ``n`` columns, here and below."""
    bias_beta: Tensor
    """``B``, ``m x n``."""
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
        return self.bias_beta.shape[1]

    @property
    def m(self) -> int:
        """Fraction rate."""
        return self.bias_beta.shape[0]

    @property
    def dynamic(self) -> bool:
        """True if the routing depends on the token."""
        return self.dynamic_alpha is not None

    @property
    def to_read(self) -> ReadWeights:
        """The weights that a read depends on."""
        return ReadWeights(self.bias_alpha, self.dynamic_alpha, self.scale_alpha, self.slot_norm, self.eps)


class NormWeights(NamedTuple):
    """A sublayer's own RMSNorm, as in Llama: ``round(x / rms(x)) * weight``."""

    weight: Tensor
    """``D``, in the state's dtype."""
    eps: float = 1e-6


Weights = TypeVar("Weights", ReadWeights, RoutingWeights)


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

    def map(self, f: Callable[[Tensor], Tensor]) -> Columns:
        """``f`` of every tensor that is there."""
        of = [None if t is None else f(t) for t in (self.dynamic, self.scale, self.gain)]
        return Columns(f(self.static), of[0], of[1], of[2], self.eps)


def read_columns(w: ReadWeights, dtype: torch.dtype) -> Columns:
    """The ``m`` columns of ``Å``."""
    dynamic, scale = (None if t is None else t[:, : w.m] for t in (w.dynamic_alpha, w.scale_alpha))
    return Columns(w.bias_alpha[:, : w.m], dynamic, scale, w.slot_norm, w.eps).map(lambda t: t.to(dtype))


def write_columns(w: RoutingWeights, dtype: torch.dtype) -> Columns:
    """The ``n`` columns of ``Â``, then the ``m`` of ``Bᵀ``."""
    static = torch.cat([w.bias_alpha[:, w.m :], w.bias_beta.mT], dim=1).to(dtype)
    if w.dynamic_alpha is None or w.dynamic_beta is None or w.scale_alpha is None or w.scale_beta is None:
        return Columns(static, None, None, None, w.eps)
    dynamic = torch.cat([w.dynamic_alpha[:, w.m :], w.dynamic_beta], dim=1).to(dtype)
    scale = torch.cat([w.scale_alpha[:, w.m :], w.scale_beta.mT], dim=1).to(dtype)
    return Columns(static, dynamic, scale, w.slot_norm.to(dtype), w.eps)  # type: ignore[union-attr]


def read_gradients(g: Columns, n: int) -> list[Tensor]:
    """Lay out gradients of the columns ``Å`` like :class:`ReadWeights`; zero where a read does not look."""
    wide = [None if t is None else F.pad(t, (0, n)) for t in (g.static, g.dynamic, g.scale)]
    return [t for t in (*wide, g.gain) if t is not None]


def write_gradients(g: Columns, m: int) -> list[Tensor]:
    """Lay out gradients of ``[Â | Bᵀ]`` like :class:`RoutingWeights`; zero where a write does not look."""
    alpha = [None if t is None else F.pad(t[:, :-m], (m, 0)) for t in (g.static, g.dynamic, g.scale)]
    bias_beta, dynamic_beta, scale_beta = (None if t is None else t[:, -m:] for t in (g.static, g.dynamic, g.scale))
    beta = [None if t is None else t.mT.contiguous() for t in (bias_beta, scale_beta)]
    dynamic_beta = None if dynamic_beta is None else dynamic_beta.contiguous()
    return [t for t in (alpha[0], beta[0], alpha[1], dynamic_beta, alpha[2], beta[1], g.gain) if t is not None]


def state_dtype(state: Tensor) -> torch.dtype:
    """The dtype that an over-width state is kept in: autocast's where that is on, else its own; float64 stays."""
    device = state.device.type
    if device == "meta" or state.dtype is torch.float64 or not torch.is_autocast_enabled(device):
        return state.dtype
    return torch.get_autocast_dtype(device)


def check_shapes(
    state: Tensor, z: Tensor | None, weights: ReadWeights | RoutingWeights, norm: NormWeights | None = None
) -> None:
    """Refuse what the kernels would read past the end of.

    Raises:
        UserError: shapes or devices that do not fit each other, or forward-mode differentiation, which no op has.
    """
    n, m = weights.n, weights.m
    width = state.shape[-1] if state.ndim else 0
    d = weights.dynamic_alpha.shape[0] if weights.dynamic_alpha is not None else width // n
    if width != n * d or not state.is_floating_point():
        wanted = f"{n * d}" if weights.dynamic else f"a multiple of n = {n}"
        raise UserError(f"the over-width state must be D' = n d = {wanted} wide and floating point, got {_of(state)}")
    if z is not None and z.shape != (*state.shape[:-1], m * d):
        raise UserError(f"the sublayer's output must be {(*state.shape[:-1], m * d)} beside {_of(state)}, got {_of(z)}")
    check_weights(weights, state)
    if norm is not None and norm.weight.shape != (m * d,):
        raise UserError(f"the norm's weight must be {(m * d,)}, got {_of(norm.weight)}")
    _check_devices(state, z, norm and norm.weight)
    if not torch.compiler.is_compiling() and getattr(forward_ad, "_current_level", -1) >= 0:
        raise UserError("the connections have no forward-mode derivative (jvp, dual numbers); use reverse mode")


def check_weights(weights: ReadWeights | RoutingWeights, state: Tensor) -> None:
    """Raise a ``UserError`` for weights that do not fit each other or are elsewhere than the state."""
    n, m = weights.n, weights.m
    d = state.shape[-1] // n
    alpha, beta = (n, m + n), (m, n)
    wanted: Any = (alpha, (d, m + n), alpha, (d,))
    if isinstance(weights, RoutingWeights):
        wanted = (alpha, beta, (d, m + n), (d, m), alpha, beta, (d,))
    for weight, shape, name in zip(weights, wanted, weights._fields, strict=False):
        if isinstance(weight, Tensor) and weight.shape != shape:
            raise UserError(f"{name} must be {shape}, got {_of(weight)}")
    _check_devices(state, *weights[:-1])


def _check_devices(state: Tensor, *others: Tensor | None) -> None:
    for t in others:
        if t is not None and t.device != state.device:
            raise UserError(f"the state is on {state.device}, what goes with it on {t.device}; move one to the other")


def _of(t: Tensor) -> str:
    return f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}"
