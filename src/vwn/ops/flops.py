"""FLOPs of the ops' matrix products (section 3.5), so that ``torch.utils.flop_counter`` sees through them.

Whatever the backend, and without what the backward computes again: twice the forward, as for any matrix product.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from vwn.ops import library  # noqa: F401  # registers the ops
from vwn.ops.weights import RoutingWeights

Shape = tuple[int, ...]
"""What the formulas get for each tensor; ``None`` for one that is not there."""


def read_flops(state: Shape, static_alpha: Shape, dynamic_alpha: Shape | None) -> int:
    """``m`` columns of routing (when dynamic) and the read itself, per token ``2 m D'`` each."""
    n, columns = static_alpha
    return 2 * (columns - n) * math.prod(state) * (1 if dynamic_alpha is None else 2)


def write_flops(state: Shape, z: Shape, static_beta: Shape, dynamic_alpha: Shape | None) -> int:
    """``m + n`` columns of routing (when dynamic), the carry ``2 n D'`` and the write ``2 n D``."""
    m, n = static_beta
    routing = 0 if dynamic_alpha is None else 2 * (m + n) * math.prod(state)
    return routing + 2 * n * math.prod(state) + 2 * n * math.prod(z)


# The arguments are the ops', in their order: weights as in weights.py


@register_flop_formula(torch.ops.vwn.read)
def _read(state: Shape, static_alpha: Shape, dynamic_alpha: Shape | None, *_: Any, **__: Any) -> int:
    return read_flops(state, static_alpha, dynamic_alpha)


@register_flop_formula(torch.ops.vwn.write)
def _write(state: Shape, z: Shape, *weights: Any, **__: Any) -> int:
    return write_flops(state, z, weights[1], weights[2])


@register_flop_formula(torch.ops.vwn.write_read)
def _write_read(state: Shape, z: Shape, *weights: Any, **__: Any) -> int:
    following = weights[len(RoutingWeights._fields) :]
    return write_flops(state, z, weights[1], weights[2]) + read_flops(state, following[0], following[1])


@register_flop_formula(torch.ops.vwn.read_backward)
def _read_backward(grad_x: Shape, *inputs: Any, **__: Any) -> int:
    return 2 * _read(*inputs)


@register_flop_formula(torch.ops.vwn.write_backward)
def _write_backward(grad_state: Shape, *inputs: Any, **__: Any) -> int:
    return 2 * _write(*inputs)


@register_flop_formula(torch.ops.vwn.write_read_backward)
def _write_read_backward(grad_state: Shape, grad_x: Shape, *inputs: Any, **__: Any) -> int:
    return 2 * _write_read(*inputs)
