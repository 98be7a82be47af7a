"""The reference: what the ops mean, in plain PyTorch, for any dtype and any ``(m, n)``.

Shapes: ``T`` tokens, ``n`` slots, ``m`` segments, ``d = D / m``, ``D' = n d``. ``forward`` and ``backward`` compute
the write of one sublayer followed by the read of the next; either may be missing. Every backend is a module with both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vwn.ops.weights import Columns, Inputs, NormWeights, columns_of, gradients_of


def unavailable(device: torch.device, dtype: torch.dtype, slots: int = 1) -> str | None:
    """Return the reason why it cannot run there, or ``None``; the reference runs everywhere."""
    return None


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """Compute ``1 / sqrt(mean(x²) + eps)`` over the last dimension, ``[..., d] -> [..., 1]``, as every RMSNorm does."""
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def coefficients(slots: Tensor, columns: Columns) -> Tensor:
    """Compute columns of the routing matrices (eqs. 12-14): ``[..., n, k]``, or ``[n, k]`` where the routing is static.

    Args:
        slots: ``[..., n, d]``, float32 or float64.
        columns: the parameters of ``k`` columns, in the same dtype.
    """
    static, dynamic, scale, gain, eps = columns
    if dynamic is None or scale is None or gain is None:
        return static
    tau = slots.shape[-1] ** 0.5
    normed = slots * inverse_rms(slots, eps) * gain  # H̄ = RMSNorm(H') (eq. 12)
    return torch.addcmul(static, scale, torch.tanh(normed @ (dynamic / tau)))  # S ∘ tanh(H̄ W / τ) + A (eqs. 13-14)


def read_slots(slots: Tensor, read: Tensor) -> Tensor:
    """Compute ``X = Åᵀ H'`` (first line of eq. 10): ``[..., n, d]`` and ``[..., n, m]`` to ``[..., D]``."""
    return (read.mT @ slots).flatten(-2)  # X = Åᵀ H' (eq. 10)


def write_slots(slots: Tensor, segments: Tensor, carry: Tensor | None, beta: Tensor) -> Tensor:
    """Compute ``H' <- Bᵀ Z + Âᵀ H'`` (second line of eq. 10), ``[..., D']``.

    Shapes: ``H'`` ``[..., n, d]``, ``Z`` ``[..., m, d]``, ``Â`` ``[..., n, n]``, ``None`` for the identity, ``B``
    ``[..., m, n]``.
    """
    carried = slots if carry is None else carry.mT @ slots
    return (beta.mT @ segments + carried).flatten(-2)  # H' <- Bᵀ Z + Âᵀ H' (eq. 10)


def forward(inputs: Inputs) -> tuple[Tensor | None, Tensor | None]:
    """Compute the new state ``Bᵀ Z + Âᵀ H'``, and what is read from it, ``X = Åᵀ H'`` (eq. 10).

    Returns:
        the new state ``[..., D']``, ``None`` without a write, and ``X`` ``[..., D]``, ``None`` without a read; both in
        the state's dtype, computed in float32 (float64 for a float64 state).
    """
    state, z, write, read, norm = inputs
    dtype = torch.promote_types(state.dtype, torch.float32)
    with torch.autocast(state.device.type, enabled=False):
        new = x = None
        if write is not None and z is not None:
            slots = state.unflatten(-1, (write.n, -1)).to(dtype)
            segments = z.unflatten(-1, (write.m, -1)).to(dtype)
            carry, beta = coefficients(slots, columns_of(write, dtype)).split([write.carry_columns, write.m], dim=-1)
            new = write_slots(slots, segments, carry if write.carry_columns else None, beta.mT).to(state.dtype)
        if read is not None:
            slots = (state if new is None else new).unflatten(-1, (read.n, -1)).to(dtype)
            x = read_slots(slots, coefficients(slots, columns_of(read, dtype))).to(state.dtype)
            x = x if norm is None else rms_norm(x, norm)
    return new, x


def rms_norm(x: Tensor, norm: NormWeights) -> Tensor:
    """Apply RMSNorm over the last dimension in float32, rounded to the dtype of ``x`` before the gain."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return norm.weight * (wide * inverse_rms(wide, norm.eps)).to(x.dtype)


def backward(grad_new: Tensor | None, grad_x: Tensor | None, inputs: Inputs, needs_weights: bool) -> list[Tensor]:
    """Compute gradients of :func:`forward` from its inputs alone; it computes the routing again, so none is saved.

    Args:
        grad_new: of the new state, ``[..., D']``; ``None`` counts as zero.
        grad_x: of ``X``, ``[..., D]``.

    Returns:
        of the state; of ``z`` if there is a write; and if ``needs_weights`` of the tensors of ``write``, of ``read``
        and of the norm, each in the order of their fields.
    """
    state, z, write, read, norm = inputs
    dtype = torch.promote_types(state.dtype, torch.float32)
    new, x = forward(inputs._replace(norm=None))
    grad_write: list[Tensor] = []
    grad_read: list[Tensor] = []
    grad_norm: list[Tensor] = []
    if read is not None and x is not None and grad_x is not None:
        if norm is not None:
            grad_x, grad_norm = rms_norm_backward(grad_x, x, norm)
        slots = (state if new is None else new).unflatten(-1, (read.n, -1)).to(dtype)
        g = grad_x.unflatten(-1, (read.m, -1)).to(dtype)
        columns = columns_of(read, dtype)
        through, gradients = coefficients_backward(slots @ g.mT, slots, columns)
        through = (coefficients(slots, columns) @ g + through).flatten(-2).to(state.dtype)
        grad_new = through if grad_new is None else grad_new + through
        grad_read = gradients_of(gradients, read)
    assert grad_new is not None
    result = [grad_new]
    if write is not None and z is not None:
        slots = state.unflatten(-1, (write.n, -1)).to(dtype)
        segments = z.unflatten(-1, (write.m, -1)).to(dtype)
        g = grad_new.unflatten(-1, (write.n, -1)).to(dtype)
        columns = columns_of(write, dtype)
        carry, beta = coefficients(slots, columns).split([write.carry_columns, write.m], dim=-1)
        grad_columns, carried = g @ segments.mT, g
        if write.carry_columns:
            grad_columns, carried = torch.cat([slots @ g.mT, grad_columns], dim=-1), carry @ g
        through, gradients = coefficients_backward(grad_columns, slots, columns)
        result = [(carried + through).flatten(-2).to(state.dtype), (beta.mT @ g).flatten(-2).to(z.dtype)]
        grad_write = gradients_of(gradients, write)
    return [*result, *grad_write, *grad_read, *grad_norm] if needs_weights else result


def coefficients_backward(grad: Tensor, slots: Tensor, columns: Columns) -> tuple[Tensor, Columns]:
    """Compute gradients of :func:`coefficients`: of the slots, zero where the routing is static, and of the parameters.

    Args:
        grad: of the coefficients, ``[..., n, k]``.
        slots, columns: as given to :func:`coefficients`.
    """
    _, dynamic, scale, gain, eps = columns
    grad_static = grad.flatten(0, -3).sum(0)
    if dynamic is None or scale is None or gain is None:
        return torch.zeros_like(slots), Columns(grad_static, None, None, None, eps)
    tau = slots.shape[-1] ** 0.5
    rstd = inverse_rms(slots, eps)
    unit = slots * rstd
    tanh = torch.tanh((unit * gain) @ (dynamic / tau))
    grad_scale = (grad * tanh).flatten(0, -3).sum(0)
    grad_logits = grad * scale * (1 - tanh.square())
    grad_normed = grad_logits @ (dynamic.mT / tau)
    grad_unit = grad_normed * gain
    grad_slots = rstd * (grad_unit - unit * (unit * grad_unit).mean(-1, keepdim=True))
    grad_dynamic = (unit * gain).flatten(0, -2).mT @ grad_logits.flatten(0, -2) / tau
    return grad_slots, Columns(grad_static, grad_dynamic, grad_scale, (grad_normed * unit).flatten(0, -2).sum(0), eps)


def rms_norm_backward(grad: Tensor, x: Tensor, norm: NormWeights) -> tuple[Tensor, list[Tensor]]:
    """Compute gradients of :func:`rms_norm`: of ``x`` and, in a list, of the weight."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide, g = x.to(dtype), grad.to(dtype)
    rstd = inverse_rms(wide, norm.eps)
    grad_weight = (g * (wide * rstd).to(x.dtype)).flatten(0, -2).sum(0).to(norm.weight.dtype)
    g = g * norm.weight
    return (rstd * (g - wide * rstd.square() * (g * wide).mean(-1, keepdim=True))).to(x.dtype), [grad_weight]
