"""Sizes of tiles that :func:`triton.autotune` chooses among, once for each shape, dtype and process."""

from __future__ import annotations

import os
from typing import Any

import torch
import triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


FORWARD_SIZES = ((64, 32, 4), (32, 64, 4), (64, 64, 8))
"""``(rows, columns, warps)``: a tile has the tokens that make up ``rows`` slots, or one, and ``columns`` at a time."""
BACKWARD_SIZES = ((32, 32, 4), (64, 32, 8))


def every(sizes: tuple[tuple[int, int, int], ...]) -> list[triton.Config]:
    """Return the configurations of these sizes."""
    return [triton.Config({"ROWS": r, "BD": c}, num_warps=w, num_stages=1) for r, c, w in sizes]


# The interpreter cannot time configurations, so it gets one of each.
FORWARD = every(FORWARD_SIZES[: 1 if INTERPRETED else None])
BACKWARD = every(BACKWARD_SIZES[: 1 if INTERPRETED else None])
KEY = ["n", "m", "d", "WRITE", "READ", "NORM", "WRITE_DYNAMIC", "READ_DYNAMIC", "FEW"]
"""Arguments on which the choice depends, beside the dtypes."""


def first_if_deterministic(configs: list[triton.Config], *_: Any, **__: Any) -> list[triton.Config]:
    """Keep one tile where torch must be deterministic: the order of a sum, and so its bits, depend on the tile."""
    return configs[:1] if torch.are_deterministic_algorithms_enabled() else configs
