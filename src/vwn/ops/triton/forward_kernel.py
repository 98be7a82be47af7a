"""The forward kernel: a write, a read, or both, and the reading sublayer's RMSNorm. Names: see :mod:`.tiles`."""

from __future__ import annotations

import triton
import triton.language as tl

from vwn.ops.triton.configs import FORWARD, KEY, first_if_deterministic
from vwn.ops.triton.tiles import load_tile, mix_rows, routing_of, rsqrt_of_mean, store_new, store_tile


@triton.autotune(FORWARD, KEY, prune_configs_by={"early_config_prune": first_if_deterministic})
@triton.jit
def forward(
    state,  # H', [T, n d]
    z,  # Z, [T, m d], or None without a write
    new,  # result: the new state, [T, n d]
    x,  # result: X, [T, m d]
    T,
    write,  # RoutingWeights, or None
    read,  # RoutingWeights without those of B, or None
    norm,  # NormWeights, or None
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
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BD: tl.constexpr,
):
    """Compute ``H' ← Âᵀ H' + Bᵀ Z``, then ``X = Åᵀ H'`` (eq. 10), then the norm of ``X``."""
    BT: tl.constexpr = ROWS // N if ROWS > N else 1
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    if WRITE:
        carry, beta, _, _, _ = routing_of(state, t, T, write, m, n, N, True, WRITE_DYNAMIC, n, m, d, N, M, BT, BD)
        store_new(new, state, z, carry, beta, t, T, n, m, d, N, M, BD, PRECISION)
        state = new
    if READ:
        routing, _, _, _, _ = routing_of(state, t, T, read, 0, m, M, False, READ_DYNAMIC, n, m, d, N, M, BT, BD)
        squares = tl.zeros((BT,), tl.float32)
        for first in range(0, d, BD):
            c = first + tl.arange(0, BD)
            x_c = mix_rows(routing, load_tile(state, t, c, T, n, N, d), PRECISION).to(x.dtype.element_ty)
            squares += tl.sum(tl.sum(x_c.to(tl.float32) * x_c.to(tl.float32), 2), 1)
            store_tile(x, x_c, t, c, T, m, M, d)
        if NORM:
            tl.debug_barrier()  # what one thread has stored another one loads
            rstd = rsqrt_of_mean(squares, norm.eps, m * d)[:, None, None]
            for first in range(0, d, BD):
                c = first + tl.arange(0, BD)
                x_c = (load_tile(x, t, c, T, m, M, d) * rstd).to(x.dtype.element_ty).to(tl.float32)
                weight = load_tile(norm.weight, tl.zeros((1,), tl.int32), c, 1, m, M, d)
                store_tile(x, weight * x_c, t, c, T, m, M, d)
