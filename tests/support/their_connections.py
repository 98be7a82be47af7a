"""Layouts of the package `hyper-connections`, as test_against_hyper_connections.py tells them."""

from __future__ import annotations

from hyper_connections.hyper_connections import HyperConnections
from torch import Tensor


def columns(streams: int, fractions: int) -> tuple[list[int], list[int]]:
    """Which of the package's columns are our read columns and our carry columns, in our order."""
    read = [f * (1 + streams) for f in range(fractions)]
    carry = [f * (1 + streams) + 1 + s for s in range(streams) for f in range(fractions)]
    return read, carry


def slot_rows(streams: int, fractions: int) -> list[int]:
    """The package's row, `f * streams + s`, of each of our slots."""
    return [f * streams + s for s in range(streams) for f in range(fractions)]


def run_theirs(theirs: HyperConnections, state: Tensor, sublayer) -> Tensor:
    """`[B, T, D']` slot-major through the package, whose streams lie along the batch: `[B * streams, T, D]`."""
    batch, tokens, _ = state.shape
    streams = state.unflatten(-1, (theirs.num_residual_streams, -1)).movedim(2, 1).flatten(0, 1)
    x, add_residual = theirs(streams)
    out = add_residual(sublayer(x))
    return out.reshape(batch, theirs.num_residual_streams, tokens, -1).movedim(1, 2).flatten(2)
