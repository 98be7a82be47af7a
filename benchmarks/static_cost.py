"""What the Triton kernels cost by their machine code for an H100 or H200, without either: a bound, not a measurement.

Instructions per token are those of the compiled code, each loop's as often as it runs, of all warps. "Issue" is the
time that issuing them takes, at four per cycle and processor, which no kernel reaches, and at two, which is good,
relative to the time in which a copy moves the bytes of the floor (H200: 4.3 TB/s). A kernel is slower than the greater
of that and one; stalls, caches, bank conflicts and what else a kernel waits for are not seen. "Bytes" are those of all
loads and stores outside of shared memory, whichever cache serves them, relative to the bytes of the floor.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.report import NOT_MEASURED, Report, parser

SHAPES = ((2, 3), (4, 8), (4, 16), (8, 64))
WIDTHS = (2048, 4096, 8192)
BANDWIDTH, PROCESSORS, CLOCK = 4.3e12, 132, 1.75e9
COLUMNS = {
    "connection": "10",
    "width": "6d",
    "kernel": "9",
    "instructions_per_token": "22.0f",
    "issue_at_4": "10.2f",
    "issue_at_2": "10.2f",
    "bytes": "6.1f",
    "registers": "9d",
    "spilled": "7d",
    "shared": "7d",
}


class Kernel(NamedTuple):
    """One to compile, with write, read, norm and gradients of weights, in bfloat16."""

    name: str
    kernel: Any
    arguments: list[Any]
    """Up to the constants; a tensor stands for one of its dtype."""
    constants: dict[str, Any]
    options: dict[str, Any]
    tokens: int
    """Of a tile."""
    trips: int
    """Of each loop within a tile."""
    persistent: bool
    """Whether the longest loop is over tiles."""
    moved: int
    """Numbers per token that the floor has."""


def kernels(m: int, n: int, width: int) -> Iterator[Kernel]:
    """Those of a boundary."""
    from vwn.ops import triton as backend
    from vwn.ops.triton_backward import boundary_backward
    from vwn.ops.triton_forward import boundary
    from vwn.ops.weights import NormWeights, RoutingWeights

    d, stored = width // m, torch.bfloat16
    shapes = [(n, m + n), (m, n), (d, m + n), (d, m), (n, m + n), (m, n), (d,)]
    write = RoutingWeights(*map(torch.empty, shapes), 1e-6)
    state, z = torch.empty(1, n * d, dtype=stored), torch.empty(1, width, dtype=stored)
    norm, parts = NormWeights(torch.empty(width, dtype=stored), 1e-6), torch.empty(1)
    for backward in (False, True):
        b = backend._Boundary(state, write, write.to_read, norm, None, backward)
        tensors = [state, z, state, z, parts, z, 1] if backward else [state, z, state, z, z, 1]
        tensors = [state, z, *tensors] if backward else tensors
        yield Kernel(
            "backward" if backward else "forward",
            boundary_backward if backward else boundary,
            [*tensors, *b.weights],
            {**b.sizes, **b.flags, **b.part, "SPLIT": True, "WEIGHTS": True},
            b.options,
            b.sizes["BT"],
            b.sizes["NC"],
            backward,
            (3 if backward else 2) * (n * d + width),
        )


def main() -> None:
    """One row for each shape, width and kernel."""
    options = parser("static_cost", __doc__).parse_args()
    notes = {"issue": "of a bound, in parts of a copy's time; not measured", "of": "H200: 132 processors, 1.75 GHz"}
    report = Report(options, notes, COLUMNS)
    if reason := _unavailable():
        report.add({NOT_MEASURED: reason})
        return report.done()
    for m, n in options.shapes or SHAPES:
        for width in WIDTHS[:1] if options.quick else WIDTHS:
            for kernel in kernels(m, n, width):
                report.add({"connection": [m, n], "width": width, "kernel": kernel.name} | cost(kernel))
    return report.done()


def _unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton's interpreter compiles nothing; unset TRITON_INTERPRET"
    if not all(_path(name).exists() for name in ("ptxas", "nvdisasm", "cuobjdump")):
        return "this Triton comes without NVIDIA's tools"
    return None


def cost(k: Kernel) -> dict[str, float]:
    """Of one kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
    signature, given, hints = {}, {}, {}
    for i, name in enumerate(k.kernel.arg_names):
        value = k.arguments[i] if i < len(k.arguments) else k.constants[name]
        if i >= len(k.arguments) or value is None:
            signature[name], given[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], hints[(i,)] = types[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(k.kernel, signature, given, hints)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=k.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        code, usage = _tool("nvdisasm", "-c", file.name), _tool("cuobjdump", "-res-usage", file.name)
    ran = executed(code, k.trips, k.persistent)
    instructions = ran.total() * k.options["num_warps"] / k.tokens
    touched = sum(_bytes(text) * times for text, times in ran.items()) * 32 * k.options["num_warps"] / k.tokens
    copied = k.moved * 2 / BANDWIDTH * PROCESSORS * CLOCK
    numbers = {key: int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK")}  # type: ignore[index]
    return {
        "instructions_per_token": instructions,
        "issue_at_4": instructions / 4 / copied,
        "issue_at_2": instructions / 2 / copied,
        "bytes": touched / (k.moved * 2),
        "registers": numbers["REG"],
        "spilled": numbers["STACK"],
        "shared": binary.metadata.shared,
    }


def executed(code: str, trips: int, persistent: bool) -> Counter[str]:
    """How often a warp runs each instruction for one tile: those of a loop ``trips`` times, of that over tiles once."""
    labels: dict[str, int] = {}
    found: list[str] = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L\S+):", line):
            labels[label[1]] = len(found)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            found.append(instruction[1])
    jumps = [(re.search(r"BRA.*`\((\.L\S+)\)", text), i) for i, text in enumerate(found)]
    loops = [(labels[jump[1]], i) for jump, i in jumps if jump and labels.get(jump[1], i) < i]
    outer = max(loops, key=lambda loop: loop[1] - loop[0]) if persistent else (0, len(found) - 1)
    inner = [loop for loop in loops if loop != outer]
    ran: Counter[str] = Counter()
    for i in range(outer[0], outer[1] + 1):
        ran[found[i]] += trips if any(first <= i <= last for first, last in inner) else 1
    return ran


def _bytes(instruction: str) -> int:
    """That a thread loads from memory or stores there by an instruction."""
    access = re.match(r"(?:@!?\w+ +)?(?:LDG|STG)\.(\S+)", instruction)
    if access is None:
        return 0
    size = re.search(r"U?(8|16|64|128)\b", access[1])
    return int(size[1]) // 8 if size else 4


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_path(name), *arguments], check=True, capture_output=True, text=True).stdout


def _path(name: str) -> Path:
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin" / name


if __name__ == "__main__":
    main()
