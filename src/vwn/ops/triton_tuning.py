"""How the Triton kernels are launched: by a rule of the shape, or, with ``VWN_TUNE=1``, as measured to be the fastest.

One choice serves forward and backward, write, read and both: the order of a sum, and so the bits of a result, depends
on it. So the rule depends on the shape alone, and what was measured is kept in the cache and never measured again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vwn.common.cache import default_cache_dir, load_or_build
from vwn.common.errors import UserError
from vwn.ops.weights import NormWeights, RoutingWeights

_WARPS = 4
"""Of a program at most: more than one program on a processor, so that one computes while another waits."""
_KEPT = 16384
"""Numbers of a tile that so many warps hold without spilling, next to what they compute with."""
_TOKENS, _BYTES = 8192, 1 << 28
"""At most so many tokens, and bytes of a state, are measured."""

UNFUSED = {"enable_fp_fusion": False}
"""How all kernels are compiled: a product is rounded before it is added. Else what a product becomes would depend on
what it is compiled with, and ``a b + c d``, which two threads sum up and both keep, would not be the same in both."""

_log = logging.getLogger("vwn.ops")


class Launch(NamedTuple):
    """Columns of a chunk of the segment width, whether the forward holds all chunks, and warps of a program."""

    columns: int
    keep: bool
    warps: int


def power(x: int) -> int:
    """The least power of two that is at least ``x``."""
    return 1 << max(x - 1, 0).bit_length()


def rows(n: int) -> int:
    """Of a tile of the forward: tensor cores multiply 16 or more."""
    return max(16, power(n))


def rows_backward(m: int, n: int) -> int:
    """Of a tile of the backward, which adds to the gradients of weights for each: 32 if that is 8 segments or fewer."""
    return max(rows(n), min(32, 8 * power(n) // power(m)))


def apart(n: int) -> bool:
    """Whether the gradients of a write's projections have a launch of their own, unasked.

    From 33 slots on a tile is one token, and adding to a program's sums would move twice the bytes of all else. (By
    count it is as fast either way for fewer; benchmarks.launches measures it.)
    """
    return power(n) >= 64


@cache
def rule(n: int, d: int) -> Launch:
    """What is taken unmeasured, for ``n`` slots of segment width ``d``."""
    return _launch(n, d, _WARPS if power(n) >= 64 else max(2, min(power(_WARPS * rows(n) * d // _KEPT), _WARPS)))


@cache
def candidates(n: int, d: int) -> tuple[Launch, ...]:
    """What is measured, at most five; the rule is the first."""
    first = rule(n, d)
    launches = [first, first._replace(keep=False), first._replace(columns=max(16, first.columns // 2))]
    launches += [_launch(n, d, warps) for warps in (first.warps // 2, first.warps * 2)]
    return tuple(dict.fromkeys(launches))


def _launch(n: int, d: int, warps: int) -> Launch:
    """Each warp has 128 columns of a chunk, or all together 128 where the rows of a slot take all of them."""
    columns = max(16, min(128 * warps if power(n) < 64 else 128, power(d)))
    if power(n) < 64:
        warps = max(1, min(warps, columns // 32))
    return Launch(columns, power(n) < 64 and rows(n) * d <= _KEPT * warps // _WARPS, warps)


def chosen(m: int, n: int, d: int, device: torch.device, dtype: torch.dtype) -> Launch:
    """How the kernels of ``(m, n)`` at segment width ``d`` are launched.

    Raises:
        UserError: ``VWN_TUNE`` is neither 0 nor 1, or asks to measure where that cannot be done.
    """
    wanted = os.environ.get("VWN_TUNE") or "0"
    if wanted not in ("0", "1"):
        raise UserError(f"VWN_TUNE must be 1, to measure the kernels' tiles, or 0, to take the rule's; got {wanted!r}")
    return rule(n, d) if wanted == "0" else _measured(m, n, d, device, dtype)


@cache
def _measured(m: int, n: int, d: int, device: torch.device, dtype: torch.dtype) -> Launch:
    """The fastest of :func:`candidates` on this kind of GPU, from the cache if it is there.

    Processes of one machine wait for the first of them, and take what it found.
    """
    what = _what(m, n, d, device, dtype)
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]

    def load(folder: Path) -> Launch | None:
        try:
            return Launch(**json.loads((folder / "launch.json").read_text())["launch"])
        except (OSError, ValueError, KeyError, TypeError):  # not there, or damaged
            return None

    def build(folder: Path) -> None:
        launch, milliseconds = _fastest(m, n, d, device, dtype)
        found = {"launch": launch._asdict(), "of": what, "milliseconds": milliseconds}
        (folder / "launch.json").write_text(json.dumps(found, indent=1) + "\n")

    launch = load_or_build(default_cache_dir() / "triton" / key, load, build)
    _log.info("Triton kernels of (%d, %d) at segment width %d, %s: measured, %s", m, n, d, dtype, launch)
    return launch


def _what(m: int, n: int, d: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What a measurement holds for: the shape, the GPU, Triton and the kernels' code."""
    import triton

    sources = sorted(Path(__file__).parent.glob("triton*.py"))
    code = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"m": m, "n": n, "d": d, "dtype": str(dtype), "gpu": gpu, "triton": triton.__version__, "code": code}


def _fastest(
    m: int, n: int, d: int, device: torch.device, dtype: torch.dtype
) -> tuple[Launch, dict[str, float | None]]:
    """The fastest launch and the milliseconds of each, ``None`` where the GPU cannot run it."""
    from triton.runtime.errors import OutOfResources, PTXASError

    times: dict[Launch, float] = {}
    for launch in candidates(n, d):
        try:
            times[launch] = _milliseconds(launch, m, n, d, device, dtype)
        except (OutOfResources, PTXASError) as error:
            if launch == rule(n, d):
                raise
            _log.debug("%s cannot run: %s", launch, error)
    shown = {str(tuple(launch)): times.get(launch) for launch in candidates(n, d)}
    return min(times, key=times.__getitem__), shown


def _milliseconds(launch: Launch, m: int, n: int, d: int, device: torch.device, dtype: torch.dtype) -> float:
    """Of a write with a read and norm, forward and backward with the gradients of all weights; a median."""
    from triton.testing import do_bench

    from vwn.ops import triton

    if device.type != "cuda":
        raise UserError("VWN_TUNE=1 measures on a GPU, and Triton's interpreter runs on a CPU; unset it there")
    if torch.cuda.is_current_stream_capturing():
        raise UserError(
            f"the tiles of ({m}, {n}) at segment width {d} are not measured yet, and cannot be while a CUDA graph is "
            "captured; run the model once before, or unset VWN_TUNE"
        )
    random = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=random, device=device).to(dtype)

    tokens = max(1, min(_TOKENS, _BYTES // (n * d * dtype.itemsize)))
    static, dynamic = (draw(n, m + n), draw(m, n)), (draw(d, m + n), draw(d, m), draw(n, m + n), draw(m, n), draw(d))
    write = RoutingWeights(*static, *dynamic, 1e-6)
    read, norm = write.to_read, NormWeights(draw(m * d, dtype=dtype), 1e-6)
    state, grad_state = (draw(tokens, n * d, dtype=dtype) for _ in range(2))
    z, grad_x = (draw(tokens, m * d, dtype=dtype) for _ in range(2))

    def step() -> None:
        triton.forward(state, z, write, read, norm, launch)
        triton.backward(grad_state, grad_x, state, z, write, read, norm, True, launch)

    with torch.cuda.device_of(state):
        return float(do_bench(step, return_mode="median"))
