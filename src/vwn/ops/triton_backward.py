"""The backward of a boundary as one Triton kernel: gradients of state and ``Z``, and parts of those of the weights.

A program takes every ``programs``-th tile, and adds up the gradients of the weights in its own part of a scratch buffer
(:mod:`vwn.ops.triton_sums`). The chunks of a tile are read again in each of its phases, and what a later phase needs is
kept in the gradient's own memory: in registers it would not fit. See :mod:`vwn.ops.triton_tiles` for the shapes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vwn.ops.triton_routing import (
    block_diagonal,
    coefficients,
    factors,
    load_projection,
    mixed,
    mixed_segments,
    operands,
    over_halves,
    over_tokens,
    own,
    projected,
    rms_reciprocal,
    segment_operands,
    segments_of,
    squared,
    transposed_operands,
    unprojected,
)
from vwn.ops.triton_sums import accumulate, accumulate_matrix, over_all_tokens
from vwn.ops.triton_tiles import (
    again,
    each_group,
    far,
    held,
    load_rows,
    load_turned,
    over_pieces,
    pinned,
    places_of,
    product_across,
    rounded,
    rounded_pairs,
    rounded_sum,
    rows_of,
    store_rows,
    straight,
    swapped,
    turned,
    turned_rows,
)
from vwn.ops.triton_weights import store_factors


@triton.jit
def through_routing(grad, p, rstd, t, s, TAU: tl.constexpr, d: tl.constexpr):
    """From the gradient of coefficients, ``[G, H, K]``, to that of the slots.

    Returns:
        what the projection's weights are to be multiplied with, ``[G, H, K]``, and the slots themselves, ``[G, H]``.
    """
    factor = grad * s * tl.fma(-t, t, 1.0) * (rstd / TAU)[:, :, None]
    if factor.shape[1] < 64:
        factor = pinned(factor)
    return factor, -rstd * rstd / d * tl.sum(factor * p, axis=2)


@triton.jit
def slopes(slope, S: tl.constexpr, SPLIT: tl.constexpr):
    """What a slot is to be multiplied with, ``[G, H]``, as :func:`sloped` takes it."""
    G: tl.constexpr = slope.shape[0]
    H: tl.constexpr = slope.shape[1]
    if SPLIT and H < 64:
        i = tl.arange(0, H)
        diagonal = tl.where(i[None, :, None] == i[None, None, :], slope[:, :, None], 0.0)
        result = operands(diagonal, S, SPLIT)
    else:
        each = tl.reshape(tl.broadcast_to(slope[:, None, :], [G, S, H]), [G * S, H, 1])
        result = each, each
    return result


@triton.jit
def sloped(slope, h, acc, SPLIT: tl.constexpr):
    """``acc + slope * h``: on tensor cores, which have ``h`` for another product already and need it not unpacked."""
    if slope[0].shape[2] > 1:
        acc = mixed(slope, h, acc, SPLIT)
    else:
        acc = tl.fma(slope[0], h.to(tl.float32), acc)
    return acc


@triton.jit
def upstream(grad_x, norm_gain, row, gain_row, chunk, d, S, U, L, NC, NORM: tl.constexpr):
    """A chunk of the incoming gradient, ``[S, Q, BD]``, and of ``U``: that times the gain of the norm, in float32."""
    g = load_rows(grad_x, row, chunk, d, S, U, L, NC, 1, True)
    u = g
    if NORM:
        u = g.to(tl.float32) * load_rows(norm_gain, gain_row, chunk, d, S, U, L, NC, 1, True).to(tl.float32)
    return g, u


@triton.jit(do_not_specialize=["tokens"])
def boundary_backward(
    grad_state,
    grad_x,
    state,
    z,
    of_state,
    of_z,
    parts,
    kept,
    packed,
    tokens,
    static_alpha,
    static_beta,
    dynamic_alpha,
    dynamic_beta,
    scale_alpha,
    scale_beta,
    write_gain,
    write_eps,
    static_read,
    dynamic_read,
    scale_read,
    read_gain,
    read_eps,
    norm_gain,
    norm_eps,
    TAU: tl.constexpr,
    n: tl.constexpr,
    m: tl.constexpr,
    d: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    BT: tl.constexpr,
    R: tl.constexpr,
    H: tl.constexpr,
    Q: tl.constexpr,
    E: tl.constexpr,
    KN: tl.constexpr,
    KM: tl.constexpr,
    S: tl.constexpr,
    U: tl.constexpr,
    BD: tl.constexpr,
    NC: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    WRITE: tl.constexpr,
    WRITE_DYNAMIC: tl.constexpr,
    READ: tl.constexpr,
    READ_DYNAMIC: tl.constexpr,
    NORM: tl.constexpr,
    WEIGHTS: tl.constexpr,
    APART: tl.constexpr,
    PART: tl.constexpr,
    OF_READ: tl.constexpr,
    NORM_AT: tl.constexpr,
    MATRICES: tl.constexpr,
):
    """Gradients of :func:`vwn.ops.triton_forward.boundary`; see :func:`vwn.ops.reference.backward`.

    ``PART`` is the size of a part (:mod:`vwn.ops.triton_sums`); the read's projection is at ``OF_READ``, the norm at
    ``NORM_AT``, the routing at ``MATRICES``. ``APART``: the write's projections are left to
    :mod:`vwn.ops.triton_weights`, and what they need is ``kept``.
    """
    G: tl.constexpr = R // H
    PARTS: tl.constexpr = 2 if SPLIT else 1
    L: tl.constexpr = BD // U
    A: tl.constexpr = m + n
    W: tl.constexpr = 16 if H < 64 or U > 1 else 64  # as many as tensor cores take at a time without copying
    READ_AT: tl.constexpr = WRITE_DYNAMIC * (KN + KM)
    if WEIGHTS:
        part = parts + tl.program_id(0).to(tl.int64) * PART
        matrices = part + MATRICES
        beta_matrices = matrices + 2 * R * KN
        read_matrices = matrices + WRITE * 2 * R * (KN + KM)

    for first in tl.range(tl.program_id(0) * BT, tokens, tl.num_programs(0) * BT, disable_licm=True):
        fresh = first == tl.program_id(0) * BT
        left = tokens - first
        if SPLIT:  # which spares instructions; the other dtypes would spill more for it
            tl.assume(left > 0)
        row, there = rows_of(first, tokens, n, N, R, BT, S, U)
        z_row, z_there = rows_of(first, tokens, m, M, Q, BT, S, U)
        turned_row, _ = places_of(turned_rows(R, S, U), first, tokens, n, N, BT)
        turned_z_row, _ = places_of(turned_rows(Q, S, U), first, tokens, m, M, BT)
        begin, z_begin = far(first, n * d), far(first, m * d)

        if WRITE:
            gram = tl.zeros([G * S * H // W, W, W], tl.float32)
            carry_p = tl.zeros([G * S, H, KN * PARTS], tl.float32)
            beta_p = tl.zeros([G * S, H, KM * PARTS], tl.float32)
            if WRITE_DYNAMIC:
                for chunk in tl.range(NC):
                    h = held(load_rows(state + begin, row, chunk, d, S, U, L, NC, G, True), tokens, SPLIT)
                    gram = squared(h, gram, SPLIT)
                    w = load_projection(
                        packed, dynamic_alpha, write_gain, chunk, 0, m, A, n, N, KN, SPLIT, d, S, U, L, NC
                    )
                    carry_p = projected(h, w, carry_p, SPLIT)
                    w = load_projection(
                        packed, dynamic_beta, write_gain, chunk, KN, 0, m, m, M, KM, SPLIT, d, S, U, L, NC
                    )
                    beta_p = projected(h, w, beta_p, SPLIT)
            write_rstd = rms_reciprocal(gram, write_eps, d, G, H)
            carry_p, beta_p = over_halves(carry_p, G, KN), over_halves(beta_p, G, KM)
            carry, carry_t, _ = coefficients(
                carry_p, write_rstd, static_alpha, scale_alpha, left, TAU, m, A, 1, n, N, n, N, WRITE_DYNAMIC
            )
            beta, beta_t, _ = coefficients(
                beta_p, write_rstd, static_beta, scale_beta, left, TAU, 0, 1, n, m, M, n, N, WRITE_DYNAMIC
            )

        if READ:
            if WRITE:
                carry_to = operands(swapped(block_diagonal(carry, H, N, N, True)), S, SPLIT)
                beta_to = segment_operands(block_diagonal(beta, E, M, N, False), S, SPLIT)
            gain_row = rows_of(0, BT, m, M, Q, BT, S, U)[0] % m
            gram = tl.zeros([G * S * H // W, W, W], tl.float32)
            read_p = tl.zeros([G * S, H, KM * PARTS], tl.float32)
            grad = tl.zeros([G * S, H, Q], tl.float32)
            for chunk in tl.range(NC):
                if WRITE:
                    h = load_turned(state + begin, turned_row, chunk, d, S, U, L, NC, G, True)
                    zc = load_turned(z + z_begin, turned_z_row, chunk, d, S, U, L, NC, 1, True)
                    acc = mixed(carry_to, h, tl.zeros([G * S, H, BD], tl.float32), SPLIT)
                    h = rounded(straight(mixed_segments(beta_to, zc, acc, SPLIT), S), h.dtype)
                else:
                    h = held(load_rows(state + begin, row, chunk, d, S, U, L, NC, G, True), tokens, SPLIT)
                if WRITE:
                    store_rows(of_state + begin, row, there, chunk, h, d, S, U, L, NC, G)
                if READ_DYNAMIC:
                    gram = squared(h, gram, SPLIT)
                    w = load_projection(
                        packed, dynamic_read, read_gain, chunk, READ_AT, 0, A, m, M, KM, SPLIT, d, S, U, L, NC
                    )
                    read_p = projected(h, w, read_p, SPLIT)
                if not NORM:
                    gx = load_rows(grad_x + z_begin, z_row, chunk, d, S, U, L, NC, 1, True)
                    grad = product_across(h, each_group(gx, G), grad, SPLIT)
            read_rstd = rms_reciprocal(gram, read_eps, d, G, H)
            read_p = over_halves(read_p, G, KM)
            read, read_t, read_s = coefficients(
                read_p, read_rstd, static_read, scale_read, left, TAU, 0, A, 1, m, M, n, N, READ_DYNAMIC
            )
            new = (of_state if WRITE else state) + begin
            tl.debug_barrier()  # other threads wrote what is read next

            if NORM:  # with U the gradient times the gain, that of X is rstd (U - slope X)
                read_from = transposed_operands(block_diagonal(read, E, M, N, False), S, SPLIT)
                along = tl.zeros([G * S, H, Q], tl.float32)
                squares = tl.zeros([S, Q, BD], tl.float32)
                dots = tl.zeros([S, Q, BD], tl.float32)
                for chunk in tl.range(NC):
                    h = held(load_rows(new, row, chunk, d, S, U, L, NC, G, True), tokens, SPLIT)
                    ht = load_turned(new, turned_row, chunk, d, S, U, L, NC, G, True)
                    x = rounded_pairs(straight(segments_of(read_from, ht, G, Q, SPLIT), S), h.dtype)
                    gy, u = upstream(grad_x + z_begin, norm_gain, z_row, gain_row, chunk, d, S, U, L, NC, NORM)
                    wide = x.to(tl.float32)
                    squares = tl.fma(wide, wide, squares)
                    dots = tl.fma(u, wide, dots)
                    grad = product_across(h, each_group(rounded_pairs(u, h.dtype), G), grad, SPLIT)
                    along = product_across(h, each_group(x, G), along, SPLIT)
                norm_rstd = over_tokens(tl.sum(tl.sum(squares, axis=2), axis=0), M)
                norm_rstd = tl.where(
                    tl.arange(0, Q) // M < tl.minimum(left, BT), tl.rsqrt(norm_rstd / (m * d) + norm_eps), 0.0
                )
                norm_slope = over_tokens(tl.sum(tl.sum(dots, axis=2), axis=0), M) / (m * d)
                norm_slope *= norm_rstd * norm_rstd
            grad = over_pieces(grad, G)
            if NORM:
                grad = norm_rstd[None, None, :] * (grad - norm_slope[None, None, :] * over_pieces(along, G))
            grad = own(grad, left, KM, M, m, n, N, False)
            if WEIGHTS:
                accumulate_matrix(read_matrices, grad, fresh)
            if READ_DYNAMIC:
                if WEIGHTS:
                    accumulate_matrix(read_matrices + R * KM, grad, fresh, read_t)
                factor, slope = through_routing(grad, read_p, read_rstd, read_t, read_s, TAU, d)
                read_f, read_w = factors(factor, S, SPLIT), transposed_operands(factor, S, SPLIT)
                read_slope = slopes(slope, S, SPLIT)
            read_to = segment_operands(block_diagonal(read, Q if NORM else E, M, N, False), S, SPLIT)

        carry_grad = tl.zeros([G * S, H, H], tl.float32)
        beta_grad = tl.zeros([G * S, H, Q], tl.float32)
        for chunk in tl.range(NC):
            if READ:
                h = load_turned(new, turned_row, chunk, d, S, U, L, NC, G, True)
                if NORM:
                    gy, gx = upstream(grad_x + z_begin, norm_gain, z_row, gain_row, chunk, d, S, U, L, NC, NORM)
                else:
                    gx = load_turned(grad_x + z_begin, turned_z_row, chunk, d, S, U, L, NC, 1, True)
                tl.debug_barrier()  # before any thread writes over it
                if NORM:
                    x = rounded_pairs(straight(segments_of(read_from, h, G, Q, SPLIT), S), h.dtype).to(tl.float32)
                    if WEIGHTS:
                        unit = rounded_pairs(x * norm_rstd[None, :, None], h.dtype)
                        gg = over_all_tokens(gy.to(tl.float32) * unit.to(tl.float32), M, KM)
                        accumulate(part + NORM_AT, chunk, gg, fresh, m, U, NC)
                    gx = rounded_pairs(norm_rstd[None, :, None] * tl.fma(-norm_slope[None, :, None], x, gx), h.dtype)
                    gx = turned(gx, S)
                acc = mixed_segments(read_to, gx, tl.zeros([G * S, H, BD], tl.float32), SPLIT)
                if READ_DYNAMIC:
                    acc = unprojected(
                        read_f, acc, packed, dynamic_read, read_gain, chunk, READ_AT, 0, A, m, M, KM, d, S, U, L, NC
                    )
                    acc = sloped(read_slope, h, acc, SPLIT)
                    if WEIGHTS:
                        gw = straight(segments_of(read_w, h, G, KM, SPLIT), S)
                        accumulate(part + OF_READ, chunk, gw, fresh, m, U, NC)
                # rounded as if the read had stored it, so that fused and separate agree to the bit
                g = rounded(straight(acc, S), h.dtype)
                if grad_state is not None:
                    given = load_rows(grad_state + begin, row, chunk, d, S, U, L, NC, G)
                    g = rounded_sum(given, g)
            else:
                g = load_rows(grad_state + begin, row, chunk, d, S, U, L, NC, G)
            if WRITE:
                h = held(load_rows(state + begin, row, chunk, d, S, U, L, NC, G, True), tokens, SPLIT)
                zc = load_rows(z + z_begin, z_row, chunk, d, S, U, L, NC, 1, True)
                carry_grad = product_across(h, g, carry_grad, SPLIT)
                beta_grad = product_across(g, each_group(zc, G), beta_grad, SPLIT)
            if READ or not WRITE:
                store_rows(of_state + begin, row, there, chunk, g, d, S, U, L, NC, G)

        if WRITE:
            # loaded again, but for tanh, as there are no registers to keep them in
            carry, carry_t, carry_s = coefficients(
                carry_p, write_rstd, static_alpha, scale_alpha, left, TAU, m, A, 1, n, N, n, N, WRITE_DYNAMIC, carry_t
            )
            beta, beta_t, beta_s = coefficients(
                beta_p, write_rstd, static_beta, scale_beta, left, TAU, 0, 1, n, m, M, n, N, WRITE_DYNAMIC, beta_t
            )
            carry_grad = own(over_pieces(carry_grad, G), left, KN, N, n, n, N, True)
            beta_grad = own(over_pieces(beta_grad, G), left, KM, M, m, n, N, False)
            if WEIGHTS:
                accumulate_matrix(matrices, carry_grad, fresh)
                accumulate_matrix(beta_matrices, beta_grad, fresh)
            if WRITE_DYNAMIC:
                if WEIGHTS:
                    accumulate_matrix(matrices + R * KN, carry_grad, fresh, carry_t)
                    accumulate_matrix(beta_matrices + R * KM, beta_grad, fresh, beta_t)
                factor, slope = through_routing(carry_grad, carry_p, write_rstd, carry_t, carry_s, TAU, d)
                carry_f, carry_w = factors(factor, S, SPLIT), transposed_operands(factor, S, SPLIT)
                if WEIGHTS and APART:
                    store_factors(kept, factor, first, left, 0, KN + KM, n, N, SPLIT)
                factor, beta_slope = through_routing(beta_grad, beta_p, write_rstd, beta_t, beta_s, TAU, d)
                beta_f, beta_w = factors(factor, S, SPLIT), transposed_operands(factor, S, SPLIT)
                if WEIGHTS and APART:
                    store_factors(kept, factor, first, left, KN, KN + KM, n, N, SPLIT)
                write_slope = slopes(slope + beta_slope, S, SPLIT)
            if H >= 64:  # made again, as there are no registers to keep it in
                turned_row, _ = places_of(again(turned_rows(R, S, U)), first, tokens, n, N, BT)
            carry_from = operands(block_diagonal(carry, H, N, N, True), S, SPLIT)
            beta_from = transposed_operands(block_diagonal(beta, E, M, N, False), S, SPLIT)
            tl.debug_barrier()  # as above
            for chunk in tl.range(NC):
                g = load_turned((of_state if READ else grad_state) + begin, turned_row, chunk, d, S, U, L, NC, G, True)
                tl.debug_barrier()  # before any thread writes over it
                gz = rounded_pairs(straight(segments_of(beta_from, g, G, Q, SPLIT), S), g.dtype)
                store_rows(of_z + z_begin, z_row, z_there, chunk, gz, d, S, U, L, NC, 1)
                acc = mixed(carry_from, g, tl.zeros([G * S, H, BD], tl.float32), SPLIT)
                if WRITE_DYNAMIC:
                    h = load_turned(state + begin, turned_row, chunk, d, S, U, L, NC, G, True)
                    acc = unprojected(
                        carry_f, acc, packed, dynamic_alpha, write_gain, chunk, 0, m, A, n, N, KN, d, S, U, L, NC
                    )
                    acc = unprojected(
                        beta_f, acc, packed, dynamic_beta, write_gain, chunk, KN, 0, m, m, M, KM, d, S, U, L, NC
                    )
                    acc = sloped(write_slope, h, acc, SPLIT)
                    if WEIGHTS and not APART:
                        gw = straight(segments_of(carry_w, h, G, KN, SPLIT), S)
                        accumulate(part, chunk, gw, fresh, n, U, NC)
                        gw = straight(segments_of(beta_w, h, G, KM, SPLIT), S)
                        accumulate(part + KN * WIDTH, chunk, gw, fresh, m, U, NC)
                store_rows(of_state + begin, row, there, chunk, straight(acc, S), d, S, U, L, NC, G)
        tl.debug_barrier()  # the next tile reads what other threads wrote of this one
