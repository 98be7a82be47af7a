"""How far the backends are from float64: routing, outputs and every gradient, with all weights perturbed.

Errors are of one write and read at random weights and inputs. Routing: root mean square. Outputs: largest distance
from the float64 result in units of the last place of the state's dtype at the size of the largest output of the token
(0.5 is correct rounding); what is read is held against float64's read of the same, rounded, state. Gradients: largest
error relative to the largest gradient of the same tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.report import NOT_MEASURED, Report, parser
from benchmarks.rivals import Inputs, mapped
from vwn import ops
from vwn.common.errors import UserError
from vwn.ops import RoutingWeights

SHAPES = ((2, 3), (4, 8), (4, 16), (8, 64))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COLUMNS = {
    "backend": "10",
    "connection": "10",
    "dtype": "9",
    "routing_rms": "12.1e",
    "output_ulp": "11.3f",
    "gradient_inputs": "15.1e",
    "gradient_weights": "16.1e",
}


def main() -> None:
    """One row for each backend, shape and dtype."""
    options = parser("accuracy", __doc__).parse_args()
    width, tokens = (64, 33) if options.quick else (512, 257)
    report = Report(options, {"sizes": f"width {width}, {tokens} tokens"}, COLUMNS)
    fast = {"cpu": "compiled", "cuda": "triton"}[options.device]
    backends = ("reference", fast) if options.backend == "auto" else (options.backend,)
    for backend in backends:
        for m, n in options.shapes or SHAPES:
            for dtype in DTYPES:
                row = {"backend": backend, "connection": [m, n], "dtype": str(dtype).removeprefix("torch.")}
                try:
                    inputs = Inputs(m, n, width, tokens, dtype, torch.device(options.device))
                    report.add(row | errors(backend, inputs))
                except UserError as error:
                    report.add(row | {NOT_MEASURED: str(error)})
    report.done()


def errors(backend: str, inputs: Inputs) -> dict[str, Any]:
    """Distances of one backend from float64 for one shape and dtype."""
    draw = torch.Generator(inputs.device).manual_seed(1)
    gradients = [torch.randn(t.shape, generator=draw, device=t.device).to(t) for t in (inputs.state, inputs.z)]
    ours = run(backend, inputs, gradients, inputs.dtype)
    exact = run("reference", inputs, gradients, torch.float64)
    exact_x = ops.read(ours[0].double(), _doubled(inputs.weights), backend="reference")
    return {
        "routing_rms": routing_rms(backend, inputs.state.detach(), inputs.weights),
        "output_ulp": max(ulps(ours[0], exact[0]), ulps(ours[1], exact_x)),
        "gradient_inputs": max(relative(a, b) for a, b in zip(ours[2:4], exact[2:4], strict=True)),
        "gradient_weights": max(relative(a, b) for a, b in zip(ours[4:], exact[4:], strict=True)),
    }


def run(backend: str, inputs: Inputs, gradients: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """New state, what is read, and the gradients of state, ``z`` and all weights."""
    compute = torch.promote_types(dtype, torch.float32)
    state, z = (t.detach().to(dtype).requires_grad_() for t in (inputs.state, inputs.z))
    w = mapped(inputs.weights, lambda t: t.detach().to(compute).requires_grad_())
    outputs = ops.write_read(state, z, w, w, backend=backend)
    leaves = [t for t in (state, z, *w) if isinstance(t, Tensor)]
    found = torch.autograd.grad(outputs, leaves, [g.to(dtype) for g in gradients])
    return [*(o.detach() for o in outputs), *found]


@torch.no_grad()
def routing_rms(backend: str, state: Tensor, w: RoutingWeights) -> float:
    """Error of the routing itself, seen through the op: a float32 state whose sublayer wrote unit segments.

    With ``Z`` the unit vectors and nothing carried, the new state is ``B``; column by column of the write.
    """
    wide = state.float()
    m, d = w.m, wide.shape[-1] // w.n
    still = w._replace(bias_alpha=torch.zeros_like(w.bias_alpha), scale_alpha=torch.zeros_like(w.bias_alpha))
    squares = []
    for segment in range(m):
        z = torch.zeros(wide.shape[0], m, d, device=wide.device)
        z[:, segment, 0] = 1
        got = ops.write(wide, z.flatten(1), still, backend=backend)
        exact = ops.write(wide.double(), z.flatten(1).double(), _doubled(still), backend="reference")
        squares.append((got.double() - exact).unflatten(-1, (w.n, d))[..., 0].square())
    return float(torch.stack(squares).mean().sqrt())


def _doubled(w: RoutingWeights) -> RoutingWeights:
    return mapped(w, Tensor.double)


def ulps(actual: Tensor, exact: Tensor) -> float:
    """Largest error in units of the last place at the size of the token's largest number."""
    size = exact.abs().amax(-1, keepdim=True)
    ulp = torch.exp2(torch.floor(torch.log2(size))) * torch.finfo(actual.dtype).eps
    return float(((actual.double() - exact).abs() / ulp).max())


def relative(actual: Tensor, exact: Tensor) -> float:
    """Largest error relative to the largest number."""
    return float((actual.double() - exact).abs().max() / exact.abs().max())


if __name__ == "__main__":
    main()
