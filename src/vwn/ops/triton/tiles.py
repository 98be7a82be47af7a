"""The parts that the forward and the backward kernel share: routing matrices and small matrix products.

Names, here and in the kernels. A program works on tiles of ``BT`` tokens, and on ``BD`` columns of them at a time:

==========  ===========================================================================================
``T``       tokens
``n, N``    slots, and the next power of two
``m, M``    segments, and the next power of two (16 or more from 16 slots on, for tensor cores)
``d, BD``   width of a slot or segment (``D / m``), and columns taken at a time
``BT``      tokens of a tile; ``BT * N`` is at least 16
``t, c``    indices of tokens ``[BT]`` and of columns ``[BD]``
``h``       a chunk of the state ``H'``, ``[BT, N, BD]``, float32
``z``       a chunk of the sublayer's output ``Z``, ``[BT, M, BD]``, float32
``x``       a chunk of what is read, ``X``, ``[BT, M, BD]``, float32
``carry``   ``Â``, ``[BT, N, N]``: column ``j`` makes new slot ``j``
``beta``    ``Bᵀ``, ``[BT, N, M]``: row ``j`` makes new slot ``j``
``routing`` ``Å``, ``[BT, N, M]``: column ``k`` makes segment ``k``
``squares`` sum of squares of each slot, ``[BT, N]``
``rstd``    one over the root mean square of each slot, ``[BT, N]``
``logits``  what ``tanh`` takes: ``h W rstd / τ``, with the norm's gain multiplied into ``W``
==========  ===========================================================================================

What lies beyond ``T``, ``n``, ``m`` or ``d`` is loaded as zero and never stored. The weights are float32, in the layout
of :mod:`vwn.ops.weights`; the kernels get them as these named tuples.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile(t, c, T, count: tl.constexpr, COUNT: tl.constexpr, d: tl.constexpr):
    """Return offsets and mask of columns ``c`` of a ``[T, count * d]`` tensor, as ``[BT, COUNT, BD]``."""
    i = tl.arange(0, COUNT)[None, :, None]
    t, c = t.to(tl.int64)[:, None, None], c[None, None, :]
    return (t * count + i) * d + c, (t < T) & (i < count) & (c < d)


@triton.jit
def matrix(row, column, rows, columns, row_stride: tl.constexpr, column_stride: tl.constexpr):
    """Return offsets and mask of a small matrix."""
    offsets = row[:, None] * row_stride + column[None, :] * column_stride
    return offsets, (row < rows)[:, None] & (column < columns)[None, :]


@triton.jit
def load_matrix(pointer, row, column, rows, columns, row_stride: tl.constexpr, column_stride: tl.constexpr):
    """Load a small matrix; zero outside of it."""
    offsets, mask = matrix(row, column, rows, columns, row_stride, column_stride)
    return tl.load(pointer + offsets, mask, 0.0)


@triton.jit
def store_tile(pointer, value, t, c, T, count: tl.constexpr, COUNT: tl.constexpr, d: tl.constexpr):
    """Store ``[BT, COUNT, BD]``, rounded to the tensor's dtype."""
    offsets, mask = tile(t, c, T, count, COUNT, d)
    tl.store(pointer + offsets, value.to(pointer.dtype.element_ty), mask)


@triton.jit
def load_tile(pointer, t, c, T, count: tl.constexpr, COUNT: tl.constexpr, d: tl.constexpr):
    """Load columns ``c`` of a ``[T, count * d]`` tensor as float32 ``[BT, COUNT, BD]``."""
    offsets, mask = tile(t, c, T, count, COUNT, d)
    return tl.load(pointer + offsets, mask, 0.0).to(tl.float32)


# Small matrix products, one for each token. From 16 slots on they go to tensor cores, which want 16 rows and columns.


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """Compute ``a b`` on tensor cores: ``[BT, I, K], [BT, K, J] -> [BT, I, J]``."""
    if a.shape[0] == 1:  # as plain matrices the compiler spreads them over the warps better
        a, b = tl.reshape(a, (a.shape[1], a.shape[2])), tl.reshape(b, (b.shape[1], b.shape[2]))
        result = tl.dot(a, b, input_precision=PRECISION)[None, :, :]
    else:
        result = tl.dot(a, b, input_precision=PRECISION)
    return result


@triton.jit
def mix_rows(a, x, PRECISION: tl.constexpr):
    """Compute ``aᵀ x`` for each token: ``[BT, I, J], [BT, I, BD] -> [BT, J, BD]``."""
    if a.shape[1] >= 16:
        result = dot(tl.permute(a, (0, 2, 1)), x, PRECISION)
    else:
        result = tl.sum(a[:, :, :, None] * x[:, :, None, :], 1)
    return result


@triton.jit
def mix_columns(a, x, PRECISION: tl.constexpr):
    """Compute ``a x`` for each token: ``[BT, I, J], [BT, J, BD] -> [BT, I, BD]``."""
    if a.shape[1] >= 16:
        result = dot(a, x, PRECISION)
    else:
        result = tl.sum(a[:, :, :, None] * x[:, None, :, :], 2)
    return result


@triton.jit
def products(x, y, PRECISION: tl.constexpr):
    """Compute ``x yᵀ`` for each token: ``[BT, I, BD], [BT, J, BD] -> [BT, I, J]``."""
    if x.shape[1] >= 16:
        result = dot(x, tl.permute(y, (0, 2, 1)), PRECISION)
    else:
        result = tl.sum(x[:, :, None, :] * y[:, None, :, :], 3)
    return result


# Routing: Å, Â and Bᵀ are computed alike (eqs. 12-14), row i from slot i alone


@triton.jit
def project(h, w):
    """Compute ``h W`` for all slots of all tokens: ``[BT, N, BD], [BD, K] -> [BT, N, K]``."""
    rows = tl.reshape(h, (h.shape[0] * h.shape[1], h.shape[2]))
    return tl.reshape(tl.dot(rows, w, input_precision="tf32x3"), (h.shape[0], h.shape[1], w.shape[1]))


@triton.jit
def project_back(grad, w):
    """Compute ``grad Wᵀ`` for all slots of all tokens: ``[BT, N, K], [BD, K] -> [BT, N, BD]``."""
    w = tl.permute(w, (1, 0))
    if w.shape[0] < 16:
        result = tl.sum(grad[:, :, :, None] * w[None, None, :, :], 2)
    else:
        rows = tl.reshape(grad, (grad.shape[0] * grad.shape[1], grad.shape[2]))
        result = tl.reshape(tl.dot(rows, w, input_precision="tf32x3"), (grad.shape[0], grad.shape[1], w.shape[1]))
    return result


@triton.jit
def rsqrt_of_mean(squares, eps, d: tl.constexpr):
    """Compute ``1 / sqrt(squares / d + eps)``; zero for a row of zeros without ``eps``, which only fills a tile."""
    mean = squares / d + eps
    return tl.where(mean > 0, tl.rsqrt(mean), 0.0)


@triton.jit
def tanh(x):
    """Compute ``tanh(x)``, to a float32's accuracy beside one."""
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def routing_of(
    state, t, T, w, first: tl.constexpr, count: tl.constexpr, COUNT: tl.constexpr, WRITES: tl.constexpr,
    DYNAMIC: tl.constexpr, n: tl.constexpr, m: tl.constexpr, d: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Compute ``count`` columns of ``A`` from ``first`` on, ``Å`` or ``Â``, from the state; to write also ``Bᵀ``.

    Returns:
        alpha ``[BT, N, COUNT]``, beta ``[BT, N, M]``, what ``tanh`` took for each of them, and ``rstd``; what is not
        computed is zero: the last three for a static routing, those of beta for a read.
    """
    i, j, k = tl.arange(0, N), tl.arange(0, COUNT), tl.arange(0, M)
    alpha_logits = tl.zeros((BT, N, COUNT), tl.float32)
    beta_logits = tl.zeros((BT, N, M), tl.float32)
    squares, rstd = tl.zeros((BT, N), tl.float32), tl.zeros((BT, N), tl.float32)
    alpha = alpha_logits + load_matrix(w.bias_alpha + first, i, j, n, count, m + n, 1)[None, :, :]
    beta = beta_logits
    if WRITES:
        beta += load_matrix(w.bias_beta, i, k, n, m, 1, n)[None, :, :]
    if DYNAMIC:
        for start in range(0, d, BD):
            c = start + tl.arange(0, BD)
            h = load_tile(state, t, c, T, n, N, d)
            gain = tl.load(w.slot_norm + c, c < d, 0.0)[:, None]
            squares += tl.sum(h * h, 2)
            alpha_logits += project(h, gain * load_matrix(w.dynamic_alpha + first, c, j, d, count, m + n, 1))
            if WRITES:
                beta_logits += project(h, gain * load_matrix(w.dynamic_beta, c, k, d, m, m, 1))
        rstd = rsqrt_of_mean(squares, w.eps, d)
        alpha_logits *= rstd[:, :, None] * d**-0.5  # tau = sqrt(d)
        beta_logits *= rstd[:, :, None] * d**-0.5
        alpha += load_matrix(w.scale_alpha + first, i, j, n, count, m + n, 1)[None, :, :] * tanh(alpha_logits)
        if WRITES:
            beta += load_matrix(w.scale_beta, i, k, n, m, 1, n)[None, :, :] * tanh(beta_logits)
    return alpha, beta, alpha_logits, beta_logits, rstd


@triton.jit
def store_new(
    new, state, z, carry, beta, t, T, n: tl.constexpr, m: tl.constexpr, d: tl.constexpr, N: tl.constexpr,
    M: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the new state ``Âᵀ H' + Bᵀ Z`` (eq. 10)."""
    for first in range(0, d, BD):
        c = first + tl.arange(0, BD)
        h, z_c = load_tile(state, t, c, T, n, N, d), load_tile(z, t, c, T, m, M, d)
        h = mix_rows(carry, h, PRECISION) + mix_columns(beta, z_c, PRECISION)
        store_tile(new, h, t, c, T, n, N, d)
    tl.debug_barrier()  # what one thread has stored another one loads
