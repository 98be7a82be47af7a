"""What the Triton kernels cost by their machine code for an H100 or H200, without either: a bound, not a measurement.

Instructions per token are those of the compiled code, each loop's as often as it runs, of all warps. The backward is
that with the gradients of all weights; "norm" says whether with the reading sublayer's RMSNorm. "Issue" is the
time that issuing them takes, at four per cycle and processor, which no kernel reaches, and at two, which is good,
relative to the time in which a copy moves the bytes of the floor (H200: 4.3 TB/s). A kernel is slower than the greater
of that and one; stalls, caches, bank conflicts and what else a kernel waits for are not seen. "Tensor" is the time of
the products alone, on tensor cores at their peak, likewise relative. "Bytes" are those of all loads and stores outside
of shared memory, but for spilled registers, whichever cache serves them, relative to the bytes of the floor. "Parts"
are the MB in which all programs of a backward add up the gradients of the weights, and "added" what a token reads and
writes of them, relative to the floor; both by the sizes of tiles. "Weights" is the backward's launch for the gradients
of the write's projections, where it has one: by the rule, or, with ``--against-rule``, at the other shapes.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
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
TOKENS = 8192
BANDWIDTH, PROCESSORS, CLOCK = 4.3e12, 132, 1.75e9
PRODUCTS = 2048
"""Multiply-adds in bfloat16 of a processor's tensor cores per cycle."""
COLUMNS = {
    "connection": "10",
    "width": "6d",
    "kernel": "9",
    "norm": "6",
    "instructions_per_token": "22.0f",
    "issue_at_4": "10.2f",
    "issue_at_2": "10.2f",
    "tensor": "6.2f",
    "bytes": "6.1f",
    "parts": "6.1f",
    "added": "6.1f",
    "registers": "9d",
    "spilled": "7d",
    "shared": "7d",
}


class Kernel(NamedTuple):
    """One to compile, with write, read and gradients of weights, in bfloat16."""

    name: str
    norm: bool
    kernel: Any
    arguments: list[Any]
    """Up to the constants; a tensor stands for one of its dtype."""
    constants: dict[str, Any]
    options: dict[str, Any]
    tokens: float
    """Of a tile, or of a program's share of all columns."""
    trips: int
    """Of each loop within a tile, or within a program that has no tiles."""
    persistent: bool
    """Whether the longest loop is over tiles."""
    moved: int
    """Numbers per token that the floor has."""
    part: int
    """Numbers of a program's part of the gradients of weights, padded columns left out, as they are not written."""


def kernels(m: int, n: int, width: int, against_rule: bool = False) -> Iterator[Kernel]:
    """Those of a boundary; ``against_rule``: the write's projections apart where the rule has them together."""
    from vwn.ops import triton as backend
    from vwn.ops import triton_weights
    from vwn.ops.triton_backward import boundary_backward
    from vwn.ops.triton_forward import boundary
    from vwn.ops.triton_tuning import apart
    from vwn.ops.weights import NormWeights, RoutingWeights

    d, stored = width // m, torch.bfloat16
    shapes = [(n, m + n), (m, n), (d, m + n), (d, m), (n, m + n), (m, n), (d,)]
    write = RoutingWeights(*map(torch.empty, shapes), 1e-6)
    state, z = torch.empty(1, n * d, dtype=stored), torch.empty(1, width, dtype=stored)
    parts = torch.empty(1)
    for backward, normed in ((False, False), (False, True), (True, False), (True, True)):
        norm = NormWeights(torch.empty(width, dtype=stored), 1e-6) if normed else None
        b = backend._Boundary(state, write, write.to_read, norm, None, backward, apart(n) != against_rule)
        tensors = [state, z, state, z, parts, z, z, 1] if backward else [state, z, state, z, z, 1]
        tensors = [state, z, *tensors] if backward else tensors
        columns = (not b.part["APART"]) * (n + m) + m + normed * m
        constants = {**b.sizes, **b.flags, **b.part, "SPLIT": True, "WEIGHTS": True, "BC": triton_weights.columns(True)}
        yield Kernel(
            "backward" if backward else "forward",
            normed,
            boundary_backward if backward else boundary,
            [*tensors, *b.weights],
            constants,
            b.options,
            b.sizes["BT"],
            b.sizes["NC"],
            backward,
            (3 if backward else 2) * (n * d + width),
            backward * (columns * b.sizes["WIDTH"] + b.part["PART"] - b.part["MATRICES"]),
        )
        if backward and b.part["APART"] and not normed:
            blocks, shares, projected = triton_weights.grid(TOKENS * n, d, b.sizes["KN"], True)
            trips = TOKENS * n // shares // triton_weights.BR.value
            yield Kernel(
                "weights",
                normed,
                triton_weights.over_rows,
                [state, z, parts, 1, 1],
                constants,
                triton_weights.options(b.sizes["KN"], True),
                trips * triton_weights.BR.value / n / (blocks * projected),
                trips,
                False,
                3 * (n * d + width),
                0,
            )


def main() -> None:
    """One row for each shape, width and kernel."""
    p = parser("static_cost", __doc__)
    p.add_argument("--against-rule", action="store_true", help="projections of the write apart or not, against it")
    options = p.parse_args()
    notes = {"issue": "of a bound, in parts of a copy's time; not measured", "of": "H200: 132 processors, 1.75 GHz"}
    report = Report(options, notes, COLUMNS)
    if reason := unavailable():
        report.add({NOT_MEASURED: reason})
        return report.done()
    for m, n in options.shapes or SHAPES:
        for width in WIDTHS[:1] if options.quick else WIDTHS:
            for kernel in kernels(m, n, width, options.against_rule):
                what = {"connection": [m, n], "width": width, "kernel": kernel.name, "norm": kernel.norm}
                try:
                    report.add(what | cost(kernel))
                except ValueError as error:  # loops that cannot be told apart
                    report.add(what | {NOT_MEASURED: str(error)})
    return report.done()


def unavailable() -> str | None:
    """Why nothing can be compiled here, or ``None``."""
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

    from vwn.ops.triton import _WARPS

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
    ran = executed(code, k.trips, k.persistent, products(binary.asm["ptx"], k.persistent))
    instructions = ran.total() * k.options["num_warps"] / k.tokens
    touched = sum(_bytes(text) * times for text, times in ran.items()) * 32 * k.options["num_warps"] / k.tokens
    multiplied = sum(_multiplied(text) * times for text, times in ran.items()) * k.options["num_warps"] / k.tokens
    copied = k.moved * 2 / BANDWIDTH * PROCESSORS * CLOCK
    numbers = {key: int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK")}  # type: ignore[index]
    return {
        "instructions_per_token": instructions,
        "issue_at_4": instructions / 4 / copied,
        "issue_at_2": instructions / 2 / copied,
        "tensor": multiplied / PRODUCTS / copied,
        "bytes": touched / (k.moved * 2),
        "parts": k.part * 4 * (_WARPS // k.options["num_warps"]) / 1e6,
        "added": k.part * 4 * 2 / k.tokens / (k.moved * 2),
        "registers": numbers["REG"],
        "spilled": numbers["STACK"],
        "shared": binary.metadata.shared,
    }


def products(ptx: str, persistent: bool) -> list[int]:
    """Products on tensor cores in each loop within a tile, before the assembler may unroll it."""
    found = _loops(ptx.splitlines(), r"\s*(\$L\w+):", r"bra(?:\.uni)?\s+(\$L\w+)", persistent)[1]
    lines = ptx.splitlines()
    product = re.compile(r"\bmma\.sync|wgmma\.mma_async")
    return [sum(bool(product.search(line)) for line in lines[first : last + 1]) for first, last in found]


def executed(code: str, trips: int, persistent: bool, once: list[int] | None = None) -> Counter[str]:
    """How often a warp runs each instruction for one tile: those of a loop ``trips`` times, of that over tiles once.

    ``once``: of :func:`products`; by them a loop that the assembler has unrolled is told, and runs less often.

    Raises:
        ValueError: a loop has products that do not go with ``once``.
    """
    lines = [line for line in code.splitlines() if re.match(r"\s*(\.L\S+:|/\*[0-9a-f]+\*/\s+.*;)", line)]
    outer, inner = _loops(lines, r"\s*(\.L\S+):", r"BRA.*`\((\.L\S+)\)", persistent)
    times = [1] * len(lines)
    here = [sum("MMA" in line for line in lines[first : last + 1]) for first, last in inner]
    for (first, last), factor in zip(inner, unrolled(here, once, trips), strict=True):
        times[first : last + 1] = [trips // factor] * (last + 1 - first)
    ran: Counter[str] = Counter()
    for line, count in list(zip(lines, times, strict=True))[outer[0] : outer[1] + 1]:
        if instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            ran[instruction[1]] += count
    return ran


def unrolled(here: list[int], once: list[int] | None, trips: int) -> list[int]:
    """How often the assembler has each loop's source, of which it has ``here`` products and the source had ``once``.

    Loops of the source may be missing, for being unrolled as a whole. Of what is possible, as little as can be.
    """
    found = [count for count in here if count]
    factors: list[int] | None = [1] * len(found)
    if once:
        ways = (
            [a // b for a, b in zip(found, each, strict=True)]
            for each in itertools.combinations([count for count in once if count], len(found))
            if all(a % b == 0 and trips % (a // b) == 0 for a, b in zip(found, each, strict=True))
        )
        factors = min(ways, key=sum, default=None)
    if factors is None:
        raise ValueError(f"the loops have {found} products, and those of the source have {once}")
    waiting = iter(factors)
    return [next(waiting) if count else 1 for count in here]


def _loops(lines: list[str], label: str, jump: str, persistent: bool) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """First and last line of what is run for a tile, and of each loop within."""
    labels = {found[1]: i for i, line in enumerate(lines) if (found := re.match(label, line))}
    jumps = ((re.search(jump, line), i) for i, line in enumerate(lines))
    loops = sorted((labels[found[1]], i) for found, i in jumps if found and labels.get(found[1], i) + 1 < i)
    outer = max(loops, key=lambda loop: loop[1] - loop[0]) if persistent else (0, len(lines) - 1)
    return outer, [loop for loop in loops if loop != outer and outer[0] <= loop[0] and loop[1] <= outer[1]]


def _bytes(instruction: str) -> int:
    """That a thread loads from memory or stores there by an instruction."""
    access = re.match(r"(?:@!?\w+ +)?(?:LDG|STG|LDGSTS)\.(\S+)", instruction)
    if access is None:
        return 0
    size = re.search(r"U?(8|16|64|128)\b", access[1])
    return int(size[1]) // 8 if size else 4


def _multiplied(instruction: str) -> int:
    """Multiply-adds of a warp on tensor cores by an instruction; four warps share that of a group."""
    product = re.match(r"(?:@!?\w+ +)?(?:HMMA\.(16)(8)(16)|HGMMA\.(\d+)x(\d+)x(\d+))\.F32\.BF16", instruction)
    if product is None:
        return 0
    sizes = [int(size) for size in product.groups() if size]
    return math.prod(sizes) // (1 if product[1] else 4)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_path(name), *arguments], check=True, capture_output=True, text=True).stdout


def _path(name: str) -> Path:
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin" / name


if __name__ == "__main__":
    main()
