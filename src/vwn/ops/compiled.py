"""Backend ``"compiled"``: ``write_read.cpp``, built at first use by the machine's C++ compiler for its vector units."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vwn.common.cache import default_cache_dir, load_or_build
from vwn.common.errors import UserError
from vwn.ops.weights import Inputs, RoutingWeights

_SOURCE = Path(__file__).with_name("write_read.cpp")
_HEADER = Path(__file__).with_name("write_read_kernels.h")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


class _Parameters(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in RoutingWeights._fields[:-1]]


class _Side(ctypes.Structure):
    _fields_ = [
        ("present", ctypes.c_int64),
        ("dynamic", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("eps", ctypes.c_double),
        ("weights", _Parameters),
        ("gradients", _Parameters),
    ]


class _Args(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tokens", "n", "m", "d", "dtype", "threads")),
        ("write", _Side),
        ("read", _Side),
        ("norm", ctypes.c_void_p),
        ("norm_eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("grad_norm", "state", "z", "grad_new", "grad_x")),
        *((name, ctypes.c_void_p) for name in ("new_state", "x", "grad_state", "grad_z")),
    ]


def unavailable(device: torch.device, dtype: torch.dtype, slots: int = 1) -> str | None:
    """Return the reason why it cannot run there, or ``None``; builds the library when first asked."""
    if device.type != "cpu":
        return f"it runs on a CPU, not on {device.type}"
    if dtype not in _DTYPES:
        return f"it knows float32, float64, bfloat16 and float16, not {dtype}"
    built = _library()
    if isinstance(built, str):
        return built
    empty = _Args(dtype=_DTYPES[dtype], threads=1)
    empty.n = empty.m = empty.d = 1
    return "the compiler has no float16" if built.vwn_write_read(ctypes.byref(empty), 0, 0) else None


@cache
def _library() -> ctypes.CDLL | str:
    """Return the library, built first if the cache does not have it; else why there is none."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++")), None)
    if compiler is None:
        return "there is no C++ compiler (g++ or c++; CXX names another)"
    if shutil.which(compiler.split()[0]) is None:
        return f"CXX names the compiler {compiler!r}, which is not there"
    command = [*compiler.split(), *_FLAGS]
    try:
        try:
            return _load_or_build([*command, "-fopenmp"])
        except UserError:  # no OpenMP, as Apple's; one thread is better than none
            return _load_or_build(command)
    except UserError as error:
        return str(error)


def _load_or_build(command: list[str]) -> ctypes.CDLL:
    sources = _SOURCE.read_bytes() + _HEADER.read_bytes()
    key = hashlib.sha256(sources + "\0".join([*command, _processor()]).encode()).hexdigest()[:16]

    def load(folder: Path) -> ctypes.CDLL | None:
        try:
            return ctypes.CDLL(str(folder / "write_read.so"))
        except OSError:  # not there, or damaged
            return None

    def build(folder: Path) -> None:
        built = folder / "write_read.so"
        done = subprocess.run([*command, str(_SOURCE), "-o", str(built)], capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            found = next((line for line in lines if "error" in line), lines[0])
            raise UserError(f"{command[0]} could not build {_SOURCE.name}: {found}")
        if load(folder) is None:
            raise UserError(f"{built} was built, but cannot be loaded from there")

    return load_or_build(default_cache_dir() / "ops" / key, load, build)


def _processor() -> str:
    """Describe the processor, on which ``-march=native`` depends: different machines may share a cache."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {flags}"


def forward(inputs: Inputs) -> tuple[Tensor | None, Tensor | None]:
    """Compute :func:`vwn.ops.reference.forward` for contiguous ``[T, D']`` and ``[T, D]``."""
    state, (m, _, d) = inputs.state, inputs.sizes
    new = torch.empty_like(state) if inputs.write is not None else None
    x = state.new_empty(state.shape[0], m * d) if inputs.read is not None else None
    _run(inputs, backward=False, needs_weights=False, new_state=new, x=x)
    return new, x


def backward(grad_new: Tensor | None, grad_x: Tensor | None, inputs: Inputs, needs_weights: bool) -> list[Tensor]:
    """Compute :func:`vwn.ops.reference.backward` for contiguous ``[T, D']`` and ``[T, D]``."""
    state, z, norm = inputs.state, inputs.z, inputs.norm
    grad_state, grad_z, grad_norm = torch.empty_like(state), None if z is None else torch.empty_like(z), None
    if norm is not None and needs_weights:
        grad_norm = torch.empty_like(norm.weight, dtype=torch.promote_types(state.dtype, torch.float32))
    results = {"grad_state": grad_state, "grad_z": grad_z, "grad_norm": grad_norm}
    grad_weights = _run(inputs, backward=True, needs_weights=needs_weights, grad_new=grad_new, grad_x=grad_x, **results)
    rounded = None if grad_norm is None else grad_norm.to(state.dtype)
    return [t for t in (grad_state, grad_z, *grad_weights, rounded) if t is not None]


def _run(inputs: Inputs, backward: bool, needs_weights: bool, **tensors: Tensor | None) -> list[Tensor]:
    """Call the library; returns the gradients of the weights of the write, then of the read, if they are needed."""
    library: Any = _library()
    state, z, write, read, norm = inputs
    m, n, d = inputs.sizes
    args = _Args(state.shape[0], n, m, d, _DTYPES[state.dtype], torch.get_num_threads())
    for name, tensor in (("state", state), ("z", z), *tensors.items()):
        if tensor is not None:
            setattr(args, name, tensor.data_ptr())
    if norm is not None:
        args.norm, args.norm_eps = norm.weight.data_ptr(), norm.eps
    gradients: list[Tensor] = []
    for side, weights in ((args.write, write), (args.read, read)):
        if weights is None:
            continue
        side.present, side.dynamic, side.eps = 1, weights.dynamic, weights.eps
        side.columns = weights.bias_alpha.shape[1]
        side.weights = _addresses(weights[:-1])
        if needs_weights:
            zeros = [None if t is None else torch.zeros_like(t) for t in weights[:-1]]
            side.gradients = _addresses(zeros)
            gradients += [t for t in zeros if t is not None]
    if library.vwn_write_read(ctypes.byref(args), int(backward), int(needs_weights)):
        raise AssertionError("the library was built without this dtype")
    return gradients


def _addresses(tensors: Sequence[Tensor | None]) -> _Parameters:
    return _Parameters(*(None if t is None else t.data_ptr() for t in tensors))
