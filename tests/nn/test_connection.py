"""Generalized Hyper-Connections against the reference, forward and backward, with every parameter perturbed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import reference
from conftest import perturb
from vwn import GeneralizedHyperConnection

# (D, m, n): the sizes the issue names and a few awkward ones, d = 1 among them.
SIZES = [
    (6, 1, 1),
    (5, 1, 4),
    (6, 2, 2),
    (6, 2, 3),
    (9, 3, 7),
    (16, 8, 64),
    (4, 4, 5),
    (8, 2, 8),
    (6, 6, 6),
    (7, 1, 2),
]
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


@MODES
@GEOMETRIES
def test_float64_equals_the_reference_to_float64(D, m, n, dynamic):
    connection, weight = make(D, m, n, dynamic).double(), mixing(D)
    state = random_state(D, m, n, 1, dtype=torch.float64)
    right = expected(connection, state, lambda x: weight @ x)
    assert_close(connection(state, lambda x: x @ weight.T), right["state"], rtol=1e-10, atol=1e-10)


@MODES
@pytest.mark.parametrize(("D", "m", "n"), [(6, 2, 3), (4, 1, 3), (6, 3, 3), (8, 4, 9)])
def test_routing_matrices_equal_the_reference(D, m, n, dynamic):
    connection = make(D, m, n, dynamic)
    state = random_state(D, m, n, 2, 3)
    A, B = connection.routing_matrices(state)
    right = expected(connection, state, lambda x: x)
    assert A.dtype == B.dtype == torch.float32
    if dynamic:
        assert (A.shape, B.shape) == ((2, 3, n, m + n), (2, 3, m, n))
    assert_close(A.double().expand(2, 3, n, m + n), right["A"], rtol=1e-5, atol=1e-5)
    assert_close(B.double().expand(2, 3, m, n), right["B"], rtol=1e-5, atol=1e-5)


@MODES
@pytest.mark.parametrize(("D", "m", "n"), [(2, 1, 2), (4, 2, 3), (4, 2, 4), (6, 3, 4)])
def test_gradcheck(D, m, n, dynamic):
    connection, weight = make(D, m, n, dynamic).double(), mixing(D)
    names, values = zip(*connection.named_parameters(), strict=True)
    state = random_state(D, m, n, 2, dtype=torch.float64).requires_grad_()

    def run(state: Tensor, *parameters: Tensor) -> Tensor:
        call = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(connection, call, (state, lambda x: torch.tanh(x @ weight)))

    assert torch.autograd.gradcheck(run, (state, *values))


def test_each_row_depends_on_its_own_slot_alone():
    """Row i of A on slot i; column j of B on slot j, the slot written to (section 3.3)."""
    m, n, d = 2, 5, 3
    connection = make(m * d, m, n, dynamic=True)
    state = random_state(m * d, m, n)
    for slot in range(n):
        other = state.clone()
        other[slot * d : (slot + 1) * d] += torch.tensor([1.0, -2.0, 0.5])
        (A, B), (A2, B2) = connection.routing_matrices(state), connection.routing_matrices(other)
        rest = [k for k in range(n) if k != slot]
        assert torch.equal(A[rest], A2[rest])
        assert torch.equal(B[:, rest], B2[:, rest])
        assert not torch.isclose(A[slot], A2[slot]).any()
        assert not torch.isclose(B[:, slot], B2[:, slot]).any()


# Initial values and names


@MODES
@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 4), (2, 2), (2, 3), (3, 7), (8, 64)])
def test_initial_values_are_equations_15_and_16(m, n, dynamic):
    connection = GeneralizedHyperConnection(48, m, n, dynamic=dynamic)
    assert connection.bias_alpha.tolist() == reference.initial_read_carry(m, n)
    assert connection.bias_beta.tolist() == reference.initial_write(m, n)
    if dynamic:
        for name, value in {
            "dynamic_alpha": 0,
            "dynamic_beta": 0,
            "scale_alpha": 1,
            "scale_beta": 1,
            "slot_norm": 1,
        }.items():
            assert (getattr(connection, name) == value).all(), name


def test_first_slots_start_as_the_plain_residual_stream():
    D, m, n = 12, 3, 7
    connection = GeneralizedHyperConnection(D, m, n)
    state, weight = random_state(D, m, n, 4), mixing(D, torch.float32)
    x = connection.read(state)
    assert torch.equal(x, state[:, :D])
    z = x @ weight
    new = connection(state, lambda x: x @ weight)
    assert_close(new, state + reference.replicate(z, m, n), rtol=0, atol=1e-6)


def test_parameter_names_and_shapes():
    shapes = {name: tuple(p.shape) for name, p in GeneralizedHyperConnection(12, 3, 7).named_parameters()}
    assert shapes == {
        "bias_alpha": (7, 10),
        "bias_beta": (3, 7),
        "dynamic_alpha": (4, 10),
        "dynamic_beta": (4, 3),
        "scale_alpha": (7, 10),
        "scale_beta": (3, 7),
        "slot_norm": (4,),
    }
    static = GeneralizedHyperConnection(12, 3, 7, dynamic=False)
    assert {name for name, _ in static.named_parameters()} == {"bias_alpha", "bias_beta"}
    assert set(static.state_dict()) == {"bias_alpha", "bias_beta"}


def test_frozen_has_nothing_to_train():
    connection = GeneralizedHyperConnection(12, 2, 3, frozen=True)
    assert not [name for name, p in connection.named_parameters() if p.requires_grad]
    state = random_state(12, 2, 3, 4).requires_grad_()
    connection(state, torch.sin).sum().backward()
    assert state.grad is not None


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


def test_invalid_sizes_are_refused():
    with pytest.raises(ValueError, match=r"m = 5 .*12.* 4"):
        GeneralizedHyperConnection(12, 5, 6)
    with pytest.raises(ValueError, match=r"n = 2 .*m = 3"):
        GeneralizedHyperConnection(12, 3, 2)


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


@MODES
@pytest.mark.parametrize(
    ("D", "m", "n"), [(6, 1, 3), (6, 3, 3), (6, 2, 3), (16, 8, 64)], ids=["hyper", "frac", "x1.5", "x8"]
)
def test_relatives_at_their_start_and_perturbed(D, m, n, dynamic):
    """Each named setting of section 4 is reachable and equals the reference before and after training moved it."""
    weight = mixing(D)
    state = random_state(D, m, n, 1)
    for connection in (GeneralizedHyperConnection(D, m, n, dynamic=dynamic), make(D, m, n, dynamic, seed=3)):
        right = expected(connection, state, lambda x: weight @ x)
        assert_close(connection(state, lambda x: x @ weight.float().T).double(), right["state"], rtol=1e-5, atol=5e-5)


# Leading shapes


@MODES
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (3, 1, 5), (2, 1, 1, 2)])
def test_any_leading_shape(lead, dynamic):
    connection = make(12, 3, 7, dynamic)
    state = random_state(12, 3, 7, *lead)
    out = connection(state, torch.tanh)
    assert out.shape == state.shape
    flat = torch.stack([connection(token, torch.tanh) for token in state.reshape(-1, state.shape[-1])])
    assert_close(out, flat.reshape(out.shape), rtol=1e-5, atol=1e-5)


@MODES
@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)])
def test_no_tokens(lead, dynamic):
    connection = make(12, 3, 7, dynamic)
    state = random_state(12, 3, 7, *lead).requires_grad_()
    x = connection.read(state)
    assert x.shape == (*lead, 12)
    out = connection.write(state, x)
    assert out.shape == state.shape
    out.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in connection.parameters())


@MODES
def test_non_contiguous_states(dynamic):
    connection = make(12, 3, 7, dynamic)
    state = random_state(12, 3, 7, 4, 5)
    wanted = connection(state, torch.tanh)
    assert_close(connection(state.transpose(0, 1), torch.tanh), wanted.transpose(0, 1), rtol=1e-6, atol=1e-6)
    strided = torch.stack([state, -state], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert_close(connection(strided, torch.tanh), wanted, rtol=1e-6, atol=1e-6)
    one = state[0, 0].expand(3, 2, -1)
    assert_close(connection(one, torch.tanh)[2, 1], wanted[0, 0], rtol=1e-6, atol=1e-6)


def test_the_state_is_not_modified():
    connection, state = make(12, 2, 3, True), random_state(12, 2, 3, 4)
    before = state.clone()
    connection(state, torch.tanh)
    assert torch.equal(state, before)


# Precision


def ulps(actual: Tensor, wanted: Tensor) -> float:
    """Largest distance in units of the last place of the result's dtype, of numbers not far below the largest."""
    actual, wanted, eps = actual.detach(), wanted.detach(), torch.finfo(actual.dtype).eps
    size = wanted.abs().clamp_min(wanted.abs().max() * 0.05)
    return float(((actual.double() - wanted).abs() / (size * eps)).max())


@MODES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("D", "m", "n"), [(12, 1, 1), (12, 2, 3), (12, 3, 7), (16, 8, 64)])
def test_half_precision_states_are_routed_in_float32(D, m, n, dtype, dynamic):
    """Only the rounding of the result to the state's dtype is left: no intermediate is rounded to half."""
    connection = make(D, m, n, dynamic)
    state = random_state(D, m, n, 2, dtype=dtype)
    z = random_state(D, 1, 1, 2, dtype=dtype, seed=9)
    x, routing = connection.read(state), connection.routing_matrices(state)
    new = connection.write(state, z)
    assert x.dtype == new.dtype == dtype
    assert routing.alpha.dtype == routing.beta.dtype == torch.float32
    tokens = iter(z.double())
    right = expected(connection, state, lambda x: next(tokens))
    assert ulps(x, right["x"]) < 0.55
    assert ulps(new, right["state"]) < 0.55


def test_half_precision_parameters_are_still_routed_in_float32():
    connection = make(12, 2, 3, True).bfloat16()
    state = random_state(12, 2, 3, 4, dtype=torch.bfloat16)
    x, routing = connection.read(state), connection.routing_matrices(state)
    assert routing.alpha.dtype == routing.beta.dtype == torch.float32
    right = expected(connection, state, lambda x: x)
    assert_close(routing.alpha.double(), right["A"], rtol=1e-5, atol=1e-5)
    assert ulps(x, right["x"]) < 0.55


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


def test_gradients_reach_float32_parameters_from_a_bfloat16_state():
    connection = make(12, 2, 3, True)
    state = random_state(12, 2, 3, 4, dtype=torch.bfloat16).requires_grad_()
    connection(state, torch.tanh).float().sum().backward()
    assert state.grad.dtype == torch.bfloat16
    for name, parameter in connection.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.abs().max() > 0, name


def test_a_slot_of_zeros_is_finite_forward_and_backward():
    connection = make(12, 2, 3, True)
    state = torch.zeros(2, 18, requires_grad=True)
    out = connection(state, torch.tanh)
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert torch.isfinite(state.grad).all()


# Compilation


@MODES
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_as_one_graph(backend, dynamic):
    torch._dynamo.reset()
    connection, weight = make(12, 2, 3, dynamic), mixing(12, torch.float32)
    state = random_state(12, 2, 3, 4, 2).requires_grad_()
    compiled = torch.compile(lambda s: connection(s, lambda x: x @ weight), fullgraph=True, backend=backend)
    wanted, actual = connection(state, lambda x: x @ weight), compiled(state)
    assert_close(actual, wanted, rtol=1e-6, atol=1e-6)
    (left,), (right,) = torch.autograd.grad(actual.sum(), state), torch.autograd.grad(wanted.sum(), state)
    assert_close(left, right, rtol=1e-5, atol=1e-6)
