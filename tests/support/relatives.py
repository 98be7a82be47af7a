"""The relatives of GHC and its doubly-stochastic form, perturbed, and Sinkhorn's scaling by autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import perturb
from vwn import GeneralizedHyperConnection
from vwn.nn.connection import Connection
from vwn.nn.relatives import HyperConnection, ManifoldHyperConnection
from vwn.ops.sinkhorn import to_polytope

STREAMS = {"embedding": "replicated", "reduce": "sum"}
KINDS: dict[str, dict[str, Any]] = {
    "hc": {"connection": "hc", "m": 1, "n": 3, **STREAMS},
    "frac": {"connection": "hc", "m": 3, "n": 3},
    "mhc": {"connection": "mhc", "m": 1, "n": 3, **STREAMS},
    "ghc_ds": {"carry_constraint": "doubly_stochastic", "m": 2, "n": 5},
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def make(kind: str, width: int = 12, index: int = 1, dtype: torch.dtype = torch.float64, **options) -> Connection:
    """Perturbed, of the sizes of :data:`KINDS`."""
    m, n = KINDS[kind]["m"], KINDS[kind]["n"]
    if kind == "mhc":
        connection: Connection = ManifoldHyperConnection(width, n, index, **options)
    elif kind == "ghc_ds":
        connection = GeneralizedHyperConnection(width, m, n, carry_constraint="doubly_stochastic", **options)
    else:
        connection = HyperConnection(width, m, n, index, **options)
    return perturb(connection, seed=m + n).to(dtype)  # pyright: ignore[reportReturnType]


def sinkhorn_by_autograd(logits: Tensor, rounds: int, eps: float, exact: bool) -> Tensor:
    """The matrices themselves rewritten in each round, and PyTorch's own gradient of that."""
    p = torch.softmax(logits, dim=-1) + eps
    p = p / (p.sum(-2, keepdim=True) + eps)
    for _ in range(rounds - 1):
        p = p / (p.sum(-1, keepdim=True) + eps)
        p = p / (p.sum(-2, keepdim=True) + eps)
    return to_polytope(p.movedim((-2, -1), (0, 1))).movedim((0, 1), (-2, -1)) if exact else p
