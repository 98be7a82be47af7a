"""The relatives against other authors' code and their formulas, forward and backward, and as connections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hyper_connections.hyper_connections import HyperConnections
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

from conftest import perturb
from relatives import EVERY_KIND, make, sinkhorn_by_autograd
from vwn import GeneralizedHyperConnection, UserError
from vwn.nn.connection import Connection
from vwn.nn.generalized import CARRY_SHARPNESS
from vwn.nn.relatives import HyperConnection, ManifoldHyperConnection
from vwn.ops.reference import rms_norm
from vwn.ops.sinkhorn import CONVERGED
from vwn.ops.weights import NormWeights


def sublayer(width: int) -> Callable[[Tensor], Tensor]:
    weight = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(7)) / width**0.5
    return lambda x: torch.tanh(x @ weight.to(x.dtype))


def run(module: nn.Module, forward: Callable[[Tensor], Tensor], state: Tensor) -> dict[str, Tensor]:
    """The new state, and the gradients of a random projection of it."""
    module.zero_grad()
    state = state.detach().clone().requires_grad_()
    new = forward(state)
    generator = torch.Generator().manual_seed(3)
    new.backward(torch.randn(new.shape, generator=generator, dtype=torch.float64).to(new.dtype))
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    assert state.grad is not None
    return {"new": new.detach(), "state": state.grad, **found}


# Against other authors' code: the package `hyper-connections` (lucidrains), whose fractions are GHC with tied rows.
# Its slot is a pair (fraction f, stream s); ours is j = s * m + f, so j mod m is the fraction. Its columns are, for
# each fraction of the result, the branch input and then the streams. Its static B is one number per slot: the rows of
# our B are tied. With more than one fraction its dynamic B is indexed by the source fraction, where the paper (eq. 14)
# has the slot written to: no choice of our parameters equals it, and it is compared at zero.


def columns(streams: int, fractions: int) -> list[int]:
    """The package's columns in our order: reads, then carries."""
    read = [f * (1 + streams) for f in range(fractions)]
    return read + [f * (1 + streams) + 1 + s for s in range(streams) for f in range(fractions)]


def slot_rows(streams: int, fractions: int) -> list[int]:
    """The package's row, ``f * streams + s``, of each of our slots."""
    return [f * streams + s for s in range(streams) for f in range(fractions)]


def run_theirs(theirs: HyperConnections, state: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
    """``[B, T, D']`` slot-major through the package, whose streams lie along the batch: ``[B * streams, T, D]``."""
    batch, tokens, _ = state.shape
    streams = state.unflatten(-1, (theirs.num_residual_streams, -1)).movedim(2, 1).flatten(0, 1)
    x, add_residual = theirs(streams)
    return add_residual(sublayer(x)).reshape(batch, theirs.num_residual_streams, tokens, -1).movedim(1, 2).flatten(2)


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(("streams", "fractions"), [(1, 1), (4, 1), (1, 3), (3, 2), (8, 8)])
def test_ghc_equals_the_package_where_the_formulas_agree(streams, fractions, dynamic):
    width, d, n = 6 * fractions, 6, streams * fractions
    theirs = HyperConnections(streams, dim=width, num_fracs=fractions, layer_index=0).double()
    perturb(theirs, seed=10 * streams + fractions, scale=0.5)
    ours = GeneralizedHyperConnection(width, fractions, n, dynamic=dynamic, eps=0.0).double()
    rows, order = slot_rows(streams, fractions), columns(streams, fractions)
    with torch.no_grad():
        theirs.dynamic_alpha_fn.mul_(dynamic)
        theirs.dynamic_beta_fn.mul_(dynamic and fractions == 1)
        ours.bias_alpha.copy_(theirs.static_alpha[rows][:, order])
        ours.bias_beta.copy_(theirs.static_beta.expand(fractions, n))
        if dynamic:  # one scalar scale, and no tau
            ours.dynamic_alpha.copy_(theirs.dynamic_alpha_fn[:, order] * d**0.5)
            ours.dynamic_beta.copy_(theirs.dynamic_beta_fn.reshape(d, fractions) * d**0.5)
            ours.scale_alpha.fill_(theirs.dynamic_alpha_scale)
            ours.scale_beta.fill_(theirs.dynamic_beta_scale)
            ours.slot_norm.copy_(theirs.norm.gamma + 1)
    state, layer = torch.randn(2, 3, n * d, dtype=torch.float64), sublayer(width)
    assert_close(ours(state, layer), run_theirs(theirs, state, layer), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("streams", "fractions"), [(1, 1), (3, 1), (4, 1), (1, 3), (1, 4), (3, 2)])
def test_hyper_and_frac_connections_equal_the_package(streams, fractions):
    """With several fractions its dynamic ``B`` is another formula than the paper's, and its static one is tied."""
    width, n, d = 6 * fractions, streams * fractions, 6
    theirs = HyperConnections(streams, dim=width, num_fracs=fractions, layer_index=0)
    theirs.norm = nn.LayerNorm(d)  # pyright: ignore[reportAttributeAccessIssue]
    theirs = perturb(theirs, seed=n, scale=0.5).double()
    if fractions > 1:
        theirs.dynamic_beta_fn.data.zero_()
    ours = HyperConnection(width, fractions, n).double()
    rows, order = slot_rows(streams, fractions), columns(streams, fractions)

    def translated(name: str, t: Tensor) -> tuple[str, Tensor]:
        """A tensor of theirs, or its gradient, in our layout and under our name."""
        if name == "static_alpha":
            return "bias_alpha", t[rows][:, order]
        if name == "dynamic_alpha_fn":
            return "dynamic_alpha", t[:, order]
        if name == "dynamic_beta_fn":
            return "dynamic_beta", t.reshape(d, fractions)
        renamed = {"dynamic_alpha_scale": "scale_alpha", "dynamic_beta_scale": "scale_beta"}
        renamed |= {"static_beta": "bias_beta", "norm.weight": "slot_norm", "norm.bias": "slot_norm_bias"}
        return renamed.get(name, name), t.reshape(1) if name.endswith("scale") else t

    with torch.no_grad():
        for name, t in map(translated, *zip(*theirs.named_parameters(), strict=True)):
            getattr(ours, name).copy_(t)  # a static B of theirs is every row of ours
    state, layer = torch.randn(2, 3, n * d, dtype=torch.float64), sublayer(width)
    found = run(ours, lambda s: ours(s, layer), state)
    wanted = run(theirs, lambda s: run_theirs(theirs, s, layer), state)
    found["bias_beta"] = found["bias_beta"].sum(0)
    compared = dict(map(translated, *zip(*wanted.items(), strict=True)))
    if fractions > 1:
        del found["dynamic_beta"], compared["dynamic_beta"], found["scale_beta"], compared["scale_beta"]
    assert found.keys() == compared.keys()
    for name, t in found.items():
        assert t.abs().max() > 1e-3, name
        assert_close(t, compared[name], rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(("m", "n", "d"), [(1, 1, 3), (1, 4, 5), (3, 3, 1), (2, 5, 4)])
@pytest.mark.parametrize("dynamic", [True, False])
def test_hyper_connections_by_their_formula(m, n, d, dynamic):
    """All of it, the dynamic ``B`` of several fractions too: column ``j`` of ``B`` depends on the slot written to."""
    ours = perturb(HyperConnection(m * d, m, n, dynamic=dynamic, eps=1e-2), scale=0.5).double()
    state, layer = torch.randn(2, 3, n * d, dtype=torch.float64), sublayer(m * d)

    def by_formula(state: Tensor) -> Tensor:
        h = state.reshape(2, 3, n, d)
        alpha, beta = ours.bias_alpha, ours.bias_beta
        if dynamic:
            centred = h - h.mean(-1, keepdim=True)
            normed = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-2).sqrt()
            normed = normed * ours.slot_norm + ours.slot_norm_bias
            alpha = alpha + ours.scale_alpha * torch.einsum("btsd,dc->btsc", normed, ours.dynamic_alpha).tanh()
            beta = beta + ours.scale_beta * torch.einsum("btsd,df->btfs", normed, ours.dynamic_beta).tanh()
        alpha, beta = alpha.expand(2, 3, n, m + n), beta.expand(2, 3, m, n)
        z = layer(torch.einsum("btsf,btsd->btfd", alpha[..., :m], h).reshape(2, 3, m * d)).reshape(2, 3, m, d)
        new = torch.einsum("btfs,btfd->btsd", beta, z) + torch.einsum("btsu,btsd->btud", alpha[..., m:], h)
        return new.reshape(2, 3, n * d)

    found, wanted = run(ours, lambda s: ours(s, layer), state), run(ours, by_formula, state)
    for name, t in found.items():
        assert_close(t, wanted[name], rtol=1e-10, atol=1e-10)
    assert len(found) == (10 if dynamic else 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(("n", "width"), [(1, 5), (2, 7), (4, 6)])
def test_mhc_equals_transformers(n, width, backend, dtype, monkeypatch):
    if dtype == torch.float64:
        monkeypatch.setattr(Tensor, "float", Tensor.double)  # it converts what it is given
    config = DeepseekV4Config(hidden_size=width, hc_mult=n, hc_eps=1e-3, rms_norm_eps=1e-2)
    theirs = DeepseekV4HyperConnection(config)
    for p in theirs.parameters():
        nn.init.normal_(p)
    theirs.to(dtype)
    ours = ManifoldHyperConnection(width, n, eps=1e-2, routing_eps=1e-3, backend=backend).to(dtype)
    names = ("pre", "post", "res")

    def translated(fn: Tensor, base: Tensor, scale: Tensor) -> dict[str, Tensor]:
        sizes = [n, n, n * n]
        found = {f"{k}_weight": w.T for k, w in zip(names, fn.split(sizes), strict=True)}
        found |= {f"{k}_bias": b for k, b in zip(names, base.split(sizes), strict=True)}
        found["res_bias"] = found["res_bias"].view(n, n)
        return found | {f"{k}_scale": a for k, a in zip(names, scale.split(1), strict=True)}

    ours.load_state_dict(translated(theirs.fn.data, theirs.base.data, theirs.scale.data))
    state, layer = torch.randn(2, 3, n * width, dtype=dtype), sublayer(width)

    def run_theirs(state: Tensor) -> Tensor:
        streams = state.unflatten(-1, (n, width))
        post, comb, x = theirs(streams)
        new = post.unsqueeze(-1) * layer(x).unsqueeze(-2) + comb.mT @ streams  # as in its decoder layer
        return new.flatten(-2)

    wanted = run(theirs, run_theirs, state)
    wanted |= translated(*(wanted.pop(name) for name in ("fn", "base", "scale")))
    found = run(ours, lambda s: ours(s, layer), state)
    assert found.keys() == wanted.keys()
    tolerance = 1e-11 if dtype == torch.float64 else 2e-4
    for name, t in found.items():
        assert t.abs().max() > 1e-4 or (n == 1 and name.startswith("res")), name
        assert_close(t, wanted[name], rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(("m", "n", "d"), [(1, 1, 3), (1, 4, 5), (3, 3, 1), (2, 5, 4), (4, 16, 3)])
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("constraint", ["identity", "doubly_stochastic"])
def test_constrained_carries_by_their_formula(m, n, d, dynamic, constraint):
    options: dict[str, Any] = {"dynamic": dynamic, "eps": 1e-2, "carry_constraint": constraint}
    ours = perturb(GeneralizedHyperConnection(m * d, m, n, **options)).double()
    ours.bias_alpha.data[:, m:] *= 0.2  # far from the identity
    free = perturb(GeneralizedHyperConnection(m * d, m, n, **options | {"carry_constraint": "none"})).double()
    for name, weight in ours.named_parameters():
        free.get_parameter(name).data[..., : weight.shape[-1]] = weight
    state, layer = torch.randn(2, 3, n * d, dtype=torch.float64), sublayer(m * d)

    def by_formula(state: Tensor) -> Tensor:
        h = state.reshape(2, 3, n, d)
        alpha, beta = ours.bias_alpha, ours.bias_beta
        if dynamic:
            normed = h / (h.pow(2).mean(-1, keepdim=True) + 1e-2).sqrt() * ours.slot_norm
            alpha = alpha + ours.scale_alpha * torch.tanh(normed @ ours.dynamic_alpha / d**0.5)
            beta = beta + ours.scale_beta * torch.tanh(normed @ ours.dynamic_beta / d**0.5).mT
        alpha, beta = alpha.expand(2, 3, n, -1), beta.expand(2, 3, m, n)
        carry = torch.eye(n).double().expand(2, 3, n, n)
        if constraint == "doubly_stochastic":
            carry = sinkhorn_by_autograd(CARRY_SHARPNESS * alpha[..., m:], 20, 1e-12, True)
        z = layer(torch.einsum("btsf,btsd->btfd", alpha[..., :m], h).reshape(2, 3, m * d)).reshape(2, 3, m, d)
        new = torch.einsum("btfs,btfd->btsd", beta, z) + torch.einsum("btsu,btsd->btud", carry, h)
        return new.reshape(2, 3, n * d)

    found, wanted = run(ours, lambda s: ours(s, layer), state), run(ours, by_formula, state)
    for name, t in found.items():
        assert_close(t, wanted[name], rtol=1e-8, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
    alpha, beta = ours.routing_matrices(state)
    assert_close(beta, free.routing_matrices(state).beta)
    assert_close(alpha[..., :m], free.routing_matrices(state).alpha[..., :m])
    # rows within CONVERGED are left as they are, far from what a carry may be off by (1e-5)
    assert_close(alpha[..., m:].sum(-1), torch.ones(2, 3, n).double(), rtol=0, atol=CONVERGED)
    assert_close(alpha[..., m:].sum(-2), torch.ones(2, 3, n).double())
    assert n == 1 or ((alpha[..., m:] - torch.eye(n)).abs().max() > 1e-2) == (constraint == "doubly_stochastic")


# As connections


@EVERY_KIND
def test_routing_matrices_are_what_reads_and_writes(kind):
    connection = make(kind)
    m, n = connection.geometry.m, connection.geometry.n
    state, z = torch.randn(2, 3, 12 // m * n, dtype=torch.float64), torch.randn(2, 3, 12, dtype=torch.float64)
    alpha, beta = connection.routing_matrices(state)
    assert (alpha.shape, beta.shape) == ((2, 3, n, m + n), (2, 3, m, n))
    slots = state.unflatten(-1, (n, -1))
    assert_close(connection.read(state), (alpha[..., :m].mT @ slots).flatten(-2))
    new = beta.mT @ z.unflatten(-1, (m, -1)) + alpha[..., m:].mT @ slots
    assert_close(connection.write(state, z), new.flatten(-2))
    norm = NormWeights(torch.randn(12, dtype=torch.float64), 1e-2)
    assert_close(connection.read(state, norm), rms_norm(connection.read(state), norm))


def over_width_36() -> list[Connection]:
    """One of every kind, all on a state of 36 numbers around a sublayer of width 12."""
    constrained = GeneralizedHyperConnection(12, 2, 6, carry_constraint="doubly_stochastic")
    relatives = [HyperConnection(12, 1, 3, 1), HyperConnection(12, 2, 6), ManifoldHyperConnection(12, 3, 1)]
    every = [*relatives, constrained, GeneralizedHyperConnection(12, 3, 9)]
    return [perturb(c, seed).double() for seed, c in enumerate(every)]  # pyright: ignore[reportReturnType]


def test_write_read_is_write_then_read_between_any_two_kinds():
    state, z = torch.randn(2, 3, 36, dtype=torch.float64), torch.randn(2, 3, 12, dtype=torch.float64)
    norm = NormWeights(torch.randn(12, dtype=torch.float64), 1e-2)
    for one in over_width_36():
        for other in over_width_36():
            for n in (None, norm):
                new, x = one.write_read(state, z, other, n)
                assert torch.equal(new, one.write(state, z))
                assert torch.equal(x, other.read(new, n))


@EVERY_KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routing_is_computed_in_float32(kind, dtype):
    connection, right = make(kind, dtype=torch.float32), make(kind, dtype=torch.float64)
    right.load_state_dict(connection.state_dict())
    state, z = torch.randn(4, connection.geometry.over_width).to(dtype), torch.randn(4, 12).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        new, routing = connection.write(state, z), connection.routing_matrices(state)
    assert new.dtype == torch.bfloat16  # autocast's
    assert routing.alpha.dtype == routing.beta.dtype == torch.float32
    for found, wanted in zip(routing, right.routing_matrices(state.double()), strict=True):
        assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    assert_close(new.double(), right.write(state.double(), z.double()), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("index", [0, 1, 5])
def test_initial_values(index):
    hc = HyperConnection(8, 1, 4, index)
    assert hc.bias_alpha[:, 0].tolist() == [float(i == index % 4) for i in range(4)]
    assert torch.equal(hc.bias_alpha[:, 1:], torch.eye(4))
    assert hc.bias_beta.tolist() == [[1.0] * 4]
    assert hc.scale_alpha.item() == hc.scale_beta.item() == pytest.approx(0.01)
    assert not hc.dynamic_alpha.any()
    assert not hc.dynamic_beta.any()
    frac = HyperConnection(8, 4, 4, index)
    assert torch.equal(frac.bias_alpha, torch.cat([torch.eye(4), torch.eye(4)], dim=1))
    assert torch.equal(frac.bias_beta, torch.eye(4))
    mhc = ManifoldHyperConnection(8, 4, index)
    assert [mhc.pre_scale.item(), mhc.post_scale.item(), mhc.res_scale.item()] == pytest.approx([0.01] * 3)
    alpha, beta = mhc.routing_matrices(torch.randn(3, 32))
    assert_close(alpha[:, :, 0], torch.sigmoid(6 * torch.eye(4)[index % 4] - 3).expand(3, 4), rtol=0, atol=1e-5)
    assert_close(beta, torch.ones(3, 1, 4))
    assert (alpha[..., 1:] - torch.eye(4)).abs().max() < 0.01


@pytest.mark.parametrize(("m", "n"), [(2, 3), (4, 16), (8, 64)])
def test_a_doubly_stochastic_carry_starts_at_the_identity_with_live_gradients(m, n):
    connection = GeneralizedHyperConnection(32, m, n, carry_constraint="doubly_stochastic")
    state = torch.randn(64, connection.geometry.over_width)
    carry = connection.routing_matrices(state).alpha[..., m:]
    assert (carry - torch.eye(n)).abs().sum(-1).max() < 2**-9  # half of bfloat16's last place of one
    (connection(state, torch.tanh) * torch.randn_like(state)).mean().backward()
    for weight in (connection.bias_alpha, connection.dynamic_alpha):
        assert weight.grad is not None
        assert weight.grad[:, m:].abs().median() > 1e-8


@EVERY_KIND
def test_frozen_weights_are_buffers(kind):
    connection = make(kind, frozen=True)
    assert not list(connection.parameters())
    assert set(connection.state_dict()) == set(make(kind).state_dict()) == set(connection.shapes)


def test_what_they_refuse():
    with pytest.raises(UserError, match="rounds of Sinkhorn's scaling must be 1 or more, got 0"):
        ManifoldHyperConnection(8, 2, sinkhorn_rounds=0).write(torch.randn(3, 16), torch.randn(3, 8))
    with pytest.raises(ValueError, match="m = 3 does not divide"):
        HyperConnection(8, 3, 3)
    with pytest.raises(UserError, match=r"D' = 16 wide and floating point, got \(3, 15\) float32"):
        HyperConnection(8, 1, 2).read(torch.randn(3, 15))
    with pytest.raises(UserError, match=r"output must be \(3, 8\) beside the state, got \(3, 7\)"):
        HyperConnection(8, 1, 2).write(torch.randn(3, 16), torch.randn(3, 7))
    with pytest.raises(UserError, match=r"'compiled' does not run a HyperConnection; use 'auto' or 'reference'"):
        HyperConnection(8, 1, 2, backend="compiled")
    for wrong in ("triton", "cuda"):
        with pytest.raises(UserError, match=f"'{wrong}'"):
            ManifoldHyperConnection(8, 2, backend=wrong)
    with pytest.raises(UserError, match="'triton' does not run a carry that is 'doubly_stochastic'"):
        GeneralizedHyperConnection(8, 2, 4, carry_constraint="doubly_stochastic", backend="triton")
