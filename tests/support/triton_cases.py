"""Inputs of the Triton kernels, the reference's results in float64, and how near they have to be."""

from __future__ import annotations

import torch
from torch import Tensor

from vwn.ops import reference
from vwn.ops import triton as backend
from vwn.ops.weights import Inputs, NormWeights, RoutingWeights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = [torch.bfloat16, torch.float16]


class Case:
    """Random inputs and weights of a write and a read; no gain is one, no scale zero."""

    carry = True  # or the identity

    def __init__(
        self, m, n, d, dtype=torch.float32, tokens=None, write=True, read=True, norm=True, dynamic=(True, True)
    ):
        self.generator = torch.Generator().manual_seed(0)
        self.tokens = (1 if n >= 64 else 3 if n >= 8 else 9) if tokens is None else tokens
        self.dtype = dtype
        self.write = self.weights(m, n, d, dynamic[0]) if write else None
        self.read = self.weights(m, n, d, dynamic[1]).to_read if read else None
        self.norm = NormWeights((1 + 0.3 * self.draw(m * d)).to(dtype), 1e-5) if norm and read else None
        self.state, self.z = self.rows(n * d), self.rows(m * d) if write else None
        self.grad_state, self.grad_x = self.rows(n * d), self.rows(m * d) if read else None

    def draw(self, *shape):
        return torch.randn(*shape, generator=self.generator).to(DEVICE)

    def rows(self, width):
        return self.draw(self.tokens, width).to(self.dtype)

    def weights(self, m, n, d, dynamic):
        columns = m + n if self.carry else m
        static = self.draw(n, columns), self.draw(m, n)
        if not dynamic:
            return RoutingWeights(*static)
        rest = self.draw(d, columns), self.draw(d, m), self.draw(n, columns), self.draw(m, n), 1 + 0.3 * self.draw(d)
        return RoutingWeights(*static, *rest, 1e-3)

    @property
    def inputs(self):
        return Inputs(self.state, self.z, self.write, self.read, self.norm)

    def forward(self):
        return backend.forward(self.inputs)

    def backward(self, grad_state=True, needs_weights=True):
        return backend.backward(self.grad_state if grad_state else None, self.grad_x, self.inputs, needs_weights)

    def exact_forward(self):
        return reference.forward(*wide(self.inputs))

    def exact_backward(self, grad_state=True, needs_weights=True):
        given = self.grad_state if grad_state else None
        return reference.backward(*wide(given, self.grad_x, self.inputs), needs_weights)


def wide(*values):
    """Everything in float64."""

    def convert(value):
        if isinstance(value, Tensor):
            return value.double()
        return type(value)(*map(convert, value)) if isinstance(value, tuple) else value

    return [convert(value) for value in values]


def assert_close(actual: Tensor, exact: Tensor, ulps: float = 1.0, relative: float = 1e-5) -> None:
    """Within ``ulps`` of the dtype at each number, but for ``relative`` of the largest."""
    assert actual.shape == exact.shape
    if not exact.numel():
        return
    allowed = relative * exact.abs().max()
    if actual.dtype in HALF:
        allowed = allowed + ulps * torch.finfo(actual.dtype).eps * 2.0 ** exact.abs().log2().floor()
    assert bool(((actual.double() - exact).abs() <= allowed).all()), (actual.double() - exact).abs().max()


def assert_all_close(actual, exact, **tolerance) -> None:
    assert len(actual) == len(exact)
    for a, e in zip(actual, exact, strict=True):
        assert_close(a, e, **tolerance)


def assert_same(actual, expected) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
