"""One write and one read of few tokens, as in decoding: without gradients, with what Python takes to launch them.

On a GPU also as a CUDA graph.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import measure, rivals
from benchmarks.report import NOT_MEASURED, Report, parser
from benchmarks.rivals import Inputs, Rival

SHAPES = [(2, 3), (4, 16)]
WHO = ("ours, with the norm", "ours, separate", "reference", "plain, eager")
IN_GRAPHS = ("ours, with the norm", "plain, eager")
NOTES = {"time": "wall time of a call with its launches, no gradients; 'graph' is the same replayed as a CUDA graph"}
COLUMNS = {"connection": "10s", "who": "26s", "tokens": "7d", "median_us": "12.2f", "min_us": "12.2f"}


def main() -> None:
    """Measure, show, write."""
    options = parser("decoding", __doc__).parse_args()
    measure.settle(1 if options.device == "cpu" else torch.get_num_threads())
    report = Report(options, NOTES, COLUMNS)
    for shape in options.shapes or (SHAPES[:1] if options.quick else SHAPES):
        for tokens in (1, 4) if options.quick else (1, 2, 4, 8, 16):
            report.extend(_rows(shape, tokens, options))
    report.done()


def _rows(shape: tuple[int, int], tokens: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    width = 32 if options.quick else 2048 if options.device == "cuda" else 512
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    inputs = Inputs(*shape, width, tokens, dtype, torch.device(options.device))
    everyone = [*rivals.ours(inputs, options.backend), *rivals.plain(inputs)]
    calls: dict[str, Callable[[], Any]] = {r.name: _inference(r) for r in everyone if r.name in WHO}
    failed = {}
    for name in IN_GRAPHS:
        graph = _graph(calls[name], options.device)
        if isinstance(graph, str):
            failed[f"{name}, graph"] = graph
        else:
            calls[f"{name}, graph"] = graph
    rounds = 3 if options.quick else 20 if options.device == "cuda" else 7
    times = measure.take_turns(calls, inputs.device, rounds, sample_seconds=0.0 if options.quick else 5e-3)
    labels = {"connection": list(shape), "width": width, "tokens": tokens}
    rows = [labels | {"who": n, "median_us": t.median * 1e6, "min_us": t.best * 1e6} for n, t in times.items()]
    return rows + [labels | {"who": name, NOT_MEASURED: reason} for name, reason in failed.items()]


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


if __name__ == "__main__":
    main()
