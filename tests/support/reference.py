"""The method once more, in float64 and plain loops, written from the paper's formulas alone.

Nothing here imports `vwn` or calls a matrix product: every number is spelled out by index, so that a transposed matrix,
a wrong slot order or a missing factor in the library cannot be repeated here by accident. Autograd runs through it,
which gives reference gradients too. Equation numbers are those of arXiv 2511.11238.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Matrix = list[list[Tensor]]  # rows of scalars


def rows(flat: Tensor, count: int) -> Matrix:
    """`flat [count * width]` cut into `count` rows of scalars, the first row first."""
    width = flat.numel() // count
    scalars = list(flat.reshape(-1).unbind(0))
    return [scalars[i * width : (i + 1) * width] for i in range(count)]


def flatten(matrix: Matrix) -> Tensor:
    return torch.stack([number for row in matrix for number in row])


def table(parameter: Tensor) -> Matrix:
    """A two-dimensional parameter as rows of float64 scalars that still carry gradients."""
    return [list(row.unbind(0)) for row in parameter.double().unbind(0)]


def initial_read_carry(m: int, n: int) -> list[list[float]]:
    """Eq. 16, `[I_m I_m 0; 0 0 I_{n-m}]`, block by block."""
    out = [[0.0] * (m + n) for _ in range(n)]
    for i in range(m):
        out[i][i] = 1.0
        out[i][m + i] = 1.0
    for i in range(n - m):
        out[m + i][m + m + i] = 1.0
    return out


def initial_write(m: int, n: int) -> list[list[float]]:
    """Eq. 15: one where `i = j mod m`."""
    return [[1.0 if j % m == i else 0.0 for j in range(n)] for i in range(m)]


def rms_norm(numbers: list[Tensor], gain: list[Tensor] | None, eps: float) -> list[Tensor]:
    mean_square = sum(x * x for x in numbers) / len(numbers)
    root = (mean_square + eps).sqrt()
    return [x / root * (1.0 if gain is None else gain[k]) for k, x in enumerate(numbers)]


def routing(slots: Matrix, parameters: Mapping[str, Tensor], m: int, eps: float) -> tuple[Matrix, Matrix]:
    """`A` (n x (m+n)) and `B` (m x n) of one token, eqs. 10 and 12-14; static where only two parameters are given."""
    n, d = len(slots), len(slots[0])
    A, B = table(parameters["bias_alpha"]), table(parameters["bias_beta"])
    if "dynamic_alpha" not in parameters:
        return A, B
    W_alpha, W_beta = table(parameters["dynamic_alpha"]), table(parameters["dynamic_beta"])
    S_alpha, S_beta = table(parameters["scale_alpha"]), table(parameters["scale_beta"])
    gain = list(parameters["slot_norm"].double().unbind(0))
    tau = math.sqrt(d)
    for slot in range(n):
        normalised = rms_norm(slots[slot], gain, eps)
        for k in range(m + n):
            logit = sum(normalised[c] * W_alpha[c][k] for c in range(d)) / tau
            A[slot][k] = S_alpha[slot][k] * torch.tanh(logit) + A[slot][k]
        for i in range(m):
            logit = sum(normalised[c] * W_beta[c][i] for c in range(d)) / tau
            B[i][slot] = S_beta[i][slot] * torch.tanh(logit) + B[i][slot]
    return A, B


def read(slots: Matrix, A: Matrix, m: int) -> Matrix:
    """Eq. 10: row `k` of `X` is the sum over slots of `A[slot][k]` times the slot."""
    n, d = len(slots), len(slots[0])
    return [[sum(A[i][k] * slots[i][c] for i in range(n)) for c in range(d)] for k in range(m)]


def write(slots: Matrix, Z: Matrix, A: Matrix, B: Matrix) -> Matrix:
    """Eq. 10: the state after the sublayer, `B^T Z + carry^T H'`."""
    n, d, m = len(slots), len(slots[0]), len(Z)
    out = []
    for j in range(n):
        written = [sum(B[i][j] * Z[i][c] for i in range(m)) for c in range(d)]
        carried = [sum(A[i][m + j] * slots[i][c] for i in range(n)) for c in range(d)]
        out.append([w + c for w, c in zip(written, carried, strict=True)])
    return out


def hyper_connection(
    state: Tensor, parameters: Mapping[str, Tensor], m: int, n: int, sublayer: Callable[[Tensor], Tensor], eps: float
) -> dict[str, Tensor]:
    """A whole GHC over `state [..., D']`, token by token: `x`, `state`, `A`, `B` in float64."""
    width = state.shape[-1]
    d = width // n
    collected: dict[str, list[Tensor]] = {"x": [], "state": [], "A": [], "B": []}
    for token in state.double().reshape(-1, width).unbind(0):
        slots = rows(token, n)
        A, B = routing(slots, parameters, m, eps)
        x = flatten(read(slots, A, m))
        z = sublayer(x)
        collected["x"].append(x)
        collected["state"].append(flatten(write(slots, rows(z, m), A, B)))
        collected["A"].append(torch.stack([torch.stack(row) for row in A]))
        collected["B"].append(torch.stack([torch.stack(row) for row in B]))
    lead = state.shape[:-1]
    shapes = {"x": (m * d,), "state": (width,), "A": (n, m + n), "B": (m, n)}
    return {key: torch.stack(values).reshape(*lead, *shapes[key]) for key, values in collected.items()}


def expand(embedding: Tensor, matrix: Tensor) -> Tensor:
    """Factorised embedding: `W_expand e` for `embedding [..., D]`, `matrix [D', D]`."""
    out = []
    for token in embedding.double().reshape(-1, embedding.shape[-1]).unbind(0):
        out.append(
            torch.stack([sum(w * e for w, e in zip(row, token.unbind(0), strict=True)) for row in table(matrix)])
        )
    return torch.stack(out).reshape(*embedding.shape[:-1], matrix.shape[0])


def replicate(embedding: Tensor, m: int, n: int) -> Tensor:
    """Replicated embedding: slot `j` is segment `j mod m`."""
    segments = [embedding[..., i * (embedding.shape[-1] // m) :][..., : embedding.shape[-1] // m] for i in range(m)]
    return torch.cat([segments[j % m] for j in range(n)], dim=-1)


def sum_replicas(state: Tensor, m: int, n: int) -> Tensor:
    """The reduce of Hyper-Connections: segment `i` is the sum of the slots `j` with `j mod m = i`."""
    d = state.shape[-1] // n
    slots = [state[..., j * d : (j + 1) * d] for j in range(n)]
    return torch.cat([sum(slots[j] for j in range(n) if j % m == i) for i in range(m)], dim=-1)


def linear_reduce(state: Tensor, matrix: Tensor, gain: Tensor | None, bias: Tensor | None, kind: str, eps: float):
    """`W_reduce Norm(H'_L)` with groups of size `D = matrix.shape[0]`; `kind` is group_norm, rms_norm or none."""
    D, width = matrix.shape
    out = []
    for token in state.double().reshape(-1, width).unbind(0):
        numbers: list[Tensor] = []
        for start in range(0, width, D):
            group = token[start : start + D]
            if kind == "group_norm":
                group = (group - group.mean()) / (((group - group.mean()) ** 2).mean() + eps).sqrt()
            elif kind == "rms_norm":
                group = group / ((group**2).mean() + eps).sqrt()
            numbers += group.unbind(0)
        if gain is not None:
            numbers = [x * gain.double()[c] for c, x in enumerate(numbers)]
        if bias is not None:
            numbers = [x + bias.double()[c] for c, x in enumerate(numbers)]
        out.append(torch.stack([sum(w * x for w, x in zip(row, numbers, strict=True)) for row in table(matrix)]))
    return torch.stack(out).reshape(*state.shape[:-1], D)


def block_linear(state: Tensor, embedding: Tensor, matrix: Tensor, n: int) -> Tensor:
    """Block-level linear of section 3.4: one `matrix [d, 2d]` on every `state slot || embedding slot`."""
    width = state.shape[-1]
    weights = table(matrix)
    out = []
    pairs = zip(state.double().reshape(-1, width), embedding.double().reshape(-1, width), strict=True)
    for token, other in pairs:
        slots = []
        for left, right in zip(rows(token, n), rows(other, n), strict=True):
            both = left + right
            slots.append([sum(w * x for w, x in zip(row, both, strict=True)) for row in weights])
        out.append(flatten(slots))
    return torch.stack(out).reshape(state.shape)
