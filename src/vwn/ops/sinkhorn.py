"""Sinkhorn's scaling of small matrices to row and column sums of one, many at a time.

The order and the place of ``eps`` are those of DeepSeek-V4's connections: a softmax over rows, then columns, and so on
in turn, columns last. ``sinkhorn.cpp`` does it on a CPU; :func:`reference` is what it means, and runs everywhere else.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from vwn.common.errors import UserError
from vwn.ops import compiled
from vwn.ops.backends import choose

ROUNDS = 20
"""Of mHC (arXiv 2512.24880)."""
EXACT_EPS = 1e-12
"""Keeps the squares of sums in float32's range, and is lost beside every coefficient that matters."""


CONVERGED = 4e-6
"""Row sums as near to one as this are exact: it is what rounding leaves of 64 float32 numbers."""


def sinkhorn(
    logits: Tensor, rounds: int = ROUNDS, eps: float = EXACT_EPS, exact: bool = False, backend: str = "auto"
) -> Tensor:
    """``exp(logits)`` scaled to row and column sums of one.

    Args:
        logits: ``[..., n, n]``, floating point.
        rounds: of row and column scaling, 1 or more.
        eps: added to the first row-scaled matrix and to every sum that divides.
        exact: finish with :func:`to_polytope`, since a fixed number of rounds does not converge for all logits.
        backend: ``"auto"``, ``"reference"`` or ``"compiled"``; on a GPU the reference runs.

    Returns:
        ``[..., n, n]``, float32 (float64 for float64 logits), not negative: columns sum to one, rows nearly; with
        ``exact`` both do, to rounding, for any logits.

    Raises:
        UserError: matrices that are not square or not floating point, fewer ``rounds`` than 1, or a backend asked for
            by name that cannot run.
    """
    if logits.ndim < 2 or logits.shape[-1] != logits.shape[-2] or not logits.is_floating_point():
        got = f"{tuple(logits.shape)} {str(logits.dtype).removeprefix('torch.')}"
        raise UserError(f"Sinkhorn's scaling takes square matrices of floating point numbers, got {got}")
    if rounds < 1:
        raise UserError(f"rounds of Sinkhorn's scaling must be 1 or more, got {rounds}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if choose(backend, logits.device, logits.dtype) == "compiled":
        return _sinkhorn(logits, rounds, eps, exact)
    return reference(logits, rounds, eps, exact)


def reference(logits: Tensor, rounds: int, eps: float, exact: bool) -> Tensor:
    """What :func:`sinkhorn` means, in plain PyTorch."""
    p = torch.softmax(logits, dim=-1) + eps
    p = p / (p.sum(-2, keepdim=True) + eps)
    for _ in range(rounds - 1):
        p = p / (p.sum(-1, keepdim=True) + eps)
        p = p / (p.sum(-2, keepdim=True) + eps)
    return to_polytope(p) if exact else p


def to_polytope(p: Tensor) -> Tensor:
    """A doubly-stochastic matrix near ``p`` ``[..., n, n]``, not negative (Altschuler et al. 2017, algorithm 2).

    Rows, then columns, are scaled down to sums of at most one; what is missing comes back as a matrix of rank one.
    Where the rounds have converged nothing is done: the gradient of that would be rounding alone.
    """
    far = (1 - p.sum(-1, keepdim=True)).abs().amax(-2, keepdim=True) > CONVERGED
    scaled = p / p.sum(-1, keepdim=True).clamp(min=1)
    scaled = scaled / scaled.sum(-2, keepdim=True).clamp(min=1)
    rows, columns = (1 - scaled.sum(-1, keepdim=True)).clamp(min=0), (1 - scaled.sum(-2, keepdim=True)).clamp(min=0)
    share = rows.sum(-2, keepdim=True).clamp(min=_least(p.dtype))
    return torch.where(far, scaled + rows * columns / share, p)


def _least(dtype: torch.dtype) -> float:
    """Less than this is missing by rounding alone, and no number to divide by."""
    return 8 * torch.finfo(dtype).eps


# The compiled one, as PyTorch knows it. Only the logits are saved for the backward.


class _Args(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("count", "n", "rounds", "exact", "is_double", "threads")),
        *((name, ctypes.c_double) for name in ("eps", "least", "converged")),
        *((name, ctypes.c_void_p) for name in ("p", "grad_out", "out", "grad_p")),
    ]


def _run(p: Tensor, grad: Tensor | None, rounds: int, eps: float, exact: bool) -> Tensor:
    """From what the softmax gave to the result, or from the result's gradient to that of what the softmax gave."""
    found, n = torch.empty_like(p), p.shape[-1]
    args = _Args(count=p.numel() // max(1, n * n), n=n, rounds=rounds, exact=exact, eps=eps, least=_least(p.dtype))
    args.converged = CONVERGED
    args.is_double, args.threads, args.p = p.dtype == torch.float64, torch.get_num_threads(), p.data_ptr()
    if grad is None:
        args.out = found.data_ptr()
    else:
        args.grad_out, args.grad_p = grad.data_ptr(), found.data_ptr()
    compiled.library().vwn_sinkhorn(ctypes.byref(args))
    return found


@torch.library.custom_op("vwn::sinkhorn", mutates_args=())
def _sinkhorn(logits: Tensor, rounds: int, eps: float, exact: bool) -> Tensor:
    """``[..., n, n]`` of either floating point type that is computed in."""
    return _run(torch.softmax(logits.contiguous(), dim=-1), None, rounds, eps, exact)


@torch.library.custom_op("vwn::sinkhorn_backward", mutates_args=())
def _sinkhorn_backward(grad: Tensor, logits: Tensor, rounds: int, eps: float, exact: bool) -> Tensor:
    """Gradient of the logits."""
    p = torch.softmax(logits.contiguous(), dim=-1)
    g = _run(p, grad.contiguous(), rounds, eps, exact) * p
    return g - p * g.sum(-1, keepdim=True)


@_sinkhorn.register_fake
def _(logits, rounds, eps, exact):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@_sinkhorn_backward.register_fake
def _(grad, logits, rounds, eps, exact):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple, output: Any) -> None:
    logits, *ctx.options = inputs
    ctx.save_for_backward(logits)


def _gradients(ctx: Any, grad: Tensor) -> tuple:
    (logits,) = ctx.saved_tensors
    return _sinkhorn_backward(grad, logits, *ctx.options), None, None, None


_sinkhorn.register_autograd(_gradients, setup_context=_save)
