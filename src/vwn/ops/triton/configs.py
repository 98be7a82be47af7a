"""Sizes of tiles that :func:`triton.autotune` chooses among, once for each shape, dtype and process."""

from __future__ import annotations

import os
from typing import Any

import torch
import triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _configs(*sizes: tuple[int, int, int]) -> list[triton.Config]:
    """One for each ``(rows, columns, warps)``; a tile has as many tokens as make up ``rows`` slots."""
    found = [triton.Config({"ROWS": r, "BD": c}, num_warps=w, num_stages=1) for r, c, w in sizes]
    return found[:1] if INTERPRETED else found  # the interpreter cannot measure


FORWARD = _configs((64, 64, 4), (64, 128, 8), (64, 64, 8), (128, 64, 8))
BACKWARD = _configs((64, 32, 8), (64, 64, 8), (64, 32, 4))
KEY = ["n", "m", "d", "WRITE", "READ", "NORM", "WRITE_DYNAMIC", "READ_DYNAMIC", "FEW"]
"""What the choice depends on, beside the dtypes."""


def first_if_deterministic(configs: list[triton.Config], *_: Any, **__: Any) -> list[triton.Config]:
    """The order of a sum, and so its bits, depends on the tile: do not let a measurement choose it then."""
    return configs[:1] if torch.are_deterministic_algorithms_enabled() else configs
