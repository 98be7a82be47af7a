"""What is compared with one write and one read of ours.

A rival's state and ``z`` hold the same numbers as ours, laid out as the rival wants them. Ours, fused, writes for one
sublayer and reads for the next; who has no such operation reads and writes for the same sublayer, which in a deep
model is the same work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import listing
from vwn import ops
from vwn.ops import NormWeights, RoutingWeights

LISTING = "listing, eager"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


class Rival(NamedTuple):
    """One write and one read, with gradients for ``leaves``."""

    name: str
    run: Callable[[], tuple[Tensor, Tensor]]
    leaves: list[Tensor]
    computes: str

    def forward(self) -> tuple[Tensor, Tensor]:
        """As in training, with the graph recorded."""
        return self.run()

    def both(self) -> tuple[Tensor, ...]:
        """Forward, and backward to the state, ``z`` and every weight."""
        outputs = self.run()
        return torch.autograd.grad(outputs, self.leaves, [o.detach() for o in outputs])


def mapped(w: RoutingWeights, change: Callable[[Tensor], Tensor]) -> RoutingWeights:
    """The weights, each tensor changed."""
    return RoutingWeights(*(change(t) if isinstance(t, Tensor) else t for t in w))


class Inputs:
    """A state, a sublayer's output and a connection's weights, random and the same for every rival."""

    def __init__(
        self, m: int, n: int, hidden_size: int, tokens: int, dtype: torch.dtype, device: torch.device, seed: int = 0
    ) -> None:
        d = hidden_size // m
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            # rounded to the state's dtype, so that a rival that keeps its weights in it computes the same
            return (scale * torch.randn(*shape, generator=generator, device=device)).to(dtype)

        small = [(n, m + n), (m, n), (d, m + n), (d, m), (n, m + n), (m, n), (d,)]
        self.m, self.n, self.hidden_size, self.tokens = m, n, hidden_size, tokens
        self.dtype, self.device = dtype, device
        self.state = draw(tokens, n * d).requires_grad_()
        self.z = draw(tokens, hidden_size).requires_grad_()
        self._small = [draw(*shape, scale=0.3) for shape in small]
        self.weights = self.connection(torch.float32)
        self.norm = NormWeights(draw(hidden_size).requires_grad_())

    def connection(self, dtype: torch.dtype) -> RoutingWeights:
        """The weights as leaves of their own."""
        return RoutingWeights(*(t.to(dtype, copy=True).requires_grad_() for t in self._small), 1e-6)

    def leaves(self, weights: RoutingWeights) -> list[Tensor]:
        """What gradients are for."""
        return [self.state, self.z, *[t for t in weights if isinstance(t, Tensor)]]


def ours(i: Inputs, backend: str) -> Iterator[Rival]:
    """Ours, fused and not, and the reference."""
    w, leaves = i.weights, i.leaves(i.weights)

    alphas = {name: getattr(w, name).detach() for name in ("bias_alpha", "dynamic_alpha", "scale_alpha")}
    reads = w._replace(**{name: t[:, : i.m].clone().requires_grad_() for name, t in alphas.items()})

    def fused(
        backend: str, norm: NormWeights | None = None, w: RoutingWeights = w
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        return lambda: ops.write_read(i.state, i.z, w, w, norm, backend)

    def separate() -> tuple[Tensor, Tensor]:
        new = ops.write(i.state, i.z, w, backend)
        return new, ops.read(new, w, backend=backend)

    chosen = ops.choose(backend, i.device, i.dtype, i.n)
    yield Rival("ours", fused(backend), leaves, f"write, then read of the next: backend {chosen!r}")
    yield Rival("ours, separate", separate, leaves, "the same, in two operations")
    yield Rival("ours, with the norm", fused(backend, i.norm), [*leaves, i.norm.weight], "and the next one's RMSNorm")
    yield Rival("ours, identity carry", fused(backend, None, reads), i.leaves(reads), "without the mix of the slots")
    yield Rival("reference", fused("reference"), leaves, "the same, backend 'reference'")


def paper(i: Inputs) -> Iterator[Rival]:
    """The paper's listing in the state's own dtype, as it is and compiled."""
    w = i.connection(i.dtype)
    check_listing(i, w)
    torch._dynamo.reset()
    compiled = torch.compile(listing.read_and_write, fullgraph=True, dynamic=False)
    same = "read and write of one sublayer; checked to equal ours"
    yield Rival(LISTING, lambda: listing.read_and_write(i.state, i.z, w), i.leaves(w), same)
    yield Rival("listing, compiled", lambda: compiled(i.state, i.z, w), i.leaves(w), same)


def check_listing(i: Inputs, w: RoutingWeights) -> None:
    """The listing is the same function as ours, and so is its gradient, to the dtype's accuracy."""
    theirs = listing.read_and_write(i.state, i.z, w)
    mine = ops.write(i.state, i.z, i.weights), ops.read(i.state, i.weights)
    gradients = [torch.autograd.grad(both, [i.state, i.z], [b.detach() for b in mine]) for both in (theirs, mine)]
    names = ("state", "x", "gradient of the state", "gradient of z")
    for name, a, b in zip(names, (*theirs, *gradients[0]), (*mine, *gradients[1]), strict=True):
        error = ((a - b).float().norm() / b.float().norm()).item()
        if not error <= TOLERANCE[i.dtype]:
            raise AssertionError(f"the listing's {name} differs from ours by {error:.2e} at m={i.m}, n={i.n}")


def plain(i: Inputs) -> Iterator[Rival]:
    """What a model without virtual width does between two sublayers: a residual add and an RMSNorm."""
    stream = i.state[:, : i.hidden_size].detach().clone().requires_grad_()
    gain = i.norm.weight

    def add_and_norm(h: Tensor, z: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        new = h + z
        return new, F.rms_norm(new, (i.hidden_size,), gain, 1e-6)

    compiled = torch.compile(add_and_norm, fullgraph=True, dynamic=False)
    leaves = [stream, i.z, gain]
    yield Rival("plain, eager", lambda: add_and_norm(*leaves), leaves, "residual add and RMSNorm at width D")
    yield Rival("plain, compiled", lambda: compiled(*leaves), leaves, "residual add and RMSNorm at width D")


def lucidrains(i: Inputs) -> Rival | str:
    """PyPI ``hyper-connections`` with ``num_fracs = m``, or why not."""
    if i.n % i.m:
        return f"it has whole streams, n/m = {i.n / i.m:g} is not whole"
    try:
        from hyper_connections.hyper_connections import HyperConnections
    except ImportError as error:
        return f"hyper-connections is not installed: {error}"
    module = HyperConnections(i.n // i.m, dim=i.hidden_size, num_fracs=i.m, layer_index=0).to(i.device, i.dtype)
    _randomise(module)
    streams = i.state.detach().unflatten(-1, (i.n // i.m, -1)).movedim(1, 0).contiguous().requires_grad_()
    z = i.z.detach()[None].clone().requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        x, residuals, others = module.width_connection(streams)
        return module.depth_connection(z, residuals, **others), x

    differs = "read and write of one sublayer; dynamic B indexed by the source fraction, scalar scales, tied rows of B"
    return Rival("hyper-connections", run, [streams, z, *module.parameters()], differs)


def liger(i: Inputs) -> Rival | str:
    """Liger-Kernel's mHC with ``n / m`` streams of width ``D``, or why not."""
    if i.n % i.m:
        return f"it has whole streams, n/m = {i.n / i.m:g} is not whole"
    if i.device.type != "cuda":
        return "its kernels run on a GPU only"
    try:
        from liger_kernel.transformers.functional import liger_mhc_coeffs, liger_mhc_post_res, liger_mhc_pre
        from liger_kernel.transformers.mhc import LigerMHC
    except ImportError as error:
        return f"Liger-Kernel's mHC is not installed: {error}"
    streams = i.n // i.m
    module = LigerMHC(nn.Identity(), hc=streams, c=i.hidden_size, phi_dtype=i.dtype).to(i.device)
    state = i.state.detach().unflatten(-1, (streams, -1)).clone().requires_grad_()
    z = i.z.detach().clone().requires_grad_()
    weights = [module.phi, module.b, module.alpha_pre, module.alpha_post, module.alpha_res]

    def run() -> tuple[Tensor, Tensor]:
        pre, post, carry = liger_mhc_coeffs(state, *weights, allow_fp32=i.dtype == torch.float32)
        return liger_mhc_post_res(state, z, post, carry), liger_mhc_pre(state, pre)

    differs = "read and write of one sublayer; mHC, another function: m = 1, routing from the whole state, Sinkhorn"
    return Rival("Liger-Kernel mHC", run, [state, z, *weights], differs)


@torch.no_grad()
def _randomise(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
