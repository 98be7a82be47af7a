"""The Triton kernels against the reference in float64: on a GPU if there is one, else in Triton's interpreter.

The interpreter shows what a kernel computes. What the compiler makes of it only a GPU shows (test_triton_gpu.py).
"""

from __future__ import annotations

import importlib.util
import logging
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
triton = pytest.importorskip("triton")

from triton_cases import DEVICE, HALF, Case, assert_all_close, assert_close, assert_same  # noqa: E402
from vwn import ops  # noqa: E402 - the variable must be there before Triton is imported
from vwn.common.errors import UserError  # noqa: E402
from vwn.ops import backends  # noqa: E402
from vwn.ops import triton as backend  # noqa: E402
from vwn.ops.triton import backward_kernel, configs, forward_kernel  # noqa: E402
from vwn.ops.weights import RoutingWeights  # noqa: E402

SHAPES = [(1, 1, 5), (1, 4, 7), (2, 3, 12), (3, 5, 33), (4, 8, 70), (4, 16, 33)]
SIZES = configs.FORWARD_SIZES + configs.BACKWARD_SIZES
SHAPES += [pytest.param(*shape, marks=pytest.mark.slow) for shape in ((8, 64, 5), (64, 64, 3))]


@pytest.fixture(autouse=True)
def _nan_in_fresh_memory():
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


# Forward


@pytest.mark.parametrize(("m", "n", "d"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_forward(m, n, d, dtype):
    case = Case(m, n, d, dtype, norm=False)
    new, x = case.forward()
    assert_close(new, case.exact_forward()[0])
    case.state, case.z, case.write = new, None, None  # what is read is the rounded state
    assert_close(x, case.exact_forward()[1])
    assert_same(case.forward()[1:], [x])


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("m", "n", "d"), [(2, 3, 40), (4, 16, 70)])
def test_norm(m, n, d, dtype):
    case = Case(m, n, d, dtype, tokens=5, write=False)
    none, x = case.forward()
    assert none is None
    truncated = DEVICE == "cpu" and dtype == torch.bfloat16  # that is how the interpreter rounds
    assert_close(x, case.exact_forward()[1], ulps=6 if truncated else 3)  # rounded three times


@pytest.mark.parametrize(
    ("tokens", "dynamic"), [(0, (True, False)), (1, (False, True)), (33, (False, False)), (5, (True, False))]
)
def test_static_routing_and_any_number_of_tokens(tokens, dynamic):
    case = Case(2, 3, 12, tokens=tokens, dynamic=dynamic)
    assert_all_close(case.forward(), case.exact_forward())
    assert_all_close(case.backward(), case.exact_backward())
    if not tokens:
        assert not any(gradient.any() for gradient in case.backward())


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_carry_that_is_the_identity(dynamic, monkeypatch):
    monkeypatch.setattr(Case, "carry", False)
    case = Case(2, 3, 12, dynamic=(dynamic, dynamic))
    assert_all_close(case.forward(), case.exact_forward())
    assert_all_close(case.backward(), case.exact_backward())


# Backward


@pytest.mark.parametrize(("m", "n", "d"), SHAPES[1:])  # with one segment and slot, a norm leaves a read no gradient
def test_backward(m, n, d):
    case = Case(m, n, d)
    assert_all_close(case.backward(), case.exact_backward())


@pytest.mark.parametrize(
    ("write", "read", "grad_state", "needs_weights"),
    [
        (True, False, True, True),
        (True, False, True, False),
        (False, True, True, True),
        (False, True, False, False),
        (True, True, False, True),
        (True, True, True, False),
    ],
)
def test_backward_of_each_half(write, read, grad_state, needs_weights):
    case = Case(2, 3, 12, write=write, read=read, norm=False)
    actual = case.backward(grad_state, needs_weights)
    assert len(actual) == 1 + write + needs_weights * (7 * write + 4 * read)
    assert_all_close(actual, case.exact_backward(grad_state, needs_weights))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("m", "n", "d"), [(1, 4, 5), (4, 16, 33)])
@pytest.mark.parametrize("half", ["write", "read"])
def test_backward_in_half_precision(m, n, d, dtype, half):
    case = Case(m, n, d, dtype, write=half == "write", read=half == "read", norm=False)
    grad_state = half == "write"  # else a rounded sum of two
    relative = 1e-5 if DEVICE == "cpu" else 1e-3  # on a GPU the mixes take the coefficients in TF32
    assert_all_close(case.backward(grad_state), case.exact_backward(grad_state), relative=relative)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("m", "n", "d"), [(2, 3, 12), (4, 16, 20)])
def test_backward_of_the_norm_in_half_precision(m, n, d, dtype):
    case = Case(m, n, d, dtype, write=False)
    relative = 4 * torch.finfo(dtype).eps  # what is normalised was rounded
    assert_all_close(case.backward(), case.exact_backward(), relative=relative)


@pytest.mark.parametrize(("m", "n", "d"), [(2, 3, 12), (2, 17, 5)])
def test_without_an_epsilon(m, n, d):
    """Rows that only fill a tile have a norm of zero."""
    case = Case(m, n, d, tokens=2)
    case.write, case.read = case.write._replace(eps=0.0), case.read._replace(eps=0.0)
    case.norm = case.norm._replace(eps=0.0)
    assert_all_close(case.forward(), case.exact_forward())
    assert_all_close(case.backward(), case.exact_backward())


@pytest.mark.slow
@pytest.mark.parametrize(("m", "n", "d", "tokens"), [(3, 7, 9, 20), (4, 16, 17, 10)])
def test_gradients_of_many_tiles_add_up(m, n, d, tokens, monkeypatch):
    monkeypatch.setattr(backend, "_PROGRAMS", 2)
    case = Case(m, n, d, tokens=tokens)
    assert_all_close(case.backward(), case.exact_backward())


# The same bits for the same call


def test_two_runs_agree():
    case = Case(4, 8, 20, torch.bfloat16, tokens=5)
    assert_same(case.forward(), case.forward())
    assert_same(case.backward(), case.backward())


def test_a_token_has_the_same_result_among_others():
    many, few = Case(2, 3, 40, tokens=17), Case(2, 3, 40, tokens=17)
    few.state, few.z, few.grad_state, few.grad_x = (t[:5] for t in (few.state, few.z, few.grad_state, few.grad_x))
    assert_same(few.forward(), [t[:5] for t in many.forward()])
    assert_same(few.backward(needs_weights=False), [t[:5] for t in many.backward(needs_weights=False)])


def test_tiles_are_not_measured_if_bits_count():
    two = [triton.Config({"ROWS": rows, "BD": 32}) for rows in (32, 64)]
    assert configs.first_if_deterministic(two, {}) == two[:1]
    torch.use_deterministic_algorithms(False)
    assert configs.first_if_deterministic(two, {}) == two


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "columns"), sorted({size[:2] for size in configs.FORWARD_SIZES + configs.BACKWARD_SIZES})
)
def test_every_size_of_tile(rows, columns, monkeypatch):
    """On a GPU the autotuner may take any; here each in turn, forward and backward, over whole and broken tiles."""
    for kernel in (forward_kernel.forward, backward_kernel.backward):
        monkeypatch.setattr(kernel, "configs", configs.every(((rows, columns, 4),)))
    for m, n, d, tokens in ((2, 3, 70, 7), (4, 16, 33, 5)):
        case = Case(m, n, d, tokens=tokens)
        assert_all_close(case.forward(), case.exact_forward())
        assert_all_close(case.backward(), case.exact_backward())


# The backend


def test_through_the_ops():
    c = Case(2, 3, 12, tokens=6)
    inputs = [c.state.view(2, 3, -1), c.z.view(2, 3, -1)]
    results = []
    for name in ("triton", "reference"):
        state, z = (t.clone().requires_grad_() for t in inputs)
        leaves = [[None if t is None else t.clone().requires_grad_() for t in w[:-1]] for w in (c.write, c.read)]
        weights = [RoutingWeights(*side, w.eps) for side, w in zip(leaves, (c.write, c.read), strict=True)]
        new, x = ops.write_read(state, z, *weights, c.norm, backend=name)
        (new.sin().sum() + x.cos().sum()).backward()
        results.append([new, x, state.grad, z.grad, *(t.grad for side in leaves for t in side if t is not None)])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@pytest.fixture
def _forget_choices():
    backends._choose.cache_clear()
    yield
    backends._choose.cache_clear()


def test_unavailable(monkeypatch):
    here, gpu = torch.device(DEVICE), torch.device("cuda")
    assert backend.unavailable(here, torch.bfloat16) is None
    assert "float64 is not supported" in str(backend.unavailable(here, torch.float64))
    assert "room for 64 slots, not for 65" in str(backend.unavailable(here, torch.float32, 65))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "not on cpu" in str(backend.unavailable(torch.device("cpu"), torch.float32))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 8.0 or higher, the GPU has 7.5" in str(backend.unavailable(gpu, torch.float32))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert backend.unavailable(gpu, torch.float32) is None
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    assert "Triton 3.6 or newer, 3.5.1 is installed" in str(backend.unavailable(gpu, torch.float32))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in str(backend.unavailable(gpu, torch.float32))


@pytest.mark.usefixtures("_forget_choices")
def test_an_old_gpu_gets_the_reference_and_is_told_why(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    gpu = torch.device("cuda")
    with caplog.at_level(logging.WARNING, "vwn.ops"):
        assert backends.choose("auto", gpu, torch.float32) == "reference"
    assert "not 'triton': it needs compute capability 8.0" in caplog.text
    with pytest.raises(UserError, match="'triton' cannot run here: it needs compute capability"):
        backends.choose("triton", gpu, torch.float32)


def test_more_than_64_slots_are_refused_by_name():
    case = Case(1, 65, 2, tokens=1)
    with pytest.raises(UserError, match="'triton' cannot run here: it has room for 64 slots, not for 65"):
        ops.read(case.state, case.read, backend="triton")
