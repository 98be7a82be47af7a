"""The routing of a boundary in its Triton kernels: projections of the slots, coefficients, and what mixes rows by them.

See :mod:`vwn.ops.triton_tiles` for the shapes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vwn.ops.triton_tiles import (
    column_at,
    columns_of,
    dot,
    dot_across,
    each_group,
    halves,
    in_order,
    in_turned_order,
    over_pieces,
    product,
    product_across,
    spread,
    tile_rows,
    together,
    turned_columns_of,
    turned_rows,
    widened,
)

# Projections


@triton.jit
def projection(
    weight,
    gain,
    r,
    c,
    FIRST: tl.constexpr,
    STRIDE: tl.constexpr,
    COUNT: tl.constexpr,
    PADDED: tl.constexpr,
    K: tl.constexpr,
    d: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Columns ``FIRST + r % K % PADDED`` of a projection times the gain of the norm, zero from ``COUNT`` and ``d`` on.

    ``SPLIT``: as bfloat16, for ``r`` from ``K`` on what is missing in the first ``K``.
    """
    j = r % K % PADDED
    w = tl.load(weight + (c * STRIDE + FIRST + j), mask=(j < COUNT) & (c < d), other=0.0)
    w = w * tl.load(gain + c, mask=c < d, other=0.0)
    if SPLIT:
        high, low = halves(w, tl.bfloat16)
        w = tl.where(r < K, high, low)
    return w


@triton.jit
def load_projection(
    packed,
    weight,
    gain,
    chunk,
    AT: tl.constexpr,
    FIRST: tl.constexpr,
    STRIDE: tl.constexpr,
    COUNT: tl.constexpr,
    PADDED: tl.constexpr,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
    d: tl.constexpr,
    S: tl.constexpr,
    U: tl.constexpr,
    L: tl.constexpr,
    NC: tl.constexpr,
    TURNED: tl.constexpr = False,
    HALF: tl.constexpr = -1,
):
    """A chunk of the transposed projection times the gain, ``[S, K, U L]`` in float32, or ``[S, 2 K, U L]``: halves.

    ``packed``: where :mod:`vwn.ops.triton_pack` put it, after ``AT`` other columns, or ``None``. ``TURNED``: with rows
    and columns as :func:`vwn.ops.triton_tiles.load_turned` has them. ``HALF``: this one alone, if it is 0 or 1.
    """
    ROWS: tl.constexpr = 2 * K if SPLIT and HALF < 0 else K
    if S == 1:
        r, c = tl.arange(0, ROWS)[:, None], chunk * (U * L) + tl.arange(0, U * L)[None, :]
        if packed is None:
            c = column_at(c, S, U)
    elif TURNED:
        r = turned_rows(ROWS, S, U)
        c = turned_columns_of(chunk, r.shape[0], S, U, L, NC)
    else:
        r = tile_rows(ROWS, S, U)
        c = columns_of(chunk, r.shape[0], S, U, L, NC)
    if HALF > 0:
        r += HALF * K
    if packed is not None:
        row = AT * (2 if SPLIT else 1) + r // K * K + r % K % PADDED  # of columns that are repeated, the first
        w = tl.load(packed + (row * (S * U * L * NC) + c))
    else:
        w = projection(weight, gain, r, c, FIRST, STRIDE, COUNT, PADDED, K, d, SPLIT)
    if S == 1:
        w = tl.reshape(w, [1, ROWS, U * L])
    elif TURNED:
        w = in_turned_order(w, 1, S, U)
    else:
        w = in_order(w, 1, S, U)
    return w


@triton.jit
def projected(h, w, acc, SPLIT: tl.constexpr):
    """``acc + h @ w``ᵀ for ``w`` as :func:`load_projection` returns it; its halves side by side."""
    w = each_group(w, h.shape[0] // w.shape[0])
    if SPLIT:
        acc = dot_across(h, w, acc, "ieee")
    else:
        acc = dot_across(widened(h), w, acc, "tf32x3")
    return acc


@triton.jit
def over_halves(x, G: tl.constexpr, K: tl.constexpr):
    """``[G S, I, K or 2 K] -> [G, I, K]``: sums over the halves of a projection and the pieces."""
    if x.shape[2] > K:
        x = tl.sum(tl.reshape(x, [x.shape[0], x.shape[1], 2, K]), axis=2)
    return over_pieces(x, G)


@triton.jit
def factors(f, S: tl.constexpr, SPLIT: tl.constexpr):
    """``[G, H, K]`` as :func:`unprojected` takes it."""
    if SPLIT:
        high, low = halves(f, tl.bfloat16)
        if f.shape[2] < 16:
            high, low = repeated(high), repeated(low)
        result = spread(high, S), spread(low, S)
    elif f.shape[2] == 8:
        both = spread(beside(f, tl.zeros_like(f)), S)
        result = both, both
    else:
        result = operands(f, S, SPLIT)
    return result


@triton.jit
def unprojected(
    f,
    acc,
    packed,
    weight,
    gain,
    chunk,
    AT: tl.constexpr,
    FIRST: tl.constexpr,
    STRIDE: tl.constexpr,
    COUNT: tl.constexpr,
    PADDED: tl.constexpr,
    K: tl.constexpr,
    d: tl.constexpr,
    S: tl.constexpr,
    U: tl.constexpr,
    L: tl.constexpr,
    NC: tl.constexpr,
):
    """``acc + f @ w`` for ``f`` as :func:`factors` and ``w`` as :func:`load_projection` loads it, turned."""
    SPLIT: tl.constexpr = f[0].dtype == tl.bfloat16
    APART: tl.constexpr = SPLIT and K >= 16
    G: tl.constexpr = acc.shape[0] // S
    if APART:  # low times low is less than halves are exact to
        w = load_projection(
            packed, weight, gain, chunk, AT, FIRST, STRIDE, COUNT, PADDED, K, SPLIT, d, S, U, L, NC, True, 1
        )
        acc = dot(f[0], each_group(w, G), acc, "ieee")
    HIGH: tl.constexpr = 0 if APART else -1
    w = load_projection(
        packed, weight, gain, chunk, AT, FIRST, STRIDE, COUNT, PADDED, K, SPLIT, d, S, U, L, NC, True, HIGH
    )
    if f[0].shape[2] > w.shape[1]:
        w = twice(w)
    return mixed(f, each_group(w, G), acc, SPLIT)


# Routing


@triton.jit
def tanh(x):
    """To a millionth; a polynomial, the best of its degree, keeps small arguments exact to float32."""
    s = x * x
    series = tl.fma(x * s, tl.fma(s, tl.fma(s, -0.04998708, 0.13310652), -0.33332962), x)
    r = tl.rsqrt(1 + tl.exp2(x * 2.8853900817779268))  # 2 / log 2; a square root is one instruction, a division many
    return tl.where(s < 0.1, series, tl.fma(-2 * r, r, 1.0))


@triton.jit
def squared(h, gram, SPLIT: tl.constexpr):
    """``gram``, ``[G S H / W, W, W]``, and all products of two of ``W`` rows of a group.

    A matrix product adds up in one order, a sum over a row in one that depends on where the row came from: a state just
    computed would not get the same bits as one that was read.
    """
    if gram.shape[1] != h.shape[1]:
        h = tl.reshape(h, [gram.shape[0], gram.shape[1], h.shape[2]])
    return product_across(h, h, gram, SPLIT)


@triton.jit
def rms_reciprocal(gram, eps, d: tl.constexpr, G: tl.constexpr, H: tl.constexpr):
    """``1 / rms`` of each row, ``[G, H]``, of what :func:`squared` has added up."""
    W: tl.constexpr = gram.shape[1]
    i = tl.arange(0, W)
    squares = tl.sum(tl.where(i[None, :, None] == i[None, None, :], gram, 0.0), axis=2)
    squares = tl.sum(tl.reshape(squares, [G, gram.shape[0] * W // (G * H), H]), axis=1)
    return tl.rsqrt(tl.maximum(squares / d + eps, 1e-37))  # finite where there is no slot and eps is zero


@triton.jit
def coefficients(
    p,
    rstd,
    static,
    scale,
    left,
    TAU: tl.constexpr,
    FIRST: tl.constexpr,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
    COUNT: tl.constexpr,
    PADDED: tl.constexpr,
    n: tl.constexpr,
    N: tl.constexpr,
    DYNAMIC: tl.constexpr,
    known=None,
):
    """Columns of the routing (eqs. 12-14) and what their backward needs again.

    Args:
        p: projection of the slots before the norm, ``[G, H, K]``.
        rstd: of the slots, ``[G, H]``.
        static: where the static part of ``(i, j)`` is, at ``FIRST + i ROW + j COLUMN``; likewise ``scale``.
        left: tokens from the first of the tile on.
        COUNT: of columns; they are repeated every ``PADDED``.
        known: tanh, if it was kept.

    Returns:
        the coefficients, tanh and the scale, ``[G, H, K]``, all zero where there is no such slot or column.
    """
    H: tl.constexpr = p.shape[1]
    row = tl.arange(0, p.shape[0])[:, None, None] * H + tl.arange(0, H)[None, :, None]
    i, j = row % N, tl.arange(0, p.shape[2])[None, None, :] % PADDED
    meet = (i < n) & (row // N < left) & (j < COUNT)
    places = FIRST + i * ROW + j * COLUMN
    c = tl.load(static + places, mask=meet, other=0.0)
    s, t = c, c
    if DYNAMIC:
        s = tl.load(scale + places, mask=meet, other=0.0)
        if known is None:
            t = tl.where(meet, tanh(p * (rstd / TAU)[:, :, None]), 0.0)
        else:
            t = known
        c = tl.fma(s, t, c)
    return c, t, s


@triton.jit
def block_diagonal(x, WIDTH: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr, GROUPED: tl.constexpr):
    """``[G, H, K] -> [G, H, WIDTH]``: columns repeated, and zero but for the ``BLOCK`` of a row's own token.

    ``GROUPED``: each group has columns of its own.
    """
    G: tl.constexpr = x.shape[0]
    H: tl.constexpr = x.shape[1]
    K: tl.constexpr = x.shape[2]
    if WIDTH > K:
        x = tl.broadcast_to(x[:, :, None, :], [G, H, WIDTH // K, K])
        x = tl.reshape(x, [G, H, WIDTH])
    row = tl.arange(0, H)[None, :, None]
    if not GROUPED:
        row += tl.arange(0, G)[:, None, None] * H
    return tl.where(row // N == tl.arange(0, WIDTH)[None, None, :] // BLOCK, x, 0.0)


@triton.jit
def own(
    x,
    left,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    n: tl.constexpr,
    N: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """``[G, H, WIDTH] -> [G, H, K]``: of a row the ``BLOCK`` columns of its own token, ``COUNT`` of which are there."""
    G: tl.constexpr = x.shape[0]
    H: tl.constexpr = x.shape[1]
    WIDTH: tl.constexpr = x.shape[2]
    row = tl.arange(0, H)[None, :, None]
    all_rows = row + tl.arange(0, G)[:, None, None] * H
    column = tl.arange(0, WIDTH)[None, None, :]
    meet = (row if GROUPED else all_rows) // N == column // BLOCK
    meet = meet & (row % N < n) & (all_rows // N < left) & (column % BLOCK < COUNT)
    x = tl.where(meet, x, 0.0)
    if WIDTH > BLOCK:
        x = tl.sum(tl.reshape(x, [G, H, WIDTH // BLOCK, BLOCK]), axis=2)
    if K > BLOCK:
        x = tl.reshape(tl.broadcast_to(x[:, :, None, :], [G, H, K // BLOCK, BLOCK]), [G, H, K])
        x = tl.where(tl.arange(0, K)[None, None, :] < BLOCK, x, 0.0)
    return x


@triton.jit
def over_tokens(x, PADDED: tl.constexpr):
    """For each row the sum over the rows of its token, ``[ROWS] -> [ROWS]``."""
    tokens: tl.constexpr = x.shape[0] // PADDED
    total = tl.sum(tl.reshape(x, [tokens, PADDED]), axis=1)
    return tl.reshape(tl.broadcast_to(total[:, None], [tokens, PADDED]), [x.shape[0]])


# Mixing


@triton.jit
def repeated(x):
    """``[I, J, K] -> [I, J, 2 K]``."""
    twice = tl.broadcast_to(x[:, :, None, :], [x.shape[0], x.shape[1], 2, x.shape[2]])
    return tl.reshape(twice, [x.shape[0], x.shape[1], 2 * x.shape[2]])


@triton.jit
def beside(a, b):
    """``[I, J, K]`` twice ``-> [I, J, 2 K]``.

    Not by ``tl.join``, of which the compiler makes out that tensor cores are to have four rows side by side.
    """
    second = tl.arange(0, 2)[None, None, :, None] == 1
    return tl.reshape(tl.where(second, b[:, :, None, :], a[:, :, None, :]), [a.shape[0], a.shape[1], 2 * a.shape[2]])


@triton.jit
def mixed(a, x, acc, SPLIT: tl.constexpr):
    """``acc + a @ x``, ``[G S, I, K] x [G S, K, BD]``; ``a`` as :func:`operands` has it."""
    if SPLIT:
        acc = dot(a[0], x, dot(a[1], x, acc, "ieee"), "ieee")
    else:
        acc = product(a[0], x, acc, SPLIT)
    return acc


@triton.jit
def operands(x, S: tl.constexpr, SPLIT: tl.constexpr):
    """Routing ``[G, I, K]`` for every piece of a row, as two bfloat16, or twice as it is."""
    if SPLIT:
        high, low = halves(x, tl.bfloat16)
    else:
        high, low = x, x
    return spread(high, S), spread(low, S)


@triton.jit
def segment_operands(x, S: tl.constexpr, SPLIT: tl.constexpr):
    """As :func:`operands`; of 8 segments both parts side by side, for tensor cores multiply 16."""
    if x.shape[2] == 8:
        if SPLIT:
            high, low = halves(x, tl.bfloat16)
        else:
            high, low = x, tl.zeros_like(x)
        result = (spread(beside(high, low), S),)
    else:
        result = operands(x, S, SPLIT)
    return result


@triton.jit
def mixed_segments(a, z, acc, SPLIT: tl.constexpr):
    """``acc + a @ z`` for segments ``z``, ``[S, Q, BD]``; ``a`` as :func:`segment_operands` has it.

    Of 8 segments ``z`` may have 16 rows: each of them twice.
    """
    G: tl.constexpr = acc.shape[0] // z.shape[0]
    if len(a) == 1:
        z = each_group(twice(z) if z.shape[1] == 8 else z, G)
        acc = dot(a[0], z, acc, "ieee") if SPLIT else product(a[0], z, acc, SPLIT)
    else:
        acc = mixed(a, each_group(z, G), acc, SPLIT)
    return acc


@triton.jit
def twice(x):
    """``[S, Q, BD] -> [S, 2 Q, BD]``."""
    x = tl.broadcast_to(x[:, None, :, :], [x.shape[0], 2, x.shape[1], x.shape[2]])
    return tl.reshape(x, [x.shape[0], 2 * x.shape[2], x.shape[3]])


@triton.jit
def transposed_operands(x, S: tl.constexpr, SPLIT: tl.constexpr):
    """The transpose of routing ``[G, H, Q]``, ``[S, Q, G H]``, as :func:`operands`; of 8 segments both parts in one."""
    R: tl.constexpr = x.shape[0] * x.shape[1]
    x = tl.reshape(tl.permute(x, [2, 0, 1]), [1, x.shape[2], R])
    if SPLIT and x.shape[1] == 8:
        high, low = halves(x, tl.bfloat16)
        second = tl.arange(0, 2)[None, :, None, None] == 1
        result = (spread(tl.reshape(tl.where(second, low[:, None, :, :], high[:, None, :, :]), [1, 16, R]), S),)
    else:
        result = operands(x, S, SPLIT)
    return result


@triton.jit
def segments_of(a, h, G: tl.constexpr, Q: tl.constexpr, SPLIT: tl.constexpr):
    """``a @ h`` for slots ``h``, ``[S, Q, BD]`` in float32; ``a`` as :func:`transposed_operands` has it.

    Of 8 segments, rows from 8 on are zero.
    """
    h = together(h, G)
    S: tl.constexpr = h.shape[0]
    BD: tl.constexpr = h.shape[2]
    if len(a) == 1:
        both = dot(a[0], h, tl.zeros([S, 16, BD], tl.float32), "ieee")
        x = tl.sum(tl.reshape(both, [S, 2, 8, BD]), axis=1)
        if Q > 8:
            first = tl.arange(0, Q // 8)[None, :, None, None] == 0
            x = tl.reshape(tl.where(first, x[:, None, :, :], 0.0), [S, Q, BD])
    else:
        x = mixed(a, h, tl.zeros([S, Q, BD], tl.float32), SPLIT)
    return x
