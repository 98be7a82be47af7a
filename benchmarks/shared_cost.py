"""What the Triton kernels' shared memory costs on an H100 or H200, without either: a bound, not a measurement.

The compiled kernels run on a machine of threads (:mod:`benchmarks.ptx`), which counts the rows of 128 bytes that pass
to and from shared memory, bank conflicts included, and what tensor cores read there: a processor moves one row a cycle.
"Shared" is that time relative to the time in which a copy moves the bytes of the floor (as
:mod:`benchmarks.static_cost`): a kernel is slower than the greater of that and one. The backward's launch for the
gradients of the write's projections, where it has one, is included; those that make the projections ready, and that
sum up the programs' parts, are not: they do not grow with the tokens.
"""

from __future__ import annotations

import torch

from benchmarks import ptx
from benchmarks.report import NOT_MEASURED, Report, parser
from benchmarks.static_cost import BANDWIDTH, CLOCK, PROCESSORS, SHAPES, WIDTHS, unavailable

TOKENS = 32
COLUMNS = {"connection": "10", "width": "6d", "kernel": "9", "norm": "6", "rows_per_token": "15.0f", "shared": "8.2f"}


def main() -> None:
    """One row for each shape, width and kernel."""
    options = parser("shared_cost", __doc__).parse_args()
    notes = {"shared": "of a bound, in parts of a copy's time; not measured", "of": "H200: 132 processors, 1.75 GHz"}
    report = Report(options, notes, COLUMNS)
    if reason := unavailable() or ptx.unavailable():
        report.add({NOT_MEASURED: reason})
        return report.done()
    ptx.ORDERS = 1
    ptx.install()
    for m, n in options.shapes or SHAPES:
        for width in WIDTHS[:1] if options.quick else WIDTHS:
            for norm in (False, True):
                for name, passes, rows in counted(m, n, width, norm):
                    copied = passes * (n * width // m + width) * 2 / BANDWIDTH * PROCESSORS * CLOCK
                    what = {"connection": [m, n], "width": width, "kernel": name, "norm": norm}
                    report.add(what | {"rows_per_token": rows, "shared": rows / copied})
    return report.done()


def counted(m: int, n: int, width: int, norm: bool) -> list[tuple[str, int, float]]:
    """Forward and backward, how often each moves the state at the least, and rows per token."""
    from vwn.ops import triton, triton_weights
    from vwn.ops.weights import NormWeights, RoutingWeights

    d, draw, stored = width // m, torch.randn, torch.bfloat16
    shapes = [(n, m + n), (m, n), (d, m + n), (d, m), (n, m + n), (m, n), (d,)]
    write = RoutingWeights(*(draw(shape) for shape in shapes), 1e-6)
    weights = write, write.to_read, NormWeights(draw(width).to(stored), 1e-6) if norm else None
    state, z = (draw(TOKENS, size).to(stored) for size in (n * d, width))
    triton_weights.PROGRAMS = 1  # of all tokens: what it does once in the end is to count little, as of many
    ptx.launches.clear()
    triton.forward(state, z, *weights)
    triton.backward(state, z, state, z, *weights, True, programs=1)
    rows = {name: passed / TOKENS for name, passed in ptx.launches}
    return [("forward", 2, rows["boundary"]), ("backward", 3, rows["boundary_backward"] + rows.get("over_rows", 0))]


if __name__ == "__main__":
    main()
