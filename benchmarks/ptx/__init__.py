"""Triton's kernels as compiled for a GPU, run without one: their PTX on a machine of threads (machine.cpp).

Triton's interpreter takes a kernel's source. What the compiler makes of it for an H100 (layouts, tensor cores, shared
memory, barriers, inline assembly) is seen only here, by :func:`install`, after which a kernel launched on tensors of
the CPU is compiled and run so. Each launch runs in several orders of its warps and programs, which must agree to the
bit. What is asynchronous is late, never early; ``approx`` instructions are exact; nothing is said about speed.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.ptx.decoding import Program, decoded

ORDERS = 4
"""In which each launch runs, the first one plain."""
CAPABILITY = 90
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}

launches: list[tuple[str, int]] = []
"""The kernels that have run, in order, and the rows of 128 bytes that each passed to or from shared memory."""


class MachineError(RuntimeError):
    """A kernel did what no kernel may, or its result depends on the order of its threads."""


def unavailable() -> str | None:
    """Why the machine cannot be built here, or ``None``."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the machine of threads is built for x86-64, not for {platform.machine()}"
    compiler = os.environ.get("CXX", "c++")
    return None if shutil.which(compiler) else f"there is no C++ compiler ({compiler})"


@cache
def machine() -> ctypes.CDLL:
    """The machine, built by the C++ compiler."""
    folder = Path(tempfile.mkdtemp(prefix="ptx-"))
    source, library = Path(__file__).with_name("machine.cpp"), folder / "machine.so"
    flags = ("-O2", "-march=native", "-std=c++17", "-shared", "-fPIC")
    subprocess.run([os.environ.get("CXX", "c++"), *flags, str(source), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.mnemonics.restype = ctypes.c_char_p
    return loaded


@cache
def opcodes() -> dict[str, int]:
    """The machine's number for each of PTX's mnemonics that it knows."""
    found: dict[str, int] = {}
    for i in range(1 << 16):
        several = machine().mnemonics(i)
        if several is None:
            break
        found |= dict.fromkeys(several.decode().split(), i)
    return found


def install() -> None:
    """Let the kernels of :mod:`vwn.ops.triton` run on the machine. To be called before they are imported."""
    import triton
    from triton.runtime.jit import JITFunction

    triton.knobs.runtime.interpret = False
    import vwn.ops.triton_backward
    import vwn.ops.triton_forward
    import vwn.ops.triton_pack
    import vwn.ops.triton_sums
    import vwn.ops.triton_weights  # noqa: F401 - all of them, while the interpreter is off

    JITFunction.run = launch


compiled: dict[Any, tuple[Program, int, int]] = {}


def launch(kernel: Any, *arguments: Any, grid: tuple[int, ...], warmup: bool, **named: Any) -> None:
    """In the place of :meth:`triton.runtime.jit.JITFunction.run`."""
    given = dict(zip(kernel.arg_names, arguments, strict=False))
    given |= {name: value for name, value in named.items() if name in kernel.arg_names}
    options = {name: value for name, value in named.items() if name not in kernel.arg_names}
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    hints: dict[tuple[int], Any] = {}
    values: list[int] = []
    tensors: list[tuple[int, int]] = []
    for i, parameter in enumerate(kernel.params):
        value, specialize = given[parameter.name], not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialize and type(value) is int and value == 1):
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            assert value.device.type == "cpu"
            signature[parameter.name] = TYPES[value.dtype]
            values.append(value.data_ptr())
            if value.numel():
                tensors.append((value.data_ptr(), value.numel() * value.element_size()))
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
            values.append(int(np.float32(value).view(np.uint32)))
        else:
            signature[parameter.name] = "i32"
            values.append(value)
        if not isinstance(value, float) and specialize and values[-1] % 16 == 0:
            hints[(i,)] = [["tt.divisibility", 16]]
    known = {place: getattr(value, "value", value) for place, value in constants.items()}
    key = kernel.cache_key, str(signature), str(known), str(hints), str(options)
    if key not in compiled:
        compiled[key] = compile_kernel(kernel, signature, constants, hints, options)
    launches.append((kernel.__name__, run(*compiled[key], values, (*grid, 1, 1)[:3], tensors)))


def compile_kernel(
    kernel: Any, signature: dict[str, str], constants: Any, hints: Any, options: dict[str, Any]
) -> tuple[Program, int, int]:
    """The decoded kernel, its warps, and the bytes of shared memory that it takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(kernel, signature, constants, hints)
    binary = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=options)
    program = decoded(binary.asm["ptx"], binary.metadata.name, opcodes())
    return program, binary.metadata.num_warps, max(16, binary.metadata.shared)


def run(
    program: Program, warps: int, shared: int, values: list[int], grid: tuple[int, ...], tensors: list[tuple[int, int]]
) -> int:
    """Run a grid in every order.

    Returns:
        rows of 128 bytes that passed to or from shared memory, bank conflicts counted: a processor's cycles.

    Raises:
        MachineError: the kernel went wrong, or its result depends on the order.
    """
    before = [ctypes.string_at(*tensor) for tensor in tensors]
    results = []
    for order in range(ORDERS):
        for (address, size), content in zip(tensors, before, strict=True):
            ctypes.memmove(address, content, size)
        rows = once(program, warps, shared, values, grid, tensors, order)
        results.append([ctypes.string_at(*tensor) for tensor in tensors])
        for i, (first, now) in enumerate(zip(results[0], results[-1], strict=True)):
            if first != now:
                differ = int((np.frombuffer(first, np.uint8) != np.frombuffer(now, np.uint8)).sum())
                raise MachineError(
                    f"{program.name}: {differ} bytes of tensor {i} of {len(tensors)} depend on the order of threads"
                )
    return rows


def once(
    program: Program,
    warps: int,
    shared: int,
    values: list[int],
    grid: tuple[int, ...],
    tensors: list[tuple[int, int]],
    order: int,
) -> int:
    """Run a grid in one order; returns as :func:`run`."""
    parameters = zip(program.parameters, [*values, *[0] * len(program.parameters)], strict=False)
    initial = np.array([*program.constants.items(), *parameters], dtype=object).astype(np.int64)
    ranges, sizes = np.array(tensors, dtype=np.uint64), np.array(grid, dtype=np.uint32)
    pointers = np.array([row.ctypes.data for row in program.code], dtype=np.int64)
    message, at, rows = ctypes.create_string_buffer(400), ctypes.c_int64(), ctypes.c_uint64()
    arrays = [ctypes.c_void_p(x.ctypes.data) for x in (pointers, initial, ranges, sizes)]
    failed = machine().run(
        *(arrays[0], ctypes.c_int64(len(program.code)), ctypes.c_int64(program.registers)),
        *(arrays[1], ctypes.c_int64(len(initial)), arrays[2], ctypes.c_int64(len(tensors)), ctypes.c_int64(shared)),
        *(warps, arrays[3], ctypes.c_uint32(order), message, ctypes.byref(at), ctypes.byref(rows)),
    )
    if failed:
        raise MachineError(f"{program.name}: {message.value.decode()}, in: {program.text[at.value]}")
    return rows.value
