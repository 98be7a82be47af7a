"""What the kernels of a boundary share: tiles of rows, and products on tensor cores.

A tile holds ``BT`` tokens. Shapes: ``R = BT N`` rows of slots (``N``: ``n`` up to a power of two) in ``G`` groups of
``H``, ``Q`` rows of segments (``M``: ``m`` up to a power of two), and the segment width ``d`` in ``S`` pieces, one for
each warp, of ``NC`` chunks of ``BD`` columns. A chunk of all pieces is ``[S, rows, BD]``, that of the slots
``[G S, H, BD]``. What mixes the rows of a group is block-diagonal: a row and a column meet only where they belong to
the same token. Projections have ``KN`` columns for the slots and ``KM`` for the segments, 8 or more, repeated if fewer.

A chunk is loaded 16 bytes of a row at a time, ``L`` columns in each of ``U`` units, and its columns are taken in the
order (:func:`in_order`) in which what a thread loads is what it hands to the tensor cores: nothing passes through
shared memory on the way, there or back. For a product that sums over rows it is loaded in another order
(:func:`load_turned`) for the same reason.

A token with rows for all warps (``H`` from 64 on) has one piece (``S = 1``): each warp has 16 of its rows in such an
order, and what is summed over rows passes through shared memory. So do the projections, which are packed in that order
(:func:`column_at`). A chunk shorter than 64 columns, and one of another dtype than bfloat16, has the plain order there
(``U = 1``). Of ``E = 8`` segments both halves are multiplied at once, also where ``Q`` is 16.
"""

from __future__ import annotations

import triton
import triton.language as tl

EMULATE = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether Triton's interpreter runs the kernels: it multiplies the bits of bfloat16 and rounds towards zero."""


# Products


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """``x`` in another dtype, to nearest, ties to even."""
    if EMULATE and tl.bfloat16 == DTYPE and x.dtype != DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        y = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(DTYPE)
    return y


@triton.jit
def rounded_pairs(x, DTYPE: tl.constexpr):
    """As :func:`rounded`, for what is next computed with: one by one the conversion takes four times as long."""
    if EMULATE or tl.bfloat16 != DTYPE:
        y = rounded(x, DTYPE)
    else:
        convert: tl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;"
        y = tl.inline_asm_elementwise(convert, "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2)
    return y


@triton.jit
def rounded_sum(a, b):
    """``a + b``, of one dtype, rounded once."""
    if EMULATE or a.dtype != tl.bfloat16:
        y = rounded(a.to(tl.float32) + b.to(tl.float32), a.dtype)
    else:  # two at a time, and, said to be impure, once for all uses
        add: tl.constexpr = "{.reg .b32 one; mov.b32 one, 0x3f803f80; fma.rn.bf16x2 $0, $1, one, $2;}"
        y = tl.inline_asm_elementwise(add, "=r,r,r", [a, b], dtype=tl.bfloat16, is_pure=False, pack=2)
    return y


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b``: ``[S, I, K] x [S, K, J] -> [S, I, J]`` in float32; ``a`` and ``b`` of one dtype."""
    if EMULATE:  # in float32 a matrix product of NumPy's would depend on where a column is
        wide = tl.dot(a.to(tl.float64), b.to(tl.float64), acc.to(tl.float64), out_dtype=tl.float64)
        result = wide.to(tl.float32)
    elif a.shape[0] == 1:  # in two dimensions the warps share out the result
        flat = tl.dot(
            tl.reshape(a, [a.shape[1], a.shape[2]]),
            tl.reshape(b, [b.shape[1], b.shape[2]]),
            tl.reshape(acc, [acc.shape[1], acc.shape[2]]),
            input_precision=PRECISION,
        )
        result = tl.reshape(flat, [1, acc.shape[1], acc.shape[2]])
    else:
        result = tl.dot(a, b, acc, input_precision=PRECISION)
    return result


@triton.jit
def dot_across(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b``ᵀ: ``[S, I, K] x [S, J, K] -> [S, I, J]``, as :func:`dot`."""
    if a.shape[0] == 1 and not EMULATE:  # transposed when it is flat already, which costs nothing
        flat = tl.dot(
            tl.reshape(a, [a.shape[1], a.shape[2]]),
            tl.trans(tl.reshape(b, [b.shape[1], b.shape[2]])),
            tl.reshape(acc, [acc.shape[1], acc.shape[2]]),
            input_precision=PRECISION,
        )
        result = tl.reshape(flat, [1, acc.shape[1], acc.shape[2]])
    else:
        result = dot(a, swapped(b), acc, PRECISION)
    return result


@triton.jit
def again(x):
    """``x`` (int32 or float32), but what is made of it is made again where it is used, not kept in registers."""
    if EMULATE:
        y = x
    elif x.dtype == tl.int32:
        y = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1)
    else:
        y = tl.inline_asm_elementwise("mov.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=False, pack=1)
    return y


@triton.jit
def widened(x):
    """``x`` in float32, for a product in TF32, which would add up in another order if it saw 16 bits being loaded."""
    y = x.to(tl.float32)
    if x.dtype != tl.float32:
        y = again(y)
    return y


@triton.jit
def halves(x, DTYPE: tl.constexpr):
    """Float32 as the sum of two of a shorter dtype, nearly."""
    high = rounded_pairs(x, DTYPE)
    return high, rounded_pairs(x - high.to(tl.float32), DTYPE)


@triton.jit
def product(a, b, acc, SPLIT: tl.constexpr):
    """``acc + a @ b`` to the accuracy of float32, where each is in float32 or in the stored dtype.

    A bfloat16 number is exact on tensor cores and a float32 number is nearly the sum of two (``SPLIT``: the stored
    dtype is bfloat16). The other dtypes take three products in TF32.
    """
    if not SPLIT:
        result = dot(a.to(tl.float32), b.to(tl.float32), acc, "tf32x3")
    elif a.dtype == tl.float32:
        high, low = halves(a, b.dtype)
        result = dot(high, b, dot(low, b, acc, "ieee"), "ieee")
    else:
        high, low = halves(b, a.dtype)
        result = dot(a, high, dot(a, low, acc, "ieee"), "ieee")
    return result


@triton.jit
def product_across(a, b, acc, SPLIT: tl.constexpr):
    """``acc + a @ b``ᵀ as :func:`product`, where both are in the stored dtype."""
    if SPLIT:
        result = dot_across(a, b, acc, "ieee")
    else:
        result = dot_across(widened(a), widened(b), acc, "tf32x3")
    return result


@triton.jit
def spread(x, S: tl.constexpr):
    """``[G, I, J] -> [G S, I, J]``: the same for every piece of a row."""
    if S > 1:
        G: tl.constexpr = x.shape[0]
        x = tl.broadcast_to(x[:, None, :, :], [G, S, x.shape[1], x.shape[2]])
        x = tl.reshape(x, [G * S, x.shape[2], x.shape[3]])
    return x


@triton.jit
def each_group(x, G: tl.constexpr):
    """``[S, I, J] -> [G S, I, J]``: the same for every group of rows."""
    if G > 1:
        S: tl.constexpr = x.shape[0]
        x = tl.broadcast_to(x[None, :, :, :], [G, S, x.shape[1], x.shape[2]])
        x = tl.reshape(x, [G * S, x.shape[2], x.shape[3]])
    return x


@triton.jit
def together(x, G: tl.constexpr):
    """``[G S, H, J] -> [S, G H, J]``: all rows of a tile."""
    if G > 1:
        S: tl.constexpr = x.shape[0] // G
        x = tl.permute(tl.reshape(x, [G, S, x.shape[1], x.shape[2]]), [1, 0, 2, 3])
        x = tl.reshape(x, [S, G * x.shape[2], x.shape[3]])
    return x


@triton.jit
def swapped(x):
    """``[S, I, J] -> [S, J, I]``."""
    return tl.permute(x, [0, 2, 1])


@triton.jit
def pinned(x):
    """``x``, shared out among all threads once: what it is made of is not made again for each use."""
    if not EMULATE:
        x = tl.gather(x, tl.broadcast_to(tl.arange(0, x.shape[2])[None, None, :], x.shape), axis=2)
    return x


@triton.jit
def over_pieces(x, G: tl.constexpr):
    """Sums over the pieces, ``[G S, I, J] -> [G, I, J]``."""
    if x.shape[0] > G:
        x = pinned(tl.sum(tl.reshape(x, [G, x.shape[0] // G, x.shape[1], x.shape[2]]), axis=1))
    return x


# Chunks


@triton.jit
def in_order(x, G: tl.constexpr, S: tl.constexpr, U: tl.constexpr):
    """``[G E U S 8, L] -> [G S, 8 E, U L]``, columns in the order of tensor cores: of 8 of a thread, pairs.

    Rows are in the order of :func:`tile_rows`. Of one piece the first pairs of all units come first.
    """
    E: tl.constexpr = x.shape[0] // (G * U * S * 8)
    L: tl.constexpr = x.shape[1]
    if S > 1:
        x = tl.reshape(x, [G, E, U, S, 8, 4, 2, 2, 2])
        x = tl.permute(x, [0, 3, 1, 4, 2, 6, 7, 5, 8])
    elif U > 1 and E % 8 == 0:
        x = tl.reshape(x, [U, E // 8, 2, 4, 8, 4, 2, 2, 2])
        x = tl.permute(x, [1, 3, 2, 4, 6, 7, 0, 5, 8])
    elif U > 1:
        x = tl.reshape(x, [E, U, 8, 4, 2, 2, 2])
        x = tl.permute(x, [0, 2, 4, 5, 1, 3, 6])
    return tl.reshape(x, [G * S, 8 * E, U * L])


@triton.jit
def out_of_order(x, G: tl.constexpr, S: tl.constexpr, U: tl.constexpr):
    """The inverse of :func:`in_order`."""
    E: tl.constexpr = x.shape[1] // 8
    L: tl.constexpr = x.shape[2] // U
    if S > 1:
        x = tl.permute(tl.reshape(x, [G, S, E, 8, U, 2, 2, 4, 2]), [0, 2, 4, 1, 3, 7, 5, 6, 8])
    elif U > 1 and E % 8 == 0:
        x = tl.permute(tl.reshape(x, [E // 8, 4, 2, 8, 2, 2, U, 4, 2]), [6, 0, 2, 1, 3, 7, 4, 5, 8])
    elif U > 1:
        x = tl.permute(tl.reshape(x, [E, 8, 2, 2, U, 4, 2]), [0, 4, 1, 5, 2, 3, 6])
    return tl.reshape(x, [G * E * U * S * 8, L])


@triton.jit
def column_at(place, S: tl.constexpr, U: tl.constexpr):
    """The column that is at a ``place`` of a row: of one piece in the order of :func:`in_order`, else the same."""
    c = place
    if S == 1 and U > 1:
        c = place // (32 * U) * (32 * U) + place // 8 % U * 32 + place // 2 % 4 * 8
        c += place % (32 * U) // (8 * U) * 2 + place % 2
    return c


@triton.jit
def columns_of(chunk, COUNT: tl.constexpr, S: tl.constexpr, U: tl.constexpr, L: tl.constexpr, NC: tl.constexpr):
    """Columns of a chunk, ``[COUNT, L]``, ``U`` times ``L`` of each piece; a warp's chunks lie side by side."""
    i = tl.arange(0, COUNT)[:, None]
    if S == 1 and U > 1 and COUNT // U % 64 == 0:
        unit = i // (COUNT // U)
    else:
        unit = i // (8 * S) % U
    return (((i // 8 % S) * NC + chunk) * U + unit) * L + tl.arange(0, L)[None, :]


@triton.jit
def tile_rows(ROWS: tl.constexpr, S: tl.constexpr, U: tl.constexpr):
    """Rows of a tile beside :func:`columns_of`, ``[ROWS S U, 1]``: for a warp 8 rows of its piece, then the next 8.

    Of one piece warps share out the rows, 16 each, or the columns, if rows are too few for all. In two dimensions, not
    in one for each of these, because in what order those are given out to threads depends on the version of Triton.
    """
    i = tl.arange(0, ROWS * S * U)[:, None]
    if S == 1 and U > 1 and ROWS % 64 == 0:
        r = i % ROWS // 64 * 64 + i // 8 % 4 * 16 + i // 32 % 2 * 8 + i % 8
    else:
        r = i // (8 * S * U) * 8 + i % 8
    return r


@triton.jit
def rows_of(
    first,
    tokens,
    COUNT: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BT: tl.constexpr,
    S: tl.constexpr,
    U: tl.constexpr,
):
    """Of the rows of a tile whose first token is ``first``: place after the tile's first, and whether there is such a
    row, as :func:`tile_rows`. The place of one that is not is another's, so that it can be loaded unasked.
    """
    return places_of(tile_rows(ROWS, S, U), first, tokens, COUNT, PADDED, BT)


@triton.jit
def places_of(r, first, tokens, COUNT: tl.constexpr, PADDED: tl.constexpr, BT: tl.constexpr):
    """As :func:`rows_of`, of rows ``r``."""
    token = r // PADDED
    index = r % PADDED
    last = tl.minimum(tokens - first, BT) - 1
    there = (index < COUNT) & (token <= last)
    return tl.minimum(token, last) * COUNT + tl.minimum(index, COUNT - 1), there


@triton.jit
def far(first, SIZE: tl.constexpr):
    """``first SIZE`` in 64 bits: where the first token of a tile is. What is in a tile takes 32."""
    return first * tl.full([], SIZE, tl.int64)


@triton.jit
def load_rows(
    base,
    row,
    chunk,
    d: tl.constexpr,
    S: tl.constexpr,
    U: tl.constexpr,
    L: tl.constexpr,
    NC: tl.constexpr,
    G: tl.constexpr,
    AGAIN: tl.constexpr = False,
):
    """A chunk of the given rows, ``[G S, ROWS / G, U L]``; zero beyond ``d``.

    ``AGAIN``: it is loaded more than once, so the first-level cache is to keep it; else that is left to the weights.
    """
    MODIFIER: tl.constexpr = "" if AGAIN else ".cg"
    c = columns_of(chunk, row.shape[0], S, U, L, NC)
    if d == S * U * L * NC:
        x = tl.load(base + (row * d + c), cache_modifier=MODIFIER)
    else:
        x = tl.load(base + (row * d + c), mask=(row >= 0) & (c < d), other=0.0, cache_modifier=MODIFIER)
    return in_order(x, G, S, U)


@triton.jit
def turned_rows(ROWS: tl.constexpr, S: tl.constexpr, U: tl.constexpr):
    """As :func:`tile_rows`, for :func:`load_turned`: of 32 threads four have each a row of 8, and then the next row."""
    if S > 1:
        V: tl.constexpr = (U + 1) // 2
        i = tl.arange(0, ROWS * S * V * 8)[:, None]
        r = i // (64 * S * V) * 8 + i % 4 * 2 + i // (32 * S * V) % 2
    else:
        r = tile_rows(ROWS, S, U)
    return r


@triton.jit
def turned_columns_of(chunk, COUNT: tl.constexpr, S: tl.constexpr, U: tl.constexpr, L: tl.constexpr, NC: tl.constexpr):
    """As :func:`columns_of`, for :func:`load_turned`: of 32 threads an eighth has 8 side by side, or 4."""
    if S > 1:
        V: tl.constexpr = (U + 1) // 2
        i = tl.arange(0, COUNT)[:, None]
        c = i // (32 * S) % V * 64 + i // 8 % 4 * 8 + i // 4 % 2 * (32 if U > 1 else 4)
        c += ((i // 32 % S) * NC + chunk) * (U * L) + tl.arange(0, 8 if U > 1 else 4)[None, :]
    else:
        c = columns_of(chunk, COUNT, S, U, L, NC)
    return c


@triton.jit
def in_turned_order(x, G: tl.constexpr, S: tl.constexpr, U: tl.constexpr):
    """What :func:`turned_rows` and :func:`turned_columns_of` have as ``[G S, ROWS / G, U L]``."""
    if S > 1:
        V: tl.constexpr = (U + 1) // 2
        E: tl.constexpr = x.shape[0] // (2 * G * S * V * 32)
        C: tl.constexpr = x.shape[1]
        x = tl.permute(tl.reshape(x, [G, E, 2, V, S, 8, 4, C]), [0, 4, 1, 6, 2, 3, 7, 5])
        x = tl.reshape(x, [G * S, E * 8, V * 8 * C])
    else:
        x = in_order(x, G, S, U)
    return x


@triton.jit
def load_turned(
    base,
    row,
    chunk,
    d: tl.constexpr,
    S: tl.constexpr,
    U: tl.constexpr,
    L: tl.constexpr,
    NC: tl.constexpr,
    G: tl.constexpr,
    AGAIN: tl.constexpr = False,
):
    """As :func:`load_rows`, for a product that sums over rows: what a thread has is its part of that.

    For that it has the same columns of two rows side by side. The columns are in an order of their own, and so are
    those of the product: :func:`straight` brings them back.
    """
    MODIFIER: tl.constexpr = "" if AGAIN else ".cg"
    c = turned_columns_of(chunk, row.shape[0], S, U, L, NC)
    if d == S * U * L * NC:
        x = tl.load(base + (row * d + c), cache_modifier=MODIFIER)
    else:
        x = tl.load(base + (row * d + c), mask=(row >= 0) & (c < d), other=0.0, cache_modifier=MODIFIER)
    return in_turned_order(x, G, S, U)


@triton.jit
def straight(x, S: tl.constexpr):
    """Columns of a product with what :func:`load_turned` has loaded, in the order of :func:`load_rows`."""
    J: tl.constexpr = x.shape[2]
    if S > 1:
        if J > 32:
            y = tl.permute(tl.reshape(x, [x.shape[0], x.shape[1], J // 64, 2, 2, 2, 4, 2]), [0, 1, 2, 7, 3, 4, 6, 5])
        else:
            y = tl.permute(tl.reshape(x, [x.shape[0], x.shape[1], 2, 2, 4, 2]), [0, 1, 5, 2, 4, 3])
        x = tl.reshape(y, [x.shape[0], x.shape[1], J])
    return x


@triton.jit
def turned(x, S: tl.constexpr):
    """The inverse of :func:`straight`."""
    J: tl.constexpr = x.shape[2]
    if S > 1:
        if J > 32:
            y = tl.permute(tl.reshape(x, [x.shape[0], x.shape[1], J // 64, 2, 2, 2, 4, 2]), [0, 1, 2, 4, 5, 7, 6, 3])
        else:
            y = tl.permute(tl.reshape(x, [x.shape[0], x.shape[1], 2, 2, 4, 2]), [0, 1, 3, 5, 4, 2])
        x = tl.reshape(y, [x.shape[0], x.shape[1], J])
    return x


@triton.jit
def held(x, tokens, SPLIT: tl.constexpr):
    """A chunk that was loaded, as tensor cores want it in registers: else it is copied there for each product."""
    if SPLIT and not EMULATE:
        zero = (tokens >> 31).to(tl.int16).to(tl.bfloat16, bitcast=True)  # which the compiler does not know
        x = tl.inline_asm_elementwise("or.b32 $0, $1, $2;", "=r,r,r", [x, zero], tl.bfloat16, is_pure=True, pack=2)
    return x


@triton.jit
def store_rows(
    base,
    row,
    there,
    chunk,
    x,
    d: tl.constexpr,
    S: tl.constexpr,
    U: tl.constexpr,
    L: tl.constexpr,
    NC: tl.constexpr,
    G: tl.constexpr,
):
    """The inverse of :func:`load_rows`, for the rows that are ``there``; rounds to the dtype of ``base``."""
    c = columns_of(chunk, row.shape[0], S, U, L, NC)
    x = rounded(out_of_order(x, G, S, U), base.dtype.element_ty)
    tl.store(base + (row * d + c), x, mask=there & ((c < d) | (d == S * U * L * NC)))
