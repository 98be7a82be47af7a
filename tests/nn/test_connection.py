"""Generalized Hyper-Connections against the reference, forward and backward, with every parameter perturbed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import reference
from conftest import perturb
from vwn import GeneralizedHyperConnection

SIZES = [(6, 1, 1), (5, 1, 4), (6, 2, 3), (9, 3, 7), (8, 4, 17), (4, 4, 5), (6, 6, 6)]  # D, m, n; d = 1 among them
MODES = pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
GEOMETRIES = pytest.mark.parametrize(("D", "m", "n"), SIZES, ids=lambda v: str(v))


def make(D: int, m: int, n: int, dynamic: bool, seed: int = 0, **options) -> GeneralizedHyperConnection:
    return perturb(GeneralizedHyperConnection(D, m, n, dynamic=dynamic, **options), seed)  # pyright: ignore


def mixing(D: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A sublayer that is not the identity and not symmetric, the same in every dtype."""
    return torch.randn(D, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype) / D**0.5


def random_state(D: int, m: int, n: int, *lead: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(*lead, D // m * n, generator=torch.Generator().manual_seed(seed)).to(dtype)


def expected(connection: GeneralizedHyperConnection, state: Tensor, sublayer) -> dict[str, Tensor]:
    g = connection.geometry
    parameters = {name: p.detach().double().requires_grad_() for name, p in connection.named_parameters()}
    state = state.detach().double().requires_grad_()
    out = reference.hyper_connection(state, parameters, g.m, g.n, sublayer, connection.eps)
    return out | {"parameters": parameters, "input": state}


@MODES
@GEOMETRIES
def test_forward_and_gradients_equal_the_reference(D, m, n, dynamic):
    connection, weight = make(D, m, n, dynamic), mixing(D)
    state = random_state(D, m, n, 2).requires_grad_()
    right = expected(connection, state, lambda x: torch.tanh(weight @ x))

    x = connection.read(state)
    new = connection.write(state, torch.tanh(x @ weight.float().T))
    assert x.dtype == new.dtype == torch.float32
    assert_close(x.double(), right["x"], rtol=1e-5, atol=2e-5)
    assert_close(new.double(), right["state"], rtol=1e-5, atol=5e-5)
    assert torch.equal(connection(state, lambda x: torch.tanh(x @ weight.float().T)), new)

    direction = torch.randn(new.shape, dtype=torch.float64)
    (new * direction.float()).sum().backward()
    (right["state"] * direction).sum().backward()
    size = 1 + right["input"].grad.abs().max()
    assert_close(state.grad.double() / size, right["input"].grad / size, rtol=1e-4, atol=2e-5)
    for name, parameter in connection.named_parameters():
        wanted = right["parameters"][name].grad
        assert parameter.grad is not None, f"{name} got no gradient"
        assert wanted.abs().max() > 0, f"the reference does not exercise {name}"
        size = 1 + wanted.abs().max()
        assert_close(
            parameter.grad.double() / size, wanted / size, rtol=1e-4, atol=2e-5, msg=lambda s, k=name: f"{k}: {s}"
        )


# Initial values and names


@MODES
@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 4), (2, 2), (2, 3), (3, 7), (8, 64)])
def test_initial_values_are_equations_15_and_16(m, n, dynamic):
    connection = GeneralizedHyperConnection(48, m, n, dynamic=dynamic)
    assert connection.bias_alpha.tolist() == reference.initial_read_carry(m, n)
    assert connection.bias_beta.tolist() == reference.initial_write(m, n)
    if dynamic:
        for name, value in connection.named_parameters():
            assert name.startswith("bias") or (value == (0 if name.startswith("dynamic") else 1)).all(), name


def test_resets_after_construction_on_meta():
    with torch.device("meta"):
        connection = GeneralizedHyperConnection(12, 2, 3)
    connection = connection.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in connection.parameters():
            parameter.fill_(float("nan"))
    connection.reset_parameters()
    fresh = GeneralizedHyperConnection(12, 2, 3).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in connection.state_dict().items())


# Refusals


def test_unknown_carry_constraint_is_refused():
    with pytest.raises(ValueError, match=r"carry_constraint .*none.*'orthogonal'"):
        GeneralizedHyperConnection(12, 2, 3, carry_constraint="orthogonal")


# Relatives that are settings (section 4)


def test_residual_connection_to_the_bit():
    connection = GeneralizedHyperConnection(16, 1, 1, dynamic=False, frozen=True)
    sublayer = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU())
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        state, layer = random_state(16, 1, 1, 3, 5, dtype=dtype), sublayer.to(dtype)
        assert torch.equal(connection(state, layer), state + layer(state)), dtype


# Precision


@MODES
def test_autocast_leaves_the_routing_in_float32(dynamic):
    connection = make(12, 2, 3, dynamic)
    state = random_state(12, 2, 3, 4, 2)
    plain = connection(state.bfloat16(), torch.tanh)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x, routing = connection.read(state), connection.routing_matrices(state)
        mixed = connection(state, torch.tanh)
    assert routing.alpha.dtype == routing.beta.dtype == torch.float32
    assert x.dtype == torch.bfloat16
    assert torch.equal(mixed, plain)


def test_a_slot_of_zeros_is_finite_forward_and_backward():
    connection, state = make(12, 2, 3, True), torch.zeros(2, 18, requires_grad=True)
    connection(state, torch.tanh).sum().backward()
    assert torch.isfinite(state.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in connection.parameters())
