"""What the launches of the Triton kernels cost: tiles, warps, and how many programs the backward has.

For whoever makes the kernels faster: the forward and the backward of one write and read, by each of the launches that
``VWN_TUNE=1`` chooses among, the backward by several numbers of programs. All of a shape take turns, and the share is
of a plain copy in the same rounds. The first launch is the rule's; its backward is also measured without the gradients
of the weights, for what they cost, and with those of the write's projections apart if the rule has them together, or
together if it has them apart.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import measure
from benchmarks.connections import SHAPES, SIZES
from benchmarks.report import NOT_MEASURED, Report, parser
from benchmarks.rivals import Inputs
from vwn.ops import NormWeights
from vwn.ops import triton as backend
from vwn.ops.triton_tuning import Launch, apart, candidates

WARPS = (528, 1056, 2112, 4224)
"""Of all programs of a backward, half of, and as many as an H100 has registers for, and more."""
NOTES = {
    "unit": "one write and one read; weights: the backward includes the gradients of all weights",
    "share of copy": "bytes of the fused floor over the median time, relative to a large copy's in the same rounds",
}
COLUMNS = {
    "connection": "10s",
    "width": "6d",
    "pass": "8s",
    "columns": "7d",
    "keep": "4d",
    "warps": "5d",
    "programs": "8d",
    "weights": "7d",
    "apart": "5d",
    "median_ms": "9.3f",
    "share_of_copy": "13.3f",
}


def main() -> None:
    """Measure, show, write."""
    p = parser("launches", __doc__)
    p.add_argument("--widths", type=lambda text: [int(w) for w in text.split(",")], help="such as 2048,4096")
    p.add_argument("--norm", action="store_true", help="with the reading sublayer's RMSNorm")
    options = p.parse_args()
    report = Report(options, NOTES | {"norm": str(options.norm)}, COLUMNS)
    device = torch.device(options.device)
    widths, tokens, dtype, elements = SIZES["quick" if options.quick else options.device]
    tokens = 8 if options.quick else tokens
    if reason := backend.unavailable(device, dtype):
        report.add({NOT_MEASURED: reason})
        return report.done()
    copy = measure.Copy(elements, dtype, device)
    for width in widths if options.quick else options.widths or widths:
        for m, n in options.shapes or (SHAPES[:1] if options.quick else SHAPES):
            inputs = Inputs(m, n, width, tokens, dtype, device)
            report.extend(compare(inputs, inputs.norm if options.norm else None, copy, options))
    return report.done()


@torch.no_grad()
def compare(
    i: Inputs, norm: NormWeights | None, copy: measure.Copy, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of all launches at one shape; one that the GPU cannot run says why."""
    rows, calls = [], {"copy": copy}
    for key, row, call in calls_of(i, norm, candidates(i.n, i.hidden_size // i.m)[: 1 if options.quick else None]):
        try:
            call()
            calls[key] = call  # type: ignore[assignment]
        except Exception as error:
            row[NOT_MEASURED] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        rows.append((key, row))
    rounds = 1 if options.quick else 20
    times = measure.take_turns(calls, i.device, rounds, warmup=1, sample_seconds=0.0, kernels_alone=True)
    copied = copy.moved / times["copy"].median
    floors = measure.floor(i.m, i.n, i.hidden_size, i.tokens, i.dtype.itemsize)
    for key, row in rows:
        if key in times:
            seconds = times[key].median
            row |= {"median_ms": seconds * 1e3, "share_of_copy": floors[row["pass"]] / seconds / copied}
    return [row for _, row in rows]


def calls_of(
    i: Inputs, norm: NormWeights | None, launches: tuple[Launch, ...]
) -> Iterator[tuple[str, dict[str, Any], Callable[[], object]]]:
    """For each row its name, what it says of the launch, and what is measured."""
    weights = i.weights, i.weights.to_read, norm
    grad_state, grad_x = torch.randn_like(i.state), torch.randn_like(i.z)

    def forward(launch: Launch) -> Callable[[], object]:
        return lambda: backend.forward(i.state, i.z, *weights, launch)

    def backward(launch: Launch, programs: int, needed: bool, alone: bool) -> Callable[[], object]:
        tensors = grad_state, grad_x, i.state, i.z
        return lambda: backend.backward(*tensors, *weights, needed, launch, programs, alone)

    for launch in launches:
        row = {"connection": [i.m, i.n], "width": i.hidden_size, **launch._asdict()}
        yield f"{launch}, forward", row | {"pass": "forward"}, forward(launch)
        ruled = apart(i.n)
        more = [(WARPS[1], False, False), (WARPS[1], True, not ruled)] if launch == launches[0] else []
        for warps, needed, alone in (*((warps, True, ruled) for warps in WARPS), *more):
            how = {"programs": warps // launch.warps, "weights": needed, "apart": alone}
            call = backward(launch, how["programs"], needed, alone)
            yield f"{launch}, {tuple(how.values())}", row | {"pass": "backward"} | how, call


if __name__ == "__main__":
    main()
