"""Backend ``"triton"``: kernels for an NVIDIA GPU. In Triton's interpreter, for tests, they run on a CPU.

:mod:`.tiles` has a legend of the names; the kernels are in :mod:`.forward_kernel` and :mod:`.backward_kernel`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from vwn.ops.weights import Inputs

MOST_SLOTS = 64
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_CAPABILITY = 8
"""Major compute capability of Ampere, the first with TF32 and bfloat16."""
_PROGRAMS = 264
"""Most programs of a backward: two for each processor of an H100. It is a constant, so that what each of them adds up
is the same on every GPU."""


def unavailable(device: torch.device, dtype: torch.dtype, slots: int = 1) -> str | None:
    """Return the reason why it cannot run there, or ``None``."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not (interpreted and device.type == "cpu"):
        return f"it runs on a GPU, not on {device.type}"
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):  # the oldest that the kernels were compiled with
        return f"it needs Triton 3.6 or newer, {triton.__version__} is installed"
    if device.type == "cuda":
        if torch.version.hip:
            return "it needs an NVIDIA GPU"
        major, minor = torch.cuda.get_device_capability(device)
        if major < _LEAST_CAPABILITY:
            return f"it needs compute capability {_LEAST_CAPABILITY}.0 or higher, the GPU has {major}.{minor}"
    if dtype not in _DTYPES:
        return f"it knows float32, bfloat16 and float16; {str(dtype).removeprefix('torch.')} is not supported"
    return f"it has room for {MOST_SLOTS} slots, not for {slots}" if slots > MOST_SLOTS else None


def forward(inputs: Inputs) -> tuple[Tensor | None, Tensor | None]:
    """Compute :func:`vwn.ops.reference.forward` for contiguous ``[T, D']`` and ``[T, D]``, in one launch."""
    from vwn.ops.triton import forward_kernel

    state, z, write, read, norm = inputs = _with_carry(inputs)
    constants = _constants(inputs)
    tokens = state.shape[0]
    new = None if write is None else torch.empty_like(state)
    x = None if read is None else state.new_empty(tokens, constants["m"] * constants["d"])
    if tokens:
        with torch.cuda.device_of(state):
            forward_kernel.forward[lambda meta: (-(-tokens // max(1, meta["ROWS"] // meta["N"])),)](
                state, z, new, x, tokens, write, read, norm, **constants
            )
    return new, x


def backward(grad_new: Tensor | None, grad_x: Tensor | None, inputs: Inputs, needs_weights: bool) -> list[Tensor]:
    """Compute :func:`vwn.ops.reference.backward` for contiguous ``[T, D']`` and ``[T, D]``, in one launch and a sum."""
    from vwn.ops.triton import backward_kernel

    own = [t for kind in inputs[2:] for t in kind or () if isinstance(t, Tensor)]
    state, z, write, read, norm = inputs = _with_carry(inputs)
    constants = _constants(inputs)
    tokens = state.shape[0]
    grad_state = torch.empty_like(state)
    grad_z = None if z is None else torch.empty_like(z)
    x = grad_z if norm is None or grad_z is not None else state.new_empty(tokens, norm.weight.numel())
    weights = [w for kind in (write, read, norm) if kind is not None for w in kind if isinstance(w, Tensor)]
    sizes = [w.numel() for w in weights] if needs_weights else []
    programs = min(_PROGRAMS, tokens)
    parts = state.new_zeros(programs, sum(sizes), dtype=torch.float32) if needs_weights else None
    with torch.cuda.device_of(state):
        if tokens:
            rows = iter(parts[0].split(sizes)) if parts is not None else repeat(None)
            weight_parts = [_replaced(kind, rows) for kind in (write, read, norm)]
            backward_kernel.backward[(programs,)](
                grad_new, grad_x, state, z, grad_state, grad_z, x, parts, tokens, write, read, norm, *weight_parts,
                PART=sum(sizes), WEIGHTS=needs_weights, **constants,
            )  # fmt: skip
    if parts is None:
        return [grad_state, *([] if grad_z is None else [grad_z])]
    grad_weights = torch.ops.aten.split_with_sizes_copy(parts.sum(0), sizes)
    shaped = (
        g.view(w.shape)[..., : t.shape[-1]].to(t.dtype).contiguous()
        for g, w, t in zip(grad_weights, weights, own, strict=True)
    )
    return [grad_state, *([] if grad_z is None else [grad_z]), *shaped]


def _with_carry(inputs: Inputs) -> Inputs:
    """Write out the columns of an identity carry, which the kernels mix like any other."""
    _, _, write, read, _ = inputs
    return inputs._replace(write=write and write.with_carry, read=read and read.with_carry)


def _replaced(weights: Any, tensors: Iterator[Tensor | None]) -> Any:
    """Return the same named tuple with other tensors in place of its own."""
    if weights is None:
        return None
    return type(weights)(*(next(tensors) if isinstance(w, Tensor) else w for w in weights))


def _constants(inputs: Inputs) -> dict[str, Any]:
    """Return the compile-time arguments of both kernels."""
    state, _, write, read, norm = inputs
    m, n, d = inputs.sizes
    slots, segments = (1 << (size - 1).bit_length() for size in (n, m))
    return {
        "n": n,
        "m": m,
        "d": d,
        "N": slots,
        "M": max(16, segments) if slots >= 16 else segments,  # tensor cores want 16
        "WRITE": write is not None,
        "READ": read is not None,
        "NORM": norm is not None,
        "WRITE_DYNAMIC": write is not None and write.dynamic,
        "READ_DYNAMIC": read is not None and read.dynamic,
        "FEW": state.shape[0] <= 64,  # as when decoding: other tiles are fastest
        "PRECISION": "tf32x3" if state.dtype == torch.float32 else "tf32",  # which a 16-bit number fits in
    }
