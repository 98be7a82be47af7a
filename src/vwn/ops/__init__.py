"""The three operations on an over-width state: read, write, and both at once, on several backends.

Shapes: ``...`` any leading dimensions, ``D`` backbone width, ``D' = n d`` over-width, slot-major.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vwn.common.errors import UserError
from vwn.ops import library
from vwn.ops.backends import BACKENDS, check_backend, choose
from vwn.ops.weights import NormWeights, ReadWeights, RoutingWeights, check_shapes, check_weights, state_dtype

__all__ = [
    "BACKENDS",
    "NormWeights",
    "ReadWeights",
    "RoutingWeights",
    "check_backend",
    "choose",
    "read",
    "state_dtype",
    "write",
    "write_read",
]


def read(
    state: Tensor, weights: RoutingWeights | ReadWeights, norm: NormWeights | None = None, backend: str = "auto"
) -> Tensor:
    """A sublayer's input ``X = Åᵀ H'`` (first line of eq. 10).

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
    weights = weights.to_read if isinstance(weights, RoutingWeights) else weights
    check_shapes(state, None, weights, norm=norm)
    state = state.to(state_dtype(state))
    weight, eps = _norm(norm, state)
    return library.read(state, *_cast(weights, state), weight, eps, backend)


def write(state: Tensor, z: Tensor, weights: RoutingWeights, backend: str = "auto") -> Tensor:
    """The new state ``Bᵀ Z + Âᵀ H'`` (second line of eq. 10).

    Args:
        state: the state that was read, ``[..., D']``.
        z: the sublayer's output, ``[..., D]``.
        weights: of the sublayer's connection.
        backend: as in :func:`read`.

    Returns:
        ``[..., D']`` in the state's dtype.

    Raises:
        UserError: shapes or devices that do not fit, or a backend asked for by name that cannot run.
    """
    check_shapes(state, z, weights)
    state = state.to(state_dtype(state))
    return library.write(state, z.to(state.dtype), *_cast(weights, state), backend)


def write_read(
    state: Tensor,
    z: Tensor,
    weights: RoutingWeights,
    following: RoutingWeights | ReadWeights,
    norm: NormWeights | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The write of one sublayer and the read of the next, which sees the new state while it is at hand.

    Equal to :func:`write` and then :func:`read`, on a CPU to the bit, on a GPU within rounding; it moves
    ``(2r + 2) D`` elements instead of ``(3r + 2) D``.

    Args:
        state: the state that was read, ``[..., D']``.
        z: the sublayer's output, ``[..., D]``.
        weights: of the connection of the sublayer that wrote ``z``.
        following: of the connection of the sublayer that reads.
        norm: the reading sublayer's own RMSNorm, to be applied in the same pass.
        backend: as in :func:`read`.

    Returns:
        the new state ``[..., D']`` and ``X`` ``[..., D]``, in the state's dtype.

    Raises:
        UserError: shapes or devices that do not fit, or a backend asked for by name that cannot run.
    """
    following = following.to_read if isinstance(following, RoutingWeights) else following
    check_shapes(state, z, weights, norm=norm)
    check_weights(following, state)
    if (following.m, following.n) != (weights.m, weights.n):
        raise UserError(
            f"write_read takes two connections of one (m, n), got {(weights.m, weights.n)} and "
            f"{(following.m, following.n)}; write and read apart"
        )
    state = state.to(state_dtype(state))
    weight, norm_eps = _norm(norm, state)
    return library.write_read(
        state, z.to(state.dtype), *_cast(weights, state), *_cast(following, state), weight, norm_eps, backend
    )


def _cast(weights: ReadWeights | RoutingWeights, state: Tensor) -> list[Any]:
    """The fields, the tensors contiguous and in the dtype that the routing is computed in."""
    dtype = torch.promote_types(state.dtype, torch.float32)
    return [
        t if not isinstance(t, Tensor) or (t.dtype is dtype and t.is_contiguous()) else t.to(dtype).contiguous()
        for t in weights
    ]


def _norm(norm: NormWeights | None, state: Tensor) -> tuple[Tensor | None, float]:
    return (None, 0.0) if norm is None else (norm.weight.to(state.dtype).contiguous(), norm.eps)
