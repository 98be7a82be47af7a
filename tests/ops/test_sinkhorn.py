"""Sinkhorn's scaling: doubly stochastic for any logits, and the same gradients as autograd's."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor

from relatives import sinkhorn_by_autograd
from vwn import UserError
from vwn.ops.sinkhorn import sinkhorn, to_polytope

EXACT = pytest.mark.parametrize("exact", [False, True], ids=["rounds", "exact"])
SIZES = pytest.mark.parametrize(("n", "count"), [(1, 3), (3, 35), (16, 37), (64, 5)])


def gradient(f, logits: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    out = f(logits)
    return out.detach(), torch.autograd.grad(out, logits, given.to(out.dtype))[0]


def hard(n: int) -> Tensor:
    """Logits for which 20 rounds are far from enough, and others: ``[k, n, n]``."""
    generator = torch.Generator().manual_seed(n)
    noise = torch.randn(6, n, n, generator=generator)
    order = torch.randperm(n, generator=generator)
    near = 30 * torch.eye(n)[order] + 2 * noise[0]
    same_column = torch.cat([torch.full((n, 1), 40.0), noise[1, :, 1:]], dim=1)
    triangle = 25 * torch.ones(n, n).triu() + noise[2]
    return torch.stack([noise[3], 12 * noise[4], 1000 * noise[5], near, same_column, triangle, torch.zeros(n, n)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 3, 16, 64])
def test_sums_are_one_for_any_logits(n, dtype):
    logits = hard(n).to(dtype)
    p = sinkhorn(logits, exact=True)
    tolerance = 1e-5  # where the rounds have converged to less, the last step does nothing
    assert p.dtype == dtype
    assert (p >= 0).all()
    assert (p.sum(-1) - 1).abs().max() < tolerance
    assert (p.sum(-2) - 1).abs().max() < tolerance
    assert gradient(lambda x: sinkhorn(x, exact=True), logits, torch.randn_like(logits))[1].isfinite().all()
    if n > 2:
        assert (sinkhorn(logits).sum(-1) - 1).abs().max() > 1e-2, "these logits do not need the last step"


def test_the_last_step_leaves_alone_what_is_doubly_stochastic():
    orders = [torch.eye(4)[list(order)] for order in permutations(range(4))]
    weights = torch.rand(len(orders)).softmax(0)
    p = sum(w * order for w, order in zip(weights, orders, strict=True)).double()  # type: ignore[union-attr]
    p = sinkhorn(p.log(), 2000, 0.0)
    torch.testing.assert_close(to_polytope(p), p, rtol=1e-12, atol=1e-13)
    scaled_down_and_filled_up = torch.tensor([[0.75, 0.25], [0.25, 0.75]])  # by hand
    torch.testing.assert_close(to_polytope(torch.tensor([[0.2, 0.1], [0.3, 0.9]])), scaled_down_and_filled_up)


@EXACT
@SIZES
@pytest.mark.parametrize(("eps", "scale"), [(1e-12, 12.0), (1e-6, 1.0)])
def test_against_float64_by_autograd(n, count, eps, scale, exact):
    logits = scale * torch.randn(count, n, n)
    given = torch.randn(count, n, n, dtype=torch.float64)
    wanted, wanted_gradient = gradient(lambda x: sinkhorn_by_autograd(x, 20, eps, exact), logits.double(), given)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-12)):
        found, found_gradient = gradient(lambda x: sinkhorn(x, 20, eps, exact), logits.to(dtype), given)
        assert found.dtype == found_gradient.dtype == dtype
        assert (found - wanted).abs().max() < tolerance
        assert (found_gradient - wanted_gradient).abs().max() < tolerance * max(1, wanted_gradient.abs().max())


def test_any_leading_dimensions_strides_and_dtypes():
    logits = torch.randn(2, 3, 4, 4)
    wanted = sinkhorn(logits, exact=True)
    assert torch.equal(sinkhorn(logits[1, 2], exact=True), wanted[1, 2])
    assert torch.equal(sinkhorn(logits.mT.contiguous().mT, exact=True), wanted)
    assert sinkhorn(logits.bfloat16()).dtype == torch.float32
    assert sinkhorn(logits[:0]).shape == (0, 3, 4, 4)
    _, first = gradient(lambda x: sinkhorn(x), logits, logits)
    _, turned = gradient(lambda x: sinkhorn(x), logits, logits.mT.contiguous().mT)
    assert torch.equal(first, turned)


@pytest.mark.slow
@EXACT
def test_it_compiles_as_one_graph(exact):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: sinkhorn(x, 3, 1e-6, exact), fullgraph=True, backend="aot_eager")
    logits, given = torch.randn(5, 4, 4), torch.randn(5, 4, 4)
    for one, other in zip(
        gradient(compiled, logits, given), gradient(lambda x: sinkhorn(x, 3, 1e-6, exact), logits, given), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_what_it_refuses():
    with pytest.raises(UserError, match="rounds of Sinkhorn's scaling must be 1 or more, got 0"):
        sinkhorn(torch.randn(3, 3), rounds=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [3, 16])
def test_gradients_at_the_identity_are_the_functions_own(n, dtype):
    """Where a doubly-stochastic carry starts, its sums are one to rounding, which must not decide the gradient."""
    logits = (12 * torch.eye(n)).to(dtype).requires_grad_()
    upstream = torch.randn(n, n, dtype=torch.float64)
    (sinkhorn(logits, exact=True) * upstream.to(dtype)).sum().backward()
    step = 1e-3
    wanted = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            moved = 12 * torch.eye(n, dtype=torch.float64).repeat(2, 1, 1)
            moved[0, i, j] += step
            moved[1, i, j] -= step
            high, low = (sinkhorn(moved, exact=True) * upstream).sum((-2, -1))
            wanted[i, j] = (high - low) / (2 * step)
    torch.testing.assert_close(logits.grad.double(), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
