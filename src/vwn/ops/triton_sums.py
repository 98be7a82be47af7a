"""Sums of the gradients of the weights: of a program's tiles in its part of a buffer, then of all parts.

Each sum is in one order whatever the GPU. A part (float32) holds

    projections: ``ROWS x WIDTH``, times the gain: as :mod:`vwn.ops.triton_pack` has them, but for the order of columns
    norm:        ``KM x WIDTH``
    matrices:    static and scale of carry, of beta (``R x KN``, ``R x KM``) and of the read (``R x KM``)

The write's projections may be in parts of their own (:mod:`vwn.ops.triton_weights`), rows of ``WIDTH`` in plain order.
Of the columns of a projection, and of the norm's segments, which are padded, only those that are there are written.
Shapes: ``WIDTH`` is ``d`` up to whole chunks, ``A = m + n`` columns of an alpha; ``BC`` columns of the segment width or
``BE`` elements at a time, of ``PB`` parts; see :mod:`vwn.ops.triton_tiles` for those of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vwn.ops.triton_tiles import (
    rounded,
)

BC = tl.constexpr(16)
BE = tl.constexpr(64)


@triton.jit
def place(k, c, WIDTH: tl.constexpr, S: tl.constexpr, U: tl.constexpr):
    """Where column ``c`` of row ``k`` is, ``WIDTH`` columns long: what a thread has of a chunk lies 16 bytes a time."""
    if S > 1 or U > 1:
        block = (k // 8 * 2 + c % 8 // 4) * (WIDTH // 32) + c // 32
        at = block * 128 + k % 8 * 16 + c % 32 // 8 * 4 + c % 4
    else:
        at = k * WIDTH + c
    return at


# Within a program


@triton.jit
def accumulate(part, chunk, x, fresh, COUNT: tl.constexpr, U: tl.constexpr, NC: tl.constexpr):
    """Add the first ``COUNT`` rows of a chunk, ``[S, K, BD]``, to a part; ``fresh``: there is nothing in it yet."""
    S: tl.constexpr = x.shape[0]
    E: tl.constexpr = x.shape[1] // 8
    BD: tl.constexpr = x.shape[2]
    if S > 1 or U > 1:
        if S > 1:
            x = tl.permute(tl.reshape(x, [S, E, 8, U, 2, 2, 4, 2]), [1, 4, 3, 0, 2, 6, 5, 7])
        else:
            x = tl.permute(tl.reshape(x, [E, 8, 2, 2, U, 4, 2]), [0, 2, 4, 1, 5, 3, 6])
        x = tl.reshape(x, [E * 2 * U * S * 8, 16])
        i = tl.arange(0, E * 2 * U * S * 8)[:, None]
        unit = i // (8 * S)
        block = unit // U * (S * NC * U) + ((i // 8 % S) * NC + chunk) * U + unit % U
        places = block * 128 + i % 8 * 16 + tl.arange(0, 16)[None, :]
        there = unit // (2 * U) * 8 + i % 8 < COUNT
    else:
        x = tl.reshape(x, [8 * E, BD])
        places = tl.arange(0, 8 * E)[:, None] * (NC * BD) + chunk * BD + tl.arange(0, BD)[None, :]
        there = tl.arange(0, 8 * E)[:, None] < COUNT
    there = there & (places >= 0)
    tl.store(part + places, tl.load(part + places, mask=there & (fresh == 0), other=0.0) + x, mask=there)


@triton.jit
def over_all_tokens(x, M: tl.constexpr, K: tl.constexpr):
    """Sums over the tokens of a tile, ``[S, Q, BD] -> [S, K, BD]``; the ``M`` segments are repeated."""
    S: tl.constexpr = x.shape[0]
    BD: tl.constexpr = x.shape[2]
    x = tl.sum(tl.reshape(x, [S, x.shape[1] // M, M, BD]), axis=1)
    return tl.reshape(tl.broadcast_to(x[:, None, :, :], [S, K // M, M, BD]), [S, K, BD])


@triton.jit
def accumulate_matrix(sums, x, fresh, times=None):
    """Add ``x`` or ``x times``, ``[G, H, K]``, to ``sums``, in a cache: in registers each warp would have its own."""
    row = tl.arange(0, x.shape[0])[:, None, None] * x.shape[1] + tl.arange(0, x.shape[1])[None, :, None]
    places = row * x.shape[2] + tl.arange(0, x.shape[2])[None, None, :]
    before = tl.load(sums + places, mask=(places >= 0) & (fresh == 0), other=0.0)
    tl.store(sums + places, before + x if times is None else tl.fma(x, times, before))


# Over the parts


@triton.jit
def in_halves(x):
    """The sum over the first axis, ``[P, J] -> [J]``, by halves: in one order, however threads share it out."""
    for _ in tl.static_range(12):  # of up to 4096
        if x.shape[0] > 1:
            x = tl.sum(tl.reshape(x, [2, x.shape[0] // 2, x.shape[1]]), axis=0)
    return tl.reshape(x, [x.shape[1]])


@triton.jit
def total(parts, programs, places, mask, PART: tl.constexpr, PB: tl.constexpr):
    """Sums over the parts at ``places``, ``[I, J]``, always in the same order."""
    result = tl.zeros([places.shape[0], places.shape[1]], tl.float32)
    for p in range(0, programs, PB):
        rows = p + tl.arange(0, PB)
        found = (rows < programs)[:, None, None] & mask[None, :, :]
        offsets = rows.to(tl.int64)[:, None, None] * PART + places[None, :, :]
        x = tl.load(parts + offsets, mask=found, other=0.0)
        x = in_halves(tl.reshape(x, [PB, places.shape[0] * places.shape[1]]))
        result += tl.reshape(x, [places.shape[0], places.shape[1]])
    return result


@triton.jit
def projection(
    parts,
    programs,
    begin,
    c,
    weight,
    gain,
    of_weight,
    FIRST: tl.constexpr,
    STRIDE: tl.constexpr,
    COUNT: tl.constexpr,
    K: tl.constexpr,
    d: tl.constexpr,
    WIDTH: tl.constexpr,
    S: tl.constexpr,
    U: tl.constexpr,
    PART: tl.constexpr,
):
    """Store ``COUNT`` columns of a projection's gradient from ``FIRST``, for rows ``c``; return that of the gain."""
    PB: tl.constexpr = 4096 // (K * c.shape[0]) if K * c.shape[0] < 4096 else 1
    k = tl.arange(0, K)[:, None]
    mask = (k < COUNT) & (c < d)[None, :]
    g = total(parts, programs, begin + place(k, c[None, :], WIDTH, S, U), mask, PART, PB)
    places = c[None, :] * STRIDE + FIRST + k
    tl.store(of_weight + places, g * tl.load(gain + c, mask=c < d, other=0.0)[None, :], mask=mask)
    return in_halves(g * tl.load(weight + places, mask=mask, other=0.0))


@triton.jit
def zero_columns(
    to, c, FIRST: tl.constexpr, COUNT: tl.constexpr, STRIDE: tl.constexpr, K: tl.constexpr, d: tl.constexpr
):
    """Zeros in ``COUNT`` columns from ``FIRST``, for rows ``c``."""
    k = tl.arange(0, K)
    mask = (c < d)[:, None] & (k < COUNT)[None, :]
    tl.store(to + c[:, None] * STRIDE + FIRST + k[None, :], tl.zeros([c.shape[0], K], tl.float32), mask=mask)


@triton.jit
def matrices(
    parts,
    programs,
    begin,
    i,
    j,
    mask,
    e,
    there,
    of_static,
    of_scale,
    K: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    DYNAMIC: tl.constexpr,
    PART: tl.constexpr,
):
    """Store elements ``e`` of static and scale: ``(i, j)`` of ``R x K`` of a part, over its tokens, else zero."""
    PB: tl.constexpr = 4096 // (e.shape[0] * R // N)
    places = begin + (tl.arange(0, R // N)[:, None] * N + i[None, :]) * K + j[None, :]
    g = total(parts, programs, places, mask[None, :], PART, PB)
    tl.store(of_static + e, in_halves(g), mask=there)
    if DYNAMIC:
        g = total(parts, programs, places + R * K, mask[None, :], PART, PB)
        tl.store(of_scale + e, in_halves(g), mask=there)


@triton.jit(do_not_specialize=["programs", "shares"])
def sums(
    parts,
    programs,
    of_write,
    shares,
    of_static_alpha,
    of_static_beta,
    of_dynamic_alpha,
    of_dynamic_beta,
    of_scale_alpha,
    of_scale_beta,
    of_write_gain,
    of_static_read,
    of_dynamic_read,
    of_scale_read,
    of_read_gain,
    of_norm_gain,
    dynamic_alpha,
    dynamic_beta,
    write_gain,
    dynamic_read,
    read_gain,
    n: tl.constexpr,
    m: tl.constexpr,
    d: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    KN: tl.constexpr,
    KM: tl.constexpr,
    S: tl.constexpr,
    U: tl.constexpr,
    WIDTH: tl.constexpr,
    WRITE: tl.constexpr,
    WRITE_DYNAMIC: tl.constexpr,
    READ: tl.constexpr,
    READ_DYNAMIC: tl.constexpr,
    NORM: tl.constexpr,
    APART: tl.constexpr,
    PART: tl.constexpr,
    OF_READ: tl.constexpr,
    NORM_AT: tl.constexpr,
    MATRICES: tl.constexpr,
):
    """Gradients of the weights; the programs are shared out among them (:func:`blocks`).

    ``of_write``: ``shares`` parts of the write's projections (:mod:`vwn.ops.triton_weights`), where they are
    ``APART``; else they are in ``parts`` too.
    """
    A: tl.constexpr = m + n
    COLUMNS: tl.constexpr = (d + BC - 1) // BC
    ALPHA: tl.constexpr = (n * A + BE - 1) // BE
    BETA: tl.constexpr = (n * m + BE - 1) // BE
    block = tl.program_id(0)
    elements = tl.arange(0, BE)

    if WRITE_DYNAMIC:
        if block < COLUMNS:
            c = block * BC + tl.arange(0, BC)
            to, to_beta, at = of_dynamic_alpha, of_dynamic_beta, KN * WIDTH
            of, count = (of_write, shares) if APART else (parts, programs)
            SIZE: tl.constexpr = (KN + KM) * WIDTH if APART else PART
            P: tl.constexpr = 1 if APART else S
            V: tl.constexpr = 1 if APART else U
            dot = projection(of, count, 0, c, dynamic_alpha, write_gain, to, m, A, n, N, d, WIDTH, P, V, SIZE)
            dot += projection(of, count, at, c, dynamic_beta, write_gain, to_beta, 0, m, m, M, d, WIDTH, P, V, SIZE)
            tl.store(of_write_gain + c, dot, mask=c < d)
            zero_columns(of_dynamic_alpha, c, 0, m, A, M, d)
        block -= COLUMNS
    if READ_DYNAMIC:
        if (block >= 0) & (block < COLUMNS):
            c = block * BC + tl.arange(0, BC)
            to = of_dynamic_read
            dot = projection(parts, programs, OF_READ, c, dynamic_read, read_gain, to, 0, A, m, M, d, WIDTH, S, U, PART)
            tl.store(of_read_gain + c, dot, mask=c < d)
            zero_columns(of_dynamic_read, c, m, n, A, N, d)
        block -= COLUMNS
    if WRITE:
        if (block >= 0) & (block < ALPHA):
            e = block * BE + elements
            i, j, there = e // A, e % A, e < n * A
            to, to_scale, at, mask = of_static_alpha, of_scale_alpha, MATRICES, there & (j >= m)
            matrices(parts, programs, at, i, j - m, mask, e, there, to, to_scale, KN, R, N, WRITE_DYNAMIC, PART)
        block -= ALPHA
        if (block >= 0) & (block < BETA):
            e = block * BE + elements
            i, j, there = e % n, e // n, e < n * m
            to, to_scale, at = of_static_beta, of_scale_beta, MATRICES + 2 * R * KN
            matrices(parts, programs, at, i, j, there, e, there, to, to_scale, KM, R, N, WRITE_DYNAMIC, PART)
        block -= BETA
    if READ:
        if (block >= 0) & (block < ALPHA):
            e = block * BE + elements
            i, j, there = e // A, e % A, e < n * A
            to, to_scale, at, mask = (
                of_static_read,
                of_scale_read,
                MATRICES + WRITE * 2 * R * (KN + KM),
                there & (j < m),
            )
            matrices(parts, programs, at, i, j, mask, e, there, to, to_scale, KM, R, N, READ_DYNAMIC, PART)
        block -= ALPHA
    if NORM:  # noqa: SIM102 - known when the kernel is compiled, unlike the next
        if block >= 0:
            e = block * BE + elements
            there = e < m * d
            places = NORM_AT + place(e // d, e % d, WIDTH, S, U)
            g = total(parts, programs, places[None, :], there[None, :], PART, 4096 // BE)
            tl.store(of_norm_gain + e, rounded(tl.reshape(g, [BE]), of_norm_gain.dtype.element_ty), mask=there)


def blocks(sizes: dict[str, int], flags: dict[str, bool]) -> int:
    """How many programs :func:`sums` takes."""
    n, m, d = sizes["n"], sizes["m"], sizes["d"]
    columns, alpha, beta = triton.cdiv(d, BC.value), triton.cdiv(n * (m + n), BE.value), triton.cdiv(n * m, BE.value)
    return (
        (flags["WRITE_DYNAMIC"] + flags["READ_DYNAMIC"]) * columns
        + flags["WRITE"] * (alpha + beta)
        + flags["READ"] * alpha
        + flags["NORM"] * triton.cdiv(m * d, BE.value)
    )
