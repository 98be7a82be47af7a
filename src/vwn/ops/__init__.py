"""The three operations on an over-width state: read, write, and both at once, on several backends.

Shapes: ``...`` any leading dimensions, ``D`` backbone width, ``D' = n d`` over-width, slot-major.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vwn.ops import library
from vwn.ops.backends import BACKENDS, check_backend, choose
from vwn.ops.weights import NormWeights, RoutingWeights, state_dtype

__all__ = [
    "BACKENDS",
    "NormWeights",
    "RoutingWeights",
    "check_backend",
    "choose",
    "read",
    "state_dtype",
    "write",
    "write_read",
]


def read(state: Tensor, weights: RoutingWeights, norm: NormWeights | None = None, backend: str = "auto") -> Tensor:
    """Compute a sublayer's input ``X = Åᵀ H'`` (first line of eq. 10).

    Args:
        state: over-width state, ``[..., D']``, floating point.
        weights: of the sublayer's connection.
        norm: the sublayer's own RMSNorm, to be applied to ``X`` in the same pass.
        backend: ``"auto"``, ``"reference"``, ``"compiled"`` or ``"triton"``.

    Returns:
        ``[..., D]`` in the state's dtype, or autocast's; the routing is computed in float32 (float64 for a float64
        state).

    Raises:
        UserError: shapes or devices that do not fit, or a backend asked for by name that cannot run.
    """
    return library.read(*_arguments(state, None, None, weights.to_read, norm, backend))


def write(state: Tensor, z: Tensor, weights: RoutingWeights, backend: str = "auto") -> Tensor:
    """Compute the new state ``Bᵀ Z + Âᵀ H'`` (second line of eq. 10).

    Args:
        state: the state that was read, ``[..., D']``.
        z: the sublayer's output, ``[..., D]``.
        weights: of the sublayer's connection.
        backend: as in :func:`read`, like what it raises.

    Returns:
        ``[..., D']`` in the state's dtype.
    """
    return library.write(*_arguments(state, z, weights, None, None, backend))


def write_read(
    state: Tensor,
    z: Tensor,
    weights: RoutingWeights,
    following: RoutingWeights,
    norm: NormWeights | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute the write of one sublayer and the read of the next, which sees the new state while it is at hand.

    Equal to :func:`write` and then :func:`read`, on a CPU to the bit, on a GPU within rounding; it moves
    ``(2r + 2) D`` elements instead of ``(3r + 2) D``.

    Args:
        state: the state that was read, ``[..., D']``.
        z: the sublayer's output, ``[..., D]``.
        weights: of the connection of the sublayer that wrote ``z``.
        following: of the connection of the sublayer that reads, of the same ``(m, n)``.
        norm: the reading sublayer's own RMSNorm, to be applied in the same pass.
        backend: as in :func:`read`, like what it raises.

    Returns:
        the new state ``[..., D']`` and ``X`` ``[..., D]``, in the state's dtype.
    """
    return library.write_read(*_arguments(state, z, weights, following.to_read, norm, backend))


def _arguments(
    state: Tensor,
    z: Tensor | None,
    write: RoutingWeights | None,
    read: RoutingWeights | None,
    norm: NormWeights | None,
    backend: str,
) -> list[Any]:
    """Return the arguments of an op, with the weights in the dtype that the routing is computed in."""
    state = state.to(state_dtype(state))
    dtype = torch.promote_types(state.dtype, torch.float32)
    both = (*(write or ()), *(read or ()))
    weights = [t.to(dtype) if isinstance(t, Tensor) and t.dtype is not dtype else t for t in both]
    norm_arguments: list[Any] = [] if read is None else [None, 0.0]
    if norm is not None:
        norm_arguments = [norm.weight.to(state.dtype), norm.eps]
    return [state, *([] if z is None else [z.to(state.dtype)]), *weights, *norm_arguments, backend]
