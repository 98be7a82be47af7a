"""Backend ``"triton"``: the kernels of a boundary for a GPU, and in Triton's interpreter, for tests, on a CPU.

Shapes: ``T`` tokens, ``n`` slots, ``m`` segments, ``d = D / m`` segment width. :mod:`vwn.ops.triton_tuning` says how
large tiles are.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vwn.ops.triton_tuning import UNFUSED, Launch, chosen, power, rows, rows_backward
from vwn.ops.triton_tuning import apart as apart_by_rule
from vwn.ops.weights import NormWeights, ReadWeights, RoutingWeights

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FEW = 16
"""Tokens that are not worth a launch of their own for the weights, as when decoding."""
_WARPS = 1056
"""Of all programs of a backward; a constant, so that sums are the same on every GPU: eight for each of the 132
processors of an H100, as many as their registers suffice for."""


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why it cannot run there, or ``None``."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not (interpreted and device.type == "cpu"):
        return f"it runs on a GPU, not on {device.type}"
    if device.type == "cuda" and torch.version.hip:
        return "it needs an NVIDIA GPU"
    if dtype not in _DTYPES:
        return f"it knows float32, bfloat16 and float16; {str(dtype).removeprefix('torch.')} is not supported"
    return None


@cache
def tiling(m: int, n: int, d: int, launch: Launch, split: bool = True, backward: bool = False) -> dict[str, Any]:
    """Sizes of tiles and programs, from the shape and the launch alone, so that each sum has one order.

    Args:
        m: fraction rate.
        n: slots.
        d: segment width.
        launch: as :func:`vwn.ops.triton_tuning.chosen`.
        split: the state is in bfloat16. Else a product's bits hang on its columns, so there are 32 of them everywhere.
        backward: it takes more tokens at a time, and fewer columns.

    Returns:
        the constants of the kernels, see :mod:`vwn.ops.triton_tiles`.
    """
    slots, segments, height = power(n), power(m), rows_backward(m, n) if backward else rows(n)
    # The pieces of a row are for the warps, which multiply 32 columns at a time.
    pieces = min(launch.warps, launch.columns // 32) if slots < 64 and launch.columns >= 64 else 1
    columns, chunks = launch.columns // pieces, -(-d // launch.columns)
    # By benchmarks.static_cost 64 columns would take (4, 16) 5 % fewer instructions, but spill four times as much.
    # From 64 slots on the order of columns, and so of sums over them, depends on the chunk: it is the forward's.
    wide = not backward or slots >= 64
    most = columns if split and wide else 64 if split and height != 32 else 32
    if columns > most:
        columns, chunks = most, chunks * columns // most
    return {
        "TAU": float(d) ** 0.5,
        "n": n,
        "m": m,
        "d": d,
        "N": slots,
        "M": segments,
        "BT": height // slots,
        "R": height,
        "H": max(16, slots),
        "Q": max(16 if slots >= 64 else 8, height // slots * segments),
        "E": max(8 if slots < 64 or split else 16, height // slots * segments),
        "KN": max(8, slots),
        "KM": max(8, segments),
        "S": pieces,
        "U": columns // 32 if pieces > 1 or (slots >= 64 and split and columns >= 64) else 1,
        "BD": columns,
        "NC": chunks,
        "KEEP": launch.keep and split,
    }


class _Boundary:
    """What the kernels take besides the tensors of tokens."""

    def __init__(
        self,
        state: Tensor,
        write: RoutingWeights | None,
        read: ReadWeights | None,
        norm: NormWeights | None,
        launch: Launch | None,
        backward: bool = False,
        apart: bool | None = None,
    ) -> None:
        weights = write if write is not None else read
        assert weights is not None
        n, m = weights.n, weights.m
        d = state.shape[1] // n
        launch = launch or chosen(m, n, d, state.device, state.dtype)
        self.sizes = dict(tiling(m, n, d, launch, _split(state), backward))
        # Several stages would load ahead into shared memory: up to a third more instructions at 64 slots, more memory
        # than there is at others; and Triton 3.6 loads to where a product still reads (seen by benchmarks.ptx).
        self.options = {"num_warps": launch.warps, "num_stages": 1, **UNFUSED}
        self.tokens = state.shape[0]
        self.tiles = -(-self.tokens // self.sizes["BT"])
        self.hidden_size = m * d
        of_write = (None,) * 7 + (0.0,) if write is None else tuple(write)
        of_read = (None,) * 4 + (0.0,) if read is None else tuple(read)
        self.weights: tuple[Any, ...] = (*of_write, *of_read, *((None, 0.0) if norm is None else norm))
        self.flags = {
            "WRITE": write is not None,
            "WRITE_DYNAMIC": write is not None and write.dynamic,
            "READ": read is not None,
            "READ_DYNAMIC": read is not None and read.dynamic,
            "NORM": norm is not None,
        }
        s = self.sizes
        width = s["S"] * s["BD"] * s["NC"]
        widths = self.flags["WRITE"] * (s["KN"] + s["KM"]), self.flags["READ"] * s["KM"]
        projections = self.flags["WRITE_DYNAMIC"] * widths[0], self.flags["READ_DYNAMIC"] * widths[1]
        apart = (apart_by_rule(n) if apart is None else apart) and self.flags["WRITE_DYNAMIC"]
        of_read = (not apart) * projections[0] * width
        norm_at = of_read + projections[1] * width
        matrices = norm_at + self.flags["NORM"] * s["KM"] * width
        self.part = {
            "APART": apart,
            "PART": matrices + 2 * s["R"] * sum(widths),
            "OF_READ": of_read,
            "NORM_AT": norm_at,
            "MATRICES": matrices,
        }
        s["WIDTH"] = width
        self.packed = sum(projections) * width

    def pack(self, state: Tensor) -> Tensor | None:
        """The projections, made ready for all tiles, or ``None`` if these are so few that each is to do it itself."""
        from vwn.ops import triton_pack

        if self.tokens <= _FEW or not self.packed:
            return None
        s, split = self.sizes, _split(state)
        packed = state.new_empty((1 + split) * self.packed, dtype=state.dtype if split else torch.float32)
        triton_pack.pack[(-(-s["WIDTH"] // triton_pack.BC.value),)](
            packed,
            *(self.weights[i] for i in (2, 3, 6, 9, 11)),
            **{name: s[name] for name in ("n", "m", "d", "N", "M", "KN", "KM", "S", "U", "WIDTH")},
            **{name: self.flags[name] for name in ("WRITE_DYNAMIC", "READ_DYNAMIC")},
            SPLIT=split,
            **UNFUSED,
        )
        return packed


def forward(
    state: Tensor,
    z: Tensor | None,
    write: RoutingWeights | None,
    read: ReadWeights | None,
    norm: NormWeights | None = None,
    launch: Launch | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """As :func:`vwn.ops.reference.forward`, for contiguous ``[T, D']`` and ``[T, D]``; one launch for few
    tokens, else two.

    ``launch``: how, if not as :func:`vwn.ops.triton_tuning.chosen` has it.
    """
    from vwn.ops import triton_forward

    b = _Boundary(state, write, read, norm, launch)
    new = None if write is None else torch.empty_like(state)
    x = None if read is None else state.new_empty(b.tokens, b.hidden_size)
    if b.tiles:
        with torch.cuda.device_of(state):
            packed = b.pack(state)
            triton_forward.boundary[(b.tiles,)](
                *(state, z, new, x, packed, b.tokens),
                *b.weights,
                SPLIT=_split(state),
                **b.sizes,
                **b.flags,
                **b.options,
            )
    return new, x


def backward(
    grad_state: Tensor | None,
    grad_x: Tensor | None,
    state: Tensor,
    z: Tensor | None,
    write: RoutingWeights | None,
    read: ReadWeights | None,
    norm: NormWeights | None,
    needs_weights: bool,
    launch: Launch | None = None,
    programs: int | None = None,
    apart: bool | None = None,
) -> list[Tensor]:
    """As :func:`vwn.ops.reference.backward`, for contiguous ``[T, D']`` and ``[T, D]``; at most three
    launches, four from 33 slots on.

    ``programs``: how many, if not as many as there are registers for. ``apart``: whether the gradients of the write's
    projections have a launch of their own, if not as :func:`vwn.ops.triton_tuning.apart` has it. The order of the sums
    over tokens depends on both.
    """
    from vwn.ops import triton_backward, triton_sums, triton_weights

    b = _Boundary(state, write, read, norm, launch, backward=True, apart=apart)
    programs = min(b.tiles, programs or _WARPS // b.options["num_warps"])
    of_state = torch.empty_like(state)
    of_z = None if z is None else torch.empty_like(z)
    parts = state.new_empty(programs, b.part["PART"], dtype=torch.float32) if needs_weights else None
    split, rows = _split(state), b.tokens * b.sizes["n"]
    kept, of_write, shares = None, parts, 0  # a pointer to compile with, also where there are no tokens
    if needs_weights and b.part["APART"]:
        numbers = rows * (b.sizes["KN"] + b.sizes["KM"])
        kept = state.new_empty(numbers * (1 + split), dtype=state.dtype if split else torch.float32)
    gradients = [t for t in (of_state, of_z) if t is not None]
    sizes = {name: size for name, size in b.sizes.items() if name != "KEEP"}
    with torch.cuda.device_of(state):
        if programs:
            packed = b.pack(state)
            triton_backward.boundary_backward[(programs,)](
                *(grad_state, grad_x, state, z, of_state, of_z, parts, kept, packed, b.tokens),
                *b.weights,
                SPLIT=split,
                WEIGHTS=needs_weights,
                **sizes,
                **b.flags,
                **b.part,
                **b.options,
            )
            if kept is not None:
                of_write, shares = triton_weights.gradients(state, kept, rows, sizes, split)
        if needs_weights:
            of_weights = [torch.empty_like(w) if isinstance(w, Tensor) else None for w in b.weights]
            gradients += [t for t in of_weights if t is not None]
            eps = (7, 12, 14)  # the places of those that are no tensors
            triton_sums.sums[(triton_sums.blocks(b.sizes, b.flags),)](
                *(parts, programs, of_write, shares),
                *(t for i, t in enumerate(of_weights) if i not in eps),
                *(b.weights[i] for i in (2, 3, 6, 9, 11)),
                **{name: sizes[name] for name in ("n", "m", "d", "N", "M", "R", "KN", "KM", "S", "U", "WIDTH")},
                **b.flags,
                **b.part,
                **UNFUSED,
            )
    return gradients


def _split(state: Tensor) -> bool:
    return state.dtype == torch.bfloat16
