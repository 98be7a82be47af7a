"""The backward kernel. Names: see :mod:`.tiles`.

A ``grad_`` before a name is the gradient of that. Each program adds the weight gradients of its tiles up in a row of
``parts`` that is its own, and the rows are added afterwards, so no sum depends on which program is first.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from vwn.ops.triton.configs import BACKWARD, KEY, first_if_deterministic
from vwn.ops.triton.tiles import (
    load_matrix,
    load_tile,
    matrix,
    mix_columns,
    mix_rows,
    products,
    project_back,
    routing_of,
    rsqrt_of_mean,
    store_new,
    store_tile,
    tanh,
)


@triton.jit
def add_to(pointer, value, row, column, rows, columns, row_stride: tl.constexpr, column_stride: tl.constexpr):
    """Add to a small matrix that belongs to this program alone."""
    offsets, mask = matrix(row, column, rows, columns, row_stride, column_stride)
    tl.store(pointer + offsets, tl.load(pointer + offsets, mask, 0.0) + value, mask)


@triton.jit
def tanh_backward(
    grad, logits, scale, static_part, scale_part, my_part, first: tl.constexpr, columns: tl.constexpr,
    n: tl.constexpr, row_stride: tl.constexpr, column_stride: tl.constexpr, DYNAMIC: tl.constexpr,
    WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Turn the gradient of ``static + scale * tanh(logits)`` into that of the logits, ``[BT, N, K]``.

    ``first``: where in ``static`` and ``scale`` these columns begin.
    """
    i, k = tl.arange(0, grad.shape[1]), tl.arange(0, grad.shape[2])
    if WEIGHTS:
        add_to(static_part + my_part + first, tl.sum(grad, 0), i, k, n, columns, row_stride, column_stride)
    if DYNAMIC:
        t = tanh(logits)
        if WEIGHTS:
            add_to(scale_part + my_part + first, tl.sum(grad * t, 0), i, k, n, columns, row_stride, column_stride)
        grad *= load_matrix(scale + first, i, k, n, columns, row_stride, column_stride)[None, :, :] * (1 - t * t)
    return grad


@triton.jit
def projection_backward(
    grad, h, gain, c, dynamic, part, my_part, first: tl.constexpr, columns: tl.constexpr, d: tl.constexpr,
    stride: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Run the backward of ``(h gain) W`` without the norm, for columns ``c``; add the gradient of ``W`` to its part.

    Returns:
        gradient of ``h``, ``[BT, N, BD]``, and of ``gain``, ``[BD]``.
    """
    k = tl.arange(0, grad.shape[2])
    w = load_matrix(dynamic + first, c, k, d, columns, stride, 1)
    grad_gain = tl.zeros_like(gain)
    if WEIGHTS:
        rows_h = tl.reshape(h, (h.shape[0] * h.shape[1], h.shape[2]))
        rows_grad = tl.reshape(grad, (grad.shape[0] * grad.shape[1], grad.shape[2]))
        both = tl.dot(tl.permute(rows_h, (1, 0)), rows_grad, input_precision="tf32x3")
        add_to(part + my_part + first, gain[:, None] * both, c, k, d, columns, stride, 1)
        grad_gain += tl.sum(w * both, 1)
    return project_back(grad, gain[:, None] * w), grad_gain


@triton.jit
def grad_of_read(
    grad_x, x, norm, rstd, slope, t, c, T, m: tl.constexpr, d: tl.constexpr, M: tl.constexpr, NORM: tl.constexpr
):
    """Load the gradient of ``X``; with a norm, from that of its result."""
    g = load_tile(grad_x, t, c, T, m, M, d)
    if NORM:
        weight = load_tile(norm.weight, tl.zeros((1,), tl.int32), c, 1, m, M, d)
        x_c = load_tile(x, t, c, T, m, M, d) * rstd[:, None, None]
        g = rstd[:, None, None] * (g * weight - x_c * slope[:, None, None])
    return g


def _clear_parts(arguments: dict[str, Any], reset_only: bool = False) -> None:
    """Zero the parts: autotuning runs the kernel many times, and each run adds to them."""
    if arguments["parts"] is not None:
        arguments["parts"].zero_()


@triton.autotune(BACKWARD, KEY, prune_configs_by={"early_config_prune": first_if_deterministic}, pre_hook=_clear_parts)
@triton.jit
def backward(
    grad_new,  # of the new state, [T, n d], or None
    grad_x,  # of X, or of what the norm makes of it, [T, m d]
    state,  # H', [T, n d]
    z,  # Z, [T, m d]
    grad_state,  # result, [T, n d]; on the way the new state, and then its gradient
    grad_z,  # result, [T, m d]
    x,  # X on the way to a norm, [T, m d]; it may be grad_z
    parts,  # [programs, PART], zero, or None: no weight gradients
    T,
    write,  # RoutingWeights, or None
    read,  # RoutingWeights without those of B, or None
    norm,  # NormWeights, or None
    write_part,  # the same tuples of the first row of parts
    read_part,
    norm_part,
    PART: tl.constexpr,
    n: tl.constexpr,
    m: tl.constexpr,
    d: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    WRITE: tl.constexpr,
    READ: tl.constexpr,
    NORM: tl.constexpr,
    WRITE_DYNAMIC: tl.constexpr,
    READ_DYNAMIC: tl.constexpr,
    FEW: tl.constexpr,
    WEIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BD: tl.constexpr,
):
    """Compute gradients of the forward's inputs; the routing and the new state are computed again."""
    BT: tl.constexpr = ROWS // N if ROWS > N else 1
    k = tl.arange(0, M)
    my_part = tl.program_id(0).to(tl.int64) * PART
    for tile_index in range(tl.program_id(0), tl.cdiv(T, BT), tl.num_programs(0)):
        t = tile_index * BT + tl.arange(0, BT)
        if WRITE:
            carry, beta, carry_logits, beta_logits, rstd = routing_of(
                state, t, T, write, m, n, N, True, WRITE_DYNAMIC, n, m, d, N, M, BT, BD
            )
        if READ:
            if WRITE:
                store_new(grad_state, state, z, carry, beta, t, T, n, m, d, N, M, BD, PRECISION)
                new = grad_state
            else:
                new = state
            routing, _, logits, _, read_rstd = routing_of(
                new, t, T, read, 0, m, M, False, READ_DYNAMIC, n, m, d, N, M, BT, BD
            )

            # The norm: its backward needs Σ x² and Σ x (grad_x weight)
            squares, slope = tl.zeros((BT,), tl.float32), tl.zeros((BT,), tl.float32)
            if NORM:
                for first in range(0, d, BD):
                    c = first + tl.arange(0, BD)
                    x_c = mix_rows(routing, load_tile(new, t, c, T, n, N, d), PRECISION).to(x.dtype.element_ty)
                    store_tile(x, x_c, t, c, T, m, M, d)
                    x_c = x_c.to(tl.float32)
                    weight = load_tile(norm.weight, tl.zeros((1,), tl.int32), c, 1, m, M, d)
                    squares += tl.sum(tl.sum(x_c * x_c, 2), 1)
                    slope += tl.sum(tl.sum(x_c * weight * load_tile(grad_x, t, c, T, m, M, d), 2), 1)
                tl.debug_barrier()
                squares = rsqrt_of_mean(squares, norm.eps, m * d)
                slope *= squares / (m * d)
            x_rstd = squares

            # Gradient of Å
            grad_routing = tl.zeros((BT, N, M), tl.float32)
            for first in range(0, d, BD):
                c = first + tl.arange(0, BD)
                g = grad_of_read(grad_x, x, norm, x_rstd, slope, t, c, T, m, d, M, NORM)
                grad_routing += products(load_tile(new, t, c, T, n, N, d), g, PRECISION)
                if NORM and WEIGHTS:
                    x_c = (load_tile(x, t, c, T, m, M, d) * x_rstd[:, None, None]).to(x.dtype.element_ty)
                    grad_weight = tl.sum(x_c.to(tl.float32) * load_tile(grad_x, t, c, T, m, M, d), 0)
                    add_to(norm_part.weight + my_part, grad_weight, k, c, m, d, d, 1)
            grad_logits = tanh_backward(
                grad_routing, logits, read.scale_alpha, read_part.bias_alpha, read_part.scale_alpha, my_part, 0, m,
                n, m + n, 1, READ_DYNAMIC, WEIGHTS,
            )  # fmt: skip

            # Gradient of the new state
            slot_slope = tl.sum(grad_logits * logits, 2) * read_rstd * read_rstd / d
            grad_logits *= read_rstd[:, :, None] * d**-0.5
            for first in range(0, d, BD):
                c = first + tl.arange(0, BD)
                g = grad_of_read(grad_x, x, norm, x_rstd, slope, t, c, T, m, d, M, NORM)
                g = mix_columns(routing, g, PRECISION)
                if READ_DYNAMIC:
                    h = load_tile(new, t, c, T, n, N, d)
                    gain = tl.load(read.slot_norm + c, c < d, 0.0)
                    grad_h, grad_gain = projection_backward(
                        grad_logits, h, gain, c, read.dynamic_alpha, read_part.dynamic_alpha, my_part, 0, m, d, m + n,
                        WEIGHTS,
                    )  # fmt: skip
                    g += grad_h - h * slot_slope[:, :, None]
                    if WEIGHTS:
                        add_to(read_part.slot_norm + my_part, grad_gain[None, :], tl.arange(0, 1), c, 1, d, d, 1)
                if grad_new is not None:
                    g += load_tile(grad_new, t, c, T, n, N, d)
                tl.debug_barrier()
                store_tile(grad_state, g, t, c, T, n, N, d)
            tl.debug_barrier()

        if WRITE:
            if READ:
                grad = grad_state
            else:
                grad = grad_new

            # Gradients of Z, Â and Bᵀ
            grad_carry, grad_beta = tl.zeros((BT, N, N), tl.float32), tl.zeros((BT, N, M), tl.float32)
            for first in range(0, d, BD):
                c = first + tl.arange(0, BD)
                g = load_tile(grad, t, c, T, n, N, d)
                grad_carry += products(load_tile(state, t, c, T, n, N, d), g, PRECISION)
                grad_beta += products(g, load_tile(z, t, c, T, m, M, d), PRECISION)
                store_tile(grad_z, mix_rows(beta, g, PRECISION), t, c, T, m, M, d)
            grad_carry = tanh_backward(
                grad_carry, carry_logits, write.scale_alpha, write_part.bias_alpha, write_part.scale_alpha, my_part,
                m, n, n, m + n, 1, WRITE_DYNAMIC, WEIGHTS,
            )  # fmt: skip
            grad_beta = tanh_backward(
                grad_beta, beta_logits, write.scale_beta, write_part.bias_beta, write_part.scale_beta, my_part, 0, m,
                n, 1, n, WRITE_DYNAMIC, WEIGHTS,
            )  # fmt: skip

            # Gradient of the state
            slot_slope = tl.sum(grad_carry * carry_logits, 2) + tl.sum(grad_beta * beta_logits, 2)
            slot_slope *= rstd * rstd / d
            grad_carry *= rstd[:, :, None] * d**-0.5
            grad_beta *= rstd[:, :, None] * d**-0.5
            for first in range(0, d, BD):
                c = first + tl.arange(0, BD)
                g = mix_columns(carry, load_tile(grad, t, c, T, n, N, d), PRECISION)
                if WRITE_DYNAMIC:
                    h = load_tile(state, t, c, T, n, N, d)
                    gain = tl.load(write.slot_norm + c, c < d, 0.0)
                    grad_h, grad_gain = projection_backward(
                        grad_carry, h, gain, c, write.dynamic_alpha, write_part.dynamic_alpha, my_part, m, n, d,
                        m + n, WEIGHTS,
                    )  # fmt: skip
                    grad_h_of_beta, grad_gain_of_beta = projection_backward(
                        grad_beta, h, gain, c, write.dynamic_beta, write_part.dynamic_beta, my_part, 0, m, d, m,
                        WEIGHTS,
                    )  # fmt: skip
                    g += grad_h + grad_h_of_beta - h * slot_slope[:, :, None]
                    if WEIGHTS:
                        grad_gain = (grad_gain + grad_gain_of_beta)[None, :]
                        add_to(write_part.slot_norm + my_part, grad_gain, tl.arange(0, 1), c, 1, d, d, 1)
                tl.debug_barrier()
                store_tile(grad_state, g, t, c, T, n, N, d)
        tl.debug_barrier()  # the next tile adds to the same part
