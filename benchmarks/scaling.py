"""Whether cost is linear: a boundary against the number of tokens and of slots, a training step against depth.

A boundary is one write and one read. Few tokens, as in decoding, are timed without gradients, with what Python takes
to launch them; on a GPU also as a CUDA graph. An exponent of 1 is linear: it is the slope of log time on log size, of
the sizes from 256 tokens on.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import measure, models, rivals
from benchmarks.models import Training
from benchmarks.report import NOT_MEASURED, Report, parser
from benchmarks.rivals import Inputs, Rival

SHAPES = [(2, 3), (4, 16)]
SERIES = ("decoding", "tokens", "slots", "depth")
LARGE_FROM = 256
NOTES = {
    "decoding": "1 to 16 tokens, no gradients, wall time with launches; 'graph' is the same replayed as a CUDA graph",
    "training": "forward and backward with the gradients of all weights",
    "relative": "time per unit over that of the largest size of the same series: 1 everywhere is linear",
    "exponent": "slope of log time on log size (tokens from 256 on): 1 is linear",
    "depth": "whole training steps; residual of the line through them, over the time",
}
COLUMNS = {
    "series": "14s",
    "connection": "10s",
    "who": "24s",
    "size": "7d",
    "median_us": "12.2f",
    "us_per_unit": "12.4f",
    "relative": "8.2f",
    "exponent": "8.2f",
    "off_the_line": "12.3f",
}


def main() -> None:
    """Measure, show, write."""
    p = parser("scaling", __doc__)
    p.add_argument(
        "--series", type=lambda text: text.split(","), default=list(SERIES), help=f"by default {','.join(SERIES)}"
    )
    options = p.parse_args()
    measure.settle(1 if options.device == "cpu" else torch.get_num_threads())
    report = Report(options, NOTES, COLUMNS)
    for shape in options.shapes or (SHAPES[:1] if options.quick else SHAPES):
        if "decoding" in options.series:
            report.extend(_decoding(shape, options))
        if "tokens" in options.series:
            report.extend(_tokens(shape, options))
    if "slots" in options.series:
        report.extend(_slots(options))
    if "depth" in options.series:
        report.extend(_depth(options))
    report.done()


def _width(options: argparse.Namespace) -> int:
    return 32 if options.quick else 2048 if options.device == "cuda" else 512


def _inputs(m: int, n: int, width: int, tokens: int, options: argparse.Namespace) -> Inputs:
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    return Inputs(m, n, width, tokens, dtype, torch.device(options.device))


def _decoding(shape: tuple[int, int], options: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for tokens in (1, 4) if options.quick else (1, 2, 4, 8, 16):
        inputs = _inputs(*shape, _width(options), tokens, options)
        wanted = ("ours, with the norm", "ours, separate", "reference", "plain, eager")
        everyone = [*rivals.ours(inputs, options.backend), *rivals.plain(inputs)]
        calls: dict[str, Callable[[], Any]] = {r.name: _inference(r) for r in everyone if r.name in wanted}
        failed = {}
        for name in ("ours, with the norm", "plain, eager"):
            graph = _graph(calls[name], options.device)
            if isinstance(graph, str):
                failed[f"{name}, graph"] = graph
            else:
                calls[f"{name}, graph"] = graph
        times = measure.take_turns(calls, inputs.device, _rounds(options), sample_seconds=_sample(options))
        labels = {"series": "decoding", "connection": list(shape), "width": _width(options), "size": tokens}
        rows += [labels | {"who": name, **_microseconds(times[name], tokens)} for name in times]
        rows += [labels | {"who": name, NOT_MEASURED: reason} for name, reason in failed.items()]
    return rows


def _inference(rival: Rival) -> Callable[[], Any]:
    def call() -> Any:
        with torch.no_grad():
            return rival.run()

    return call


def _graph(call: Callable[[], Any], device: str) -> Callable[[], Any] | str:
    """The call captured as a CUDA graph, or why not."""
    if device != "cuda":
        return "CUDA graphs need a GPU"
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is set up at the first call must not be captured
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = call()
    except RuntimeError as error:
        return f"capture failed: {str(error).splitlines()[0]}"

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


def _tokens(shape: tuple[int, int], options: argparse.Namespace) -> list[dict[str, Any]]:
    sizes = [4, 16] if options.quick else [16, 64, 256, 1024, 4096, 16384]
    cases = {size: _inputs(*shape, _width(options), size, options) for size in sizes}
    labels = {"series": "tokens", "connection": list(shape), "width": _width(options)}
    return _series(labels, cases, options, LARGE_FROM)


def _slots(options: argparse.Namespace) -> list[dict[str, Any]]:
    """More slots of the same width, four segments, the same tokens."""
    sizes = [4, 8] if options.quick else [4, 8, 16, 32, 64]
    width, tokens = _width(options), 4 if options.quick else 8192 if options.device == "cuda" else 1024
    cases = {n: _inputs(4, n, width, tokens, options) for n in sizes}
    return _series({"series": "slots", "width": width, "tokens": tokens}, cases, options, 0)


def _series(
    labels: dict[str, Any], cases: dict[int, Inputs], options: argparse.Namespace, fit_from: int
) -> list[dict[str, Any]]:
    """Ours, forward and backward, at all sizes in turn."""
    calls = {size: next(rivals.ours(inputs, options.backend)).both for size, inputs in cases.items()}
    device = torch.device(options.device)
    times = measure.take_turns(calls, device, _rounds(options), sample_seconds=_sample(options), kernels_alone=True)
    largest = max(times)
    fitted = [size for size in times if size >= fit_from or options.quick]
    slope = measure.exponent(fitted, [times[size].median for size in fitted])
    rows = []
    for size, seconds in times.items():
        relative = seconds.median / size / (times[largest].median / largest)
        row = {"who": "ours, training", "size": size, **_microseconds(seconds, size), "relative": relative}
        rows.append(labels | {"connection": [cases[size].m, cases[size].n]} | row | {"exponent": slope})
    return rows


def _depth(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Whole steps of models of several depths, plain and wide, without multi-token prediction."""
    depths = [1, 2] if options.quick else [2, 4, 8, 16]
    size = models.preset("dense", options.device, options.quick)
    batch = models.tokens(options.device, options.quick)
    rows = []
    for connection in (None, (4, 16)):
        backend = options.backend if connection else "auto"
        calls = {
            depth: Training(size, connection, options.device, batch, backend, mtp=0, depth=depth).step
            for depth in depths
        }
        times = measure.take_turns(calls, torch.device(options.device), _rounds(options) // 2 + 1, sample_seconds=0.0)
        line = statistics.linear_regression(depths, [times[d].median for d in depths])
        for depth, seconds in times.items():
            off = abs(line.slope * depth + line.intercept - seconds.median) / seconds.median
            row = {"who": "plain" if connection is None else "ours, auto", "size": depth, "off_the_line": off}
            labels = {"series": "depth", "width": size.width, "connection": connection and list(connection)}
            # a step has a part that no layer adds to, so the unit is the line's slope
            rows.append(labels | row | _microseconds(seconds, depth) | {"us_per_unit": line.slope * 1e6})
    return rows


def _rounds(options: argparse.Namespace) -> int:
    return 3 if options.quick else 20 if options.device == "cuda" else 7


def _sample(options: argparse.Namespace) -> float:
    return 0.0 if options.quick else 5e-3


def _microseconds(times: measure.Times, size: int) -> dict[str, float]:
    return {"median_us": times.median * 1e6, "min_us": times.best * 1e6, "us_per_unit": times.median * 1e6 / size}


if __name__ == "__main__":
    main()
