"""Time, memory and bandwidth. Machines are noisy, so rivals take turns and only ratios within one run are compared."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from functools import cache
from typing import NamedTuple, TypeVar

import torch
import torch._inductor.config
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from vwn import Geometry
from vwn.common.memory import keep_freed_memory
from vwn.cost.connection import connection_cost

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")

FLUSH_BYTES = 256 << 20
"""More than any GPU's second-level cache."""
CLOCK = 2e9
"""Cycles per second, at least as many as a GPU has: waiting so many cycles is waiting a second or more."""


def settle(threads: int) -> None:
    """On a CPU, use so many threads, keep freed memory as ``vwn train`` does, and compile in this process alone."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    if not torch.cuda.is_available():
        torch._inductor.config.compile_threads = 1


class Times(NamedTuple):
    """Seconds of one call."""

    median: float
    best: float


def take_turns(
    calls: Mapping[Key, Callable[[], object]],
    device: torch.device,
    rounds: int,
    warmup: int = 2,
    sample_seconds: float = 2e-3,
    kernels_alone: bool = False,
) -> dict[Key, Times]:
    """Time every call once a round, all in turn, for ``rounds`` rounds.

    Args:
        calls: what to time.
        device: where it runs: CUDA events on a GPU, the wall clock on a CPU.
        rounds: samples of each.
        warmup: calls before the first sample.
        sample_seconds: a sample repeats a call until it takes about this long.
        kernels_alone: on a GPU, time one call at a time with a cold cache and all its launches queued beforehand, so
            that the sample is what the GPU does, not how fast Python launches it.
    """
    plans: dict[Key, tuple[int, float | None]] = {}
    for key, call in calls.items():
        for _ in range(warmup):
            call()
        took, launched = _first_look(call, device)
        if kernels_alone and device.type == "cuda":
            plans[key] = 1, launched
        else:
            plans[key] = max(1, min(1000, math.ceil(sample_seconds / took))), None
    samples: dict[Key, list[float]] = {key: [] for key in calls}
    gc.collect()
    gc.freeze()  # what is there already need not be looked at between rounds
    gc.disable()
    try:
        for _ in range(rounds):
            gc.collect()
            for key, call in calls.items():
                repeats, queued = plans[key]
                seconds = _on_gpu if device.type == "cuda" else _on_cpu
                samples[key].append(seconds(call, repeats, queued))
    finally:
        gc.enable()
        gc.unfreeze()
    return {key: Times(statistics.median(s), min(s)) for key, s in samples.items()}


def _first_look(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds of one call, and of launching it."""
    _wait(device)
    start = time.perf_counter()
    call()
    launched = time.perf_counter() - start
    _wait(device)
    return time.perf_counter() - start, launched


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _on_cpu(call: Callable[[], object], repeats: int, launched: float | None) -> float:
    call()  # not after whatever filled the caches before
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _on_gpu(call: Callable[[], object], repeats: int, launched: float | None) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if launched is not None:
        _filler().sum()  # read, not written: what is written would go back to memory on the account of the call
        torch.cuda._sleep(int(CLOCK * min(0.1, 1e-4 + 2 * launched)))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


@cache
def _filler() -> Tensor:
    return torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")


class Copy:
    """A plain copy of a large buffer: the bandwidth that everything is held against.

    Args:
        elements: of the buffer; large enough not to fit in a cache.
    """

    def __init__(self, elements: int, dtype: torch.dtype, device: torch.device) -> None:
        self._source = torch.ones(elements, dtype=dtype, device=device)
        self._target = torch.empty_like(self._source)
        self.moved = 2 * self._source.nbytes

    def __call__(self) -> Tensor:
        return self._target.copy_(self._source)


def floor(m: int, n: int, hidden_size: int, tokens: int, element: int) -> dict[str, int]:
    """Bytes that a write and a read move at the least (section 6, fused): ``(2r+2) D e`` and ``(3r+3) D e``."""
    cost = connection_cost(Geometry(hidden_size, m, n), element)
    return _passes(cost.forward_bytes * tokens, cost.backward_bytes * tokens)


def plain_floor(hidden_size: int, tokens: int, element: int) -> dict[str, int]:
    """The same of a residual add and a norm: stream and sublayer's output in, stream and normed out; back, two
    gradients and the stream in, one gradient out."""
    return _passes(*[4 * hidden_size * element * tokens] * 2)


def _passes(forward: int, backward: int) -> dict[str, int]:
    return {"forward": forward, "backward": backward, "forward + backward": forward + backward}


class Memory(NamedTuple):
    """Bytes above what there was before."""

    live: int
    peak: int


def memory_of(call: Callable[[], Result], device: torch.device) -> tuple[Result, Memory]:
    """Run ``call``: what it returns, what is then still allocated, and the most that was.

    On a CPU the profiler reports each allocation of PyTorch's allocator. Hooks on saved tensors would not see what is
    saved under other hooks, which is how states that are to be rebuilt are kept.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        return result, Memory(torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
        gc.collect()
    assert profiler.profiler is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return result, Memory(live, peak)
