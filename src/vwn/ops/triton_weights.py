"""The gradients of a write's projections as one product over all tokens, where a tile's would be too large to add up.

``(W_g)ᵀ`` has the gradient ``Σ F Hᵀ``: over all slots of all tokens, the rows of ``H`` (``[T n, d]``), each times its
row of ``F``, the gradient of what was projected (``[T n, KN + KM]``: of carry and beta). The backward keeps ``F``, in
float32, or, where the state is in bfloat16, in two halves of bfloat16. Each program takes some columns of ``H`` and a
share of the rows, and has a part of its own for :mod:`vwn.ops.triton_sums`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vwn.ops.triton_tiles import (
    dot,
    far,
    halves,
)
from vwn.ops.triton_tuning import UNFUSED

BR = tl.constexpr(64)
BK = tl.constexpr(64)
"""Rows, and columns of carry and beta, at a time."""
PROGRAMS = 264
"""About so many; a constant, so that sums are the same on every GPU: two for each of the 132 processors of an H100."""
OPTIONS = {"num_warps": 4, "num_stages": 3, **UNFUSED}
"""Tensor cores take whole groups of four warps, and what comes next is loaded meanwhile."""


def options(KN: int, split: bool) -> dict[str, Any]:
    """How it is launched: of 8 columns in bfloat16 nothing is loaded ahead.

    Tensor cores multiply them in another way than those of beta, and of rows that both take, Triton 3.7 loads the next
    ones to where a product may still be reading.
    """
    return OPTIONS | {"num_stages": 1} if KN < 16 and split else OPTIONS


@triton.jit
def store_factors(
    kept,
    f,
    first,
    left,
    AT: tl.constexpr,
    WIDTH: tl.constexpr,
    n: tl.constexpr,
    N: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Keep ``f``, ``[G, H, K]`` of the tile from token ``first`` on, as columns from ``AT`` of ``WIDTH``."""
    H: tl.constexpr = f.shape[1]
    row = tl.arange(0, f.shape[0])[:, None, None] * H + tl.arange(0, H)[None, :, None]
    there = (row % N < n) & (row // N < left)
    k = tl.arange(0, f.shape[2])[None, None, :]
    if SPLIT:
        kept += far(first, 2 * n * WIDTH)
        high, low = halves(f, tl.bfloat16)
        places = (row // N * n + row % N) * (2 * WIDTH) + 2 * AT + k
        tl.store(kept + places, high, mask=there & (k >= 0))
        tl.store(kept + places + f.shape[2], low, mask=there & (k >= 0))
    else:
        kept += far(first, n * WIDTH)
        tl.store(kept + (row // N * n + row % N) * WIDTH + AT + k, f, mask=there & (k >= 0))


@triton.jit
def added(acc, h, kept, there, SECOND: tl.constexpr, SPLIT: tl.constexpr):
    """``acc + h @ F``, ``[BC, BR] x [BR, K] -> [BC, K]``; ``kept``: where ``F`` is, its second half ``SECOND`` on.

    Without a ``SECOND``, ``F`` has one half or both side by side.
    """
    h = tl.reshape(h, [1, h.shape[0], h.shape[1]])
    result = tl.reshape(acc, [1, acc.shape[0], acc.shape[1]])
    f = tl.load(kept, mask=there, other=0.0)
    f = tl.reshape(f, [1, f.shape[0], f.shape[1]])
    if SPLIT:
        result = dot(h, f, result, "ieee")
        if SECOND:
            f = tl.load(kept + SECOND, mask=there, other=0.0)
            result = dot(h, tl.reshape(f, [1, f.shape[0], f.shape[1]]), result, "ieee")
    else:
        result = dot(h.to(tl.float32), f, result, "tf32x3")
    return tl.reshape(result, [acc.shape[0], acc.shape[1]])


@triton.jit
def store_part(part, acc, c, k, WIDTH: tl.constexpr):
    """``[BC, K]`` as rows ``k`` of a part."""
    tl.store(part + (k[:, None] * WIDTH + c[None, :]), tl.trans(acc), mask=(c < WIDTH)[None, :] & (k >= 0)[:, None])


@triton.jit(do_not_specialize=["rows", "share"])
def over_rows(
    state,
    kept,
    parts,
    rows,
    share,
    d: tl.constexpr,
    KN: tl.constexpr,
    KM: tl.constexpr,
    WIDTH: tl.constexpr,
    BC: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """A part of the gradients of carry's and beta's projections, ``[KN + KM, WIDTH]``, over ``share`` of the rows."""
    K: tl.constexpr = KN if KN < BK else BK
    B: tl.constexpr = KM if KM < BK else BK
    HALVES: tl.constexpr = 2 if SPLIT else 1
    ROW: tl.constexpr = HALVES * (KN + KM)
    SIDE: tl.constexpr = 2 if SPLIT and KM == 8 else 1  # halves of beta, for tensor cores multiply 16
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    k, b = tl.program_id(2) * K + tl.arange(0, K), tl.minimum(tl.program_id(2), KM // B - 1) * B
    begin = tl.program_id(1).to(tl.int64) * share
    state, kept = state + begin * d, kept + begin * ROW
    carry, beta = tl.zeros([BC, K], tl.float32), tl.zeros([BC, SIDE * B], tl.float32)
    left = tl.minimum(rows - begin, share).to(tl.int32)
    for first in tl.range(0, left, BR):
        r = first + tl.arange(0, BR)
        there = (r < left)[:, None]
        row = r.to(tl.int64)[:, None]
        h = tl.trans(tl.load(state + (row * d + c[None, :]), mask=there & (c < d)[None, :], other=0.0))
        carry = added(carry, h, kept + (row * ROW + k[None, :]), there, (HALVES - 1) * KN, SPLIT)
        of_beta = kept + (row * ROW + HALVES * KN + b + tl.arange(0, SIDE * B)[None, :])
        beta = added(beta, h, of_beta, there, (HALVES - SIDE) * KM, SPLIT)
    part = parts + tl.program_id(1).to(tl.int64) * ((KN + KM) * WIDTH)
    store_part(part, carry, c, k, WIDTH)
    if tl.program_id(2) < KM // B:
        both = tl.sum(tl.reshape(beta, [BC, SIDE, B]), axis=1)
        store_part(part + KN * WIDTH, both, c, b + tl.arange(0, B), WIDTH)


def columns(split: bool) -> int:
    """That a program takes: in other dtypes than bfloat16 its products take more registers."""
    return 128 if split else 64


def grid(rows: int, d: int, KN: int, split: bool) -> tuple[int, int, int]:
    """Programs over columns, shares of the rows, and columns of carry and beta."""
    blocks, projected = -(-d // columns(split)), -(-KN // BK.value)
    return blocks, min(-(-rows // BR.value), max(1, PROGRAMS // (blocks * projected))), projected


def gradients(state: Tensor, kept: Tensor, rows: int, sizes: dict[str, int], split: bool) -> tuple[Tensor, int]:
    """The parts, and how many there are, for one row or more; ``sizes``: of :func:`vwn.ops.triton.tiling`."""
    programs = grid(rows, sizes["d"], sizes["KN"], split)
    shares = programs[1]
    parts = state.new_empty(shares, (sizes["KN"] + sizes["KM"]) * sizes["WIDTH"], dtype=torch.float32)
    over_rows[programs](
        *(state, kept, parts, rows, -(-rows // (shares * BR.value)) * BR.value),
        **{name: sizes[name] for name in ("d", "KN", "KM", "WIDTH")},
        BC=columns(split),
        SPLIT=split,
        **options(sizes["KN"], split),
    )
    return parts, shares
