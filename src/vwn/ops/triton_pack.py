"""The projections of a boundary as its kernels load them: transposed, times the gain of the norm, ready to multiply.

A row per column of a projection (``KN`` for the slots and ``KM`` for the segments of a write, ``KM`` of a read, see
:mod:`vwn.ops.triton_tiles`), ``WIDTH`` long, which is ``d`` up to whole chunks, zero where there is nothing; its
columns are as :func:`vwn.ops.triton_tiles.column_at` has them. In float32, or, where the state is in bfloat16, in two
halves of bfloat16, one after the other. Every tile takes all of it, so it is made once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vwn.ops.triton_routing import (
    projection,
)
from vwn.ops.triton_tiles import (
    column_at,
)

BC = tl.constexpr(32)


@triton.jit
def store_packed(
    packed,
    weight,
    gain,
    AT: tl.constexpr,
    FIRST: tl.constexpr,
    STRIDE: tl.constexpr,
    COUNT: tl.constexpr,
    PADDED: tl.constexpr,
    K: tl.constexpr,
    d: tl.constexpr,
    S: tl.constexpr,
    U: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Store ``BC`` columns of what comes after ``AT`` other columns of projections."""
    ROWS: tl.constexpr = 2 * K if SPLIT else K
    r, c = tl.arange(0, ROWS)[:, None], (tl.program_id(0) * BC + tl.arange(0, BC))[None, :]
    w = projection(weight, gain, r, column_at(c, S, U), FIRST, STRIDE, COUNT, PADDED, K, d, SPLIT)
    tl.store(packed + ((AT * (ROWS // K) + r) * WIDTH + c), w, mask=c < WIDTH)


@triton.jit
def pack(
    packed,
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
    KN: tl.constexpr,
    KM: tl.constexpr,
    S: tl.constexpr,
    U: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    WRITE_DYNAMIC: tl.constexpr,
    READ_DYNAMIC: tl.constexpr,
):
    """Fill ``packed``."""
    A: tl.constexpr = m + n
    if WRITE_DYNAMIC:
        store_packed(packed, dynamic_alpha, write_gain, 0, m, A, n, N, KN, d, S, U, WIDTH, SPLIT)
        store_packed(packed, dynamic_beta, write_gain, KN, 0, m, m, M, KM, d, S, U, WIDTH, SPLIT)
    if READ_DYNAMIC:
        at: tl.constexpr = WRITE_DYNAMIC * (KN + KM)
        store_packed(packed, dynamic_read, read_gain, at, 0, A, m, M, KM, d, S, U, WIDTH, SPLIT)
