"""The forward of a boundary as one Triton kernel: write, read, or both, and the reading sublayer's norm.

One program takes one tile of ``BT`` tokens (see :mod:`vwn.ops.triton_tiles` for the shapes). It holds all chunks of its
columns (``KEEP``), or, where they are too many, reads again what it read or wrote: it is still in a cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vwn.ops.triton_routing import (
    block_diagonal,
    coefficients,
    load_projection,
    mixed,
    mixed_segments,
    operands,
    over_halves,
    over_tokens,
    projected,
    rms_reciprocal,
    segment_operands,
    segments_of,
    squared,
    transposed_operands,
)
from vwn.ops.triton_tiles import (
    far,
    held,
    load_rows,
    load_turned,
    places_of,
    rounded,
    rounded_pairs,
    rows_of,
    store_rows,
    straight,
    swapped,
    turned_rows,
)


@triton.jit(do_not_specialize=["tokens"])
def boundary(
    state,
    z,
    new_state,
    x_out,
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
    KEEP: tl.constexpr,
    SPLIT: tl.constexpr,
    WRITE: tl.constexpr,
    WRITE_DYNAMIC: tl.constexpr,
    READ: tl.constexpr,
    READ_DYNAMIC: tl.constexpr,
    NORM: tl.constexpr,
):
    """``H' <- Bᵀ Z + Âᵀ H'`` and ``X = Åᵀ H'`` (eq. 10); see :func:`vwn.ops.reference.forward`."""
    first = tl.program_id(0) * BT
    left = tokens - first
    tl.assume(left > 0)
    G: tl.constexpr = R // H
    PARTS: tl.constexpr = 2 if SPLIT else 1
    L: tl.constexpr = BD // U
    A: tl.constexpr = m + n
    W: tl.constexpr = 16 if H < 64 or U > 1 else 64  # as many as tensor cores take at a time without copying
    READ_AT: tl.constexpr = WRITE_DYNAMIC * (KN + KM)
    row, there = rows_of(first, tokens, n, N, R, BT, S, U)
    z_row, z_there = rows_of(first, tokens, m, M, Q, BT, S, U)
    turned_row, _ = places_of(turned_rows(R, S, U), first, tokens, n, N, BT)
    turned_z_row, _ = places_of(turned_rows(Q, S, U), first, tokens, m, M, BT)
    begin, z_begin = far(first, n * d), far(first, m * d)
    state += begin

    if WRITE:
        z += z_begin
        new_state += begin
        gram = tl.zeros([G * S * H // W, W, W], tl.float32)
        carry_p = tl.zeros([G * S, H, KN * PARTS], tl.float32)
        beta_p = tl.zeros([G * S, H, KM * PARTS], tl.float32)
        if WRITE_DYNAMIC:
            for chunk in (tl.static_range if KEEP else tl.range)(NC):
                h = held(load_rows(state, row, chunk, d, S, U, L, NC, G, True), tokens, SPLIT)
                gram = squared(h, gram, SPLIT)
                w = load_projection(packed, dynamic_alpha, write_gain, chunk, 0, m, A, n, N, KN, SPLIT, d, S, U, L, NC)
                carry_p = projected(h, w, carry_p, SPLIT)
                w = load_projection(packed, dynamic_beta, write_gain, chunk, KN, 0, m, m, M, KM, SPLIT, d, S, U, L, NC)
                beta_p = projected(h, w, beta_p, SPLIT)
        rstd = rms_reciprocal(gram, write_eps, d, G, H)
        carry, _, _ = coefficients(
            over_halves(carry_p, G, KN), rstd, static_alpha, scale_alpha, left, TAU, m, A, 1, n, N, n, N, WRITE_DYNAMIC
        )
        beta, _, _ = coefficients(
            over_halves(beta_p, G, KM), rstd, static_beta, scale_beta, left, TAU, 0, 1, n, m, M, n, N, WRITE_DYNAMIC
        )
        carry = operands(swapped(block_diagonal(carry, H, N, N, True)), S, SPLIT)
        beta = segment_operands(block_diagonal(beta, E, M, N, False), S, SPLIT)

    gram = tl.zeros([G * S * H // W, W, W], tl.float32)
    read_p = tl.zeros([G * S, H, KM * PARTS], tl.float32)
    fresh = ()
    for chunk in (tl.static_range if KEEP else tl.range)(NC):
        if WRITE:
            h = load_turned(state, turned_row, chunk, d, S, U, L, NC, G, True)
        else:
            h = held(load_rows(state, row, chunk, d, S, U, L, NC, G), tokens, SPLIT)
        if WRITE:
            acc = mixed(carry, h, tl.zeros([G * S, H, BD], tl.float32), SPLIT)
            acc = mixed_segments(beta, load_turned(z, turned_z_row, chunk, d, S, U, L, NC, 1), acc, SPLIT)
            h = rounded(straight(acc, S), h.dtype)
            store_rows(new_state, row, there, chunk, h, d, S, U, L, NC, G)
        if READ and KEEP:
            fresh += (h,)  # type: ignore[assignment]
        if READ and READ_DYNAMIC:
            gram = squared(h, gram, SPLIT)
            w = load_projection(packed, dynamic_read, read_gain, chunk, READ_AT, 0, A, m, M, KM, SPLIT, d, S, U, L, NC)
            read_p = projected(h, w, read_p, SPLIT)

    if READ:
        x_out += z_begin
        rstd = rms_reciprocal(gram, read_eps, d, G, H)
        read, _, _ = coefficients(
            over_halves(read_p, G, KM), rstd, static_read, scale_read, left, TAU, 0, A, 1, m, M, n, N, READ_DYNAMIC
        )
        read = transposed_operands(block_diagonal(read, E, M, N, False), S, SPLIT)
        if not KEEP:
            tl.debug_barrier()  # other threads wrote what is read next
        squares = tl.zeros([S, Q, BD], tl.float32)
        inputs = ()
        for chunk in (tl.static_range if KEEP else tl.range)(NC):
            if KEEP:
                x = segments_of(read, fresh[chunk], G, Q, SPLIT)
            else:
                h = load_turned(new_state if WRITE else state, turned_row, chunk, d, S, U, L, NC, G)
                x = straight(segments_of(read, h, G, Q, SPLIT), S)
            x = rounded_pairs(x, state.dtype.element_ty)
            if NORM:
                wide = x.to(tl.float32)
                squares = tl.fma(wide, wide, squares)
            if NORM and KEEP:
                inputs += (x,)  # type: ignore[assignment]
            else:
                store_rows(x_out, z_row, z_there, chunk, x, d, S, U, L, NC, 1)
        if NORM:
            rstd = tl.rsqrt(over_tokens(tl.sum(tl.sum(squares, axis=2), axis=0), M) / (m * d) + norm_eps)
            if not KEEP:
                tl.debug_barrier()
            gain_row = rows_of(0, BT, m, M, Q, BT, S, U)[0] % m
            for chunk in (tl.static_range if KEEP else tl.range)(NC):
                if KEEP:
                    x = inputs[chunk]
                else:
                    x = load_rows(x_out, z_row, chunk, d, S, U, L, NC, 1)
                    tl.debug_barrier()  # before any thread writes over it
                unit = rounded(x.to(tl.float32) * rstd[None, :, None], x.dtype)
                gain = load_rows(norm_gain, gain_row, chunk, d, S, U, L, NC, 1)
                x = rounded(unit.to(tl.float32) * gain.to(tl.float32), x.dtype)
                store_rows(x_out, z_row, z_there, chunk, x, d, S, U, L, NC, 1)
