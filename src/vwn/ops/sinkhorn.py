"""Sinkhorn's scaling of small matrices to row and column sums of one, many at a time.

The order and the place of ``eps`` are those of DeepSeek-V4's connections: a softmax over rows, then columns, and so on
in turn, columns last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vwn.common.errors import UserError

ROUNDS = 20
"""Rounds that mHC takes (arXiv 2512.24880)."""
EXACT_EPS = 1e-12
"""Small enough to vanish beside every coefficient that matters; the squares of sums stay in float32's range."""
CONVERGED = 4e-6
"""Row sums as near to one as this are exact: it is what rounding leaves of 64 float32 numbers."""


def sinkhorn(logits: Tensor, rounds: int = ROUNDS, eps: float = EXACT_EPS, exact: bool = False) -> Tensor:
    """Scale ``exp(logits)`` to row and column sums of one.

    Args:
        logits: ``[..., n, n]``, floating point.
        rounds: of row and column scaling, 1 or more.
        eps: added to the first row-scaled matrix and to every sum that divides.
        exact: finish with :func:`to_polytope`, since a fixed number of rounds does not converge for all logits.

    Returns:
        ``[..., n, n]``, float32 (float64 for float64 logits), not negative: columns sum to one, rows nearly; with
        ``exact`` both do, to rounding, for any logits.

    Raises:
        UserError: fewer ``rounds`` than 1.
    """
    if rounds < 1:
        raise UserError(f"rounds of Sinkhorn's scaling must be 1 or more, got {rounds}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    n = logits.shape[-1]
    # The matrices side by side, [n, n, count], so that a sum over a row or a column adds long vectors.
    p = (torch.softmax(logits, dim=-1) + eps).reshape(-1, n, n).permute(1, 2, 0).contiguous()
    p = _Scaling.apply(p, rounds, eps)
    return (to_polytope(p) if exact else p).permute(2, 0, 1).reshape(logits.shape)


def _factors(p: Tensor, rounds: int, eps: float) -> tuple[list[Tensor], list[Tensor]]:
    """Compute the factors ``[n, count]`` that scale rows and columns after each round.

    A round divides a row by its sum plus ``eps``. With factors ``r`` and ``c`` that is ``r_i / (r_i sum_j p_ij c_j +
    eps)``, and so the matrices themselves are never rewritten.
    """
    rows, columns = [torch.ones_like(p[0])], [1 / (p.sum(0) + eps)]
    for _ in range(rounds - 1):
        r, c = rows[-1], columns[-1]
        r = r / (r * (p * c).sum(1) + eps)
        c = c / (c * (p * r[:, None]).sum(0) + eps)
        rows.append(r)
        columns.append(c)
    return rows, columns


class _Scaling(torch.autograd.Function):
    """Scale rows and columns of ``p`` ``[n, n, count]``; its gradient undoes one round after the other."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, rounds: int, eps: float) -> Tensor:
        rows, columns = _factors(p, rounds, eps)
        ctx.save_for_backward(p, *rows, *columns)
        ctx.rounds, ctx.eps = rounds, eps
        return rows[-1][:, None] * p * columns[-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        p, *factors = ctx.saved_tensors
        rows, columns = factors[: ctx.rounds], factors[ctx.rounds :]
        grad_p = rows[-1][:, None] * columns[-1] * grad
        grad_r, grad_c = (grad * p * columns[-1]).sum(1), (grad * p * rows[-1][:, None]).sum(0)
        for k in reversed(range(1, ctx.rounds)):
            g = grad_c * columns[k] ** 2  # minus the gradient of the column sums that the round divided by
            grad_p.addcmul_(rows[k][:, None], g, value=-1)
            grad_r = grad_r - (p * g).sum(1)
            grad_c = grad_c * ctx.eps * (columns[k] / columns[k - 1]) ** 2
            g = grad_r * rows[k] ** 2  # likewise of the rows
            grad_p.addcmul_(g[:, None], columns[k - 1], value=-1)
            grad_c = grad_c - (p * g[:, None]).sum(0)
            grad_r = grad_r * ctx.eps * (rows[k] / rows[k - 1]) ** 2
        return grad_p - grad_c * columns[0] ** 2, None, None


def to_polytope(p: Tensor) -> Tensor:
    """Make ``[n, n, ...]`` doubly stochastic, nearby and not negative (Altschuler et al. 2017, algorithm 2).

    Rows, then columns, are scaled down to sums of at most one; what is missing comes back as a matrix of rank one.
    Where the rounds have converged nothing is done: the gradient of that would be rounding alone.
    """
    row_sums = p.sum(1, keepdim=True)
    far = (1 - row_sums).abs().amax(0, keepdim=True) > CONVERGED
    if p.is_cpu and not torch.compiler.is_compiling() and not far.any():
        return p
    scaled = p / row_sums.clamp(min=1)
    scaled = scaled / scaled.sum(0, keepdim=True).clamp(min=1)
    rows, columns = (1 - scaled.sum(1, keepdim=True)).clamp(min=0), (1 - scaled.sum(0, keepdim=True)).clamp(min=0)
    least = 8 * torch.finfo(p.dtype).eps  # less is missing by rounding alone, and no number to divide by
    return torch.where(far, scaled + rows * columns / rows.sum(0, keepdim=True).clamp(min=least), p)
