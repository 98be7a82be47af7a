"""The Triton kernels against the reference in float64: on a GPU if there is one, else in Triton's interpreter.

With ``VWN_PTX=1`` in the environment they are compiled for a GPU and run without one (benchmarks/ptx).
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from vwn import ops  # noqa: E402 - the variable must be there before Triton is imported
from vwn.common.errors import UserError  # noqa: E402
from vwn.ops import backends, reference  # noqa: E402
from vwn.ops import triton as backend  # noqa: E402
from vwn.ops import triton_tuning as tuning  # noqa: E402
from vwn.ops.triton_routing import tanh  # noqa: E402
from vwn.ops.triton_tuning import Launch  # noqa: E402
from vwn.ops.weights import NormWeights, ReadWeights, RoutingWeights  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMPILED = DEVICE == "cuda" or os.environ.get("VWN_PTX") == "1"
SHAPES = [(1, 1, 5), (1, 4, 7), (2, 2, 8), (2, 3, 12), (4, 8, 20), (4, 16, 33), (3, 7, 9), (8, 64, 5)]
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _nan_in_fresh_memory():
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def launched(monkeypatch, launch: Launch | None) -> None:
    """Not as the rule has it, if there is a ``launch``."""
    if launch is not None:
        monkeypatch.setattr(backend, "chosen", lambda *_: launch)


@pytest.fixture
def several_chunks(monkeypatch):
    launched(monkeypatch, Launch(16, False, 8))


class Case:
    """Random inputs and weights of a boundary; no gain is one, no scale zero."""

    def __init__(
        self, m, n, d, dtype=torch.float32, tokens=None, write=True, read=True, norm=True, dynamic=(True, True)
    ):
        self.generator = torch.Generator().manual_seed(0)
        self.tokens = (5 if n >= 8 else 17) if tokens is None else tokens
        self.dtype = dtype
        self.programs, self.apart = None, None
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
        static = self.draw(n, m + n), self.draw(m, n)
        if not dynamic:
            return RoutingWeights(*static)
        rest = self.draw(d, m + n), self.draw(d, m), self.draw(n, m + n), self.draw(m, n), 1 + 0.3 * self.draw(d)
        return RoutingWeights(*static, *rest, 1e-3)

    @property
    def parameters(self):
        return self.write, self.read, self.norm

    def forward(self):
        return backend.forward(self.state, self.z, *self.parameters)

    def backward(self, grad_state=True, needs_weights=True):
        given = self.grad_state if grad_state else None
        tensors = given, self.grad_x, self.state, self.z
        return backend.backward(*tensors, *self.parameters, needs_weights, programs=self.programs, apart=self.apart)

    def exact_forward(self):
        return reference.forward(*wide(self.state, self.z, *self.parameters))

    def exact_backward(self, grad_state=True, needs_weights=True):
        given = self.grad_state if grad_state else None
        return reference.backward(*wide(given, self.grad_x, self.state, self.z, *self.parameters), needs_weights)


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
        digits = torch.finfo(actual.dtype).eps
        allowed = allowed + ulps * digits * 2.0 ** exact.abs().log2().floor()
    assert bool(((actual.double() - exact).abs() <= allowed).all()), (actual.double() - exact).abs().max()


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def assert_half_is_exact(c: Case) -> None:
    """A write or a read alone, without a norm, forward and backward, to a unit in the last place."""
    for actual, exact in zip(c.forward(), c.exact_forward(), strict=True):
        if exact is not None:
            assert_close(actual, exact, relative=1e-4)
    grad_state = c.read is None
    for actual, exact in zip(c.backward(grad_state), c.exact_backward(grad_state), strict=True):
        assert_close(actual, exact, relative=2e-4)


# Routing


@triton.jit
def tanh_of(x, y, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tanh(tl.load(x + i)))


def test_tanh_is_exact_to_float32_near_zero_and_to_a_millionth_elsewhere():
    ends = torch.tensor([0.1**0.5, 1e-30, 1e-7, 20.0, 100.0, float("inf"), 0.0])
    x = torch.cat([torch.linspace(-12, 12, 4096 - 14), ends, -ends]).to(DEVICE)
    y = torch.empty_like(x)
    tanh_of[(4,)](x, y, 1024)
    exact = x.double().tanh()
    allowed = torch.where(x.abs() < 0.3, 2.0**-22, 1.5e-6)
    assert bool(((y.double() - exact).abs() <= allowed * exact.abs()).all())


# Forward


@pytest.mark.parametrize(("m", "n", "d"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_forward(m, n, d, dtype):
    case = Case(m, n, d, dtype, norm=False)
    new, x = case.forward()
    assert_close(new, case.exact_forward()[0])
    case.state, case.z, case.write = new, None, None  # what is read is the rounded state
    assert_close(x, case.exact_forward()[1])


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("launch", [None, Launch(16, False, 8), Launch(16, True, 4)])
@pytest.mark.parametrize(("m", "n", "d"), [(2, 3, 40), (3, 7, 33)])
def test_norm(m, n, d, dtype, launch, monkeypatch):
    launched(monkeypatch, launch)
    case = Case(m, n, d, dtype, tokens=5, write=False)
    none, x = case.forward()
    assert none is None
    assert_close(x, case.exact_forward()[1], ulps=3)  # rounded three times


@pytest.mark.parametrize("tokens", [0, 1, 5, 33])
@pytest.mark.parametrize("dynamic", [(False, True), (True, False), (False, False)])
def test_static_routing_and_any_number_of_tokens(tokens, dynamic):
    case = Case(2, 3, 12, tokens=tokens, dynamic=dynamic)
    for actual, exact in zip(case.forward(), case.exact_forward(), strict=True):
        assert_close(actual, exact)
    for actual, exact in zip(case.backward(), case.exact_backward(), strict=True):
        assert_close(actual, exact)


@pytest.mark.parametrize(("m", "n"), [(2, 3), (2, 33)])
def test_without_tokens_the_weights_have_gradients_of_zero(m, n):
    case = Case(m, n, 5, torch.bfloat16, tokens=0)
    for actual, exact in zip(case.backward(), case.exact_backward(), strict=True):
        assert actual.shape == exact.shape
        assert not actual.any()


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("columns", [64, 128, 256])
@pytest.mark.parametrize(("m", "n"), [(2, 3), (4, 16)])
def test_forward_of_wide_pieces(m, n, columns, keep, monkeypatch):
    """A warp's piece has 32, 64 or 128 columns of a chunk, each in an order of its own where rows are mixed."""
    launched(monkeypatch, Launch(columns, keep, 2))
    assert backend.tiling(m, n, 260, Launch(columns, keep, 2))["BD"] == columns // 2
    case = Case(m, n, 260, torch.bfloat16, tokens=3, norm=False)
    new, x = case.forward()
    assert_close(new, case.exact_forward()[0], relative=1e-4)
    case.state, case.z, case.write = new, None, None  # what is read is the rounded state
    assert_close(x, case.exact_forward()[1], relative=1e-4)
    assert_same(case.forward()[1:], [x])


@pytest.mark.usefixtures("several_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "d"), [(2, 3, 40), (8, 64, 33)])
def test_forward_in_chunks(m, n, d, dtype):
    assert backend.tiling(m, n, d, Launch(16, False, 8))["NC"] > 1
    case = Case(m, n, d, dtype, tokens=5)
    new, x = case.forward()
    assert_close(new, case.exact_forward()[0])
    case.state, case.z, case.write = new, None, None
    assert_close(x, case.exact_forward()[1], ulps=3)


# Backward


@pytest.mark.parametrize(("m", "n", "d"), SHAPES[1:])  # with one segment and slot, a norm leaves a read no gradient
def test_backward(m, n, d):
    case = Case(m, n, d)
    actual, exact = case.backward(), case.exact_backward()
    assert [t.shape for t in actual] == [t.shape for t in exact]
    for a, e in zip(actual, exact, strict=True):
        assert_close(a, e)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("noise", [1e-2, 1e-4])
def test_backward_of_a_norm_of_what_nearly_cancels(dtype, noise):
    """What is read is the small difference of two slots; as near to float64 as the reference in the same dtype."""
    c = Case(2, 2, 64, dtype, write=False, dynamic=(False, False))
    c.read = c.read._replace(static_alpha=torch.tensor([[1.0, -1, 0, 0], [-1, 1, 0, 0]], device=DEVICE))
    base = 30 * c.draw(c.tokens, 1, 64)
    c.state = (base * (1 + noise * c.draw(c.tokens, 2, 64))).flatten(1).to(dtype)
    ours, exact = c.backward(), c.exact_backward()
    plain = reference.backward(c.grad_state, c.grad_x, c.state, c.z, *c.parameters, True)
    digits = torch.finfo(dtype).eps
    if dtype == torch.float32:  # three products in TF32 keep 23 of 24 bits of each slot, the interpreter all
        digits = max(1e-5, 2**-24 / noise) if COMPILED else 1e-5
    for a, p, e in zip(ours, plain, exact, strict=True):
        assert (a - e).norm() <= 3 * (p - e).norm() + digits * e.norm()


@pytest.mark.parametrize(("m", "n", "d"), [(2, 3, 12), (2, 33, 5), (3, 9, 5)])
def test_without_an_epsilon(m, n, d):
    """Rows that only fill a tile have a norm of zero."""
    case = Case(m, n, d)
    case.write, case.read = case.write._replace(eps=0.0), case.read._replace(eps=0.0)
    case.norm = case.norm._replace(eps=0.0)
    for actual, exact in zip(
        [*case.forward(), *case.backward()], [*case.exact_forward(), *case.exact_backward()], strict=True
    ):
        assert_close(actual, exact)


@pytest.mark.parametrize(("write", "read"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("grad_state", [True, False])
@pytest.mark.parametrize("needs_weights", [True, False])
def test_backward_of_each_half(write, read, grad_state, needs_weights):
    case = Case(2, 3, 12, write=write, read=read, norm=False)
    if not read and not grad_state:
        return
    actual = case.backward(grad_state, needs_weights)
    exact = case.exact_backward(grad_state, needs_weights)
    assert len(actual) == 1 + write + needs_weights * (7 * write + 4 * read)
    for a, e in zip(actual, exact, strict=True):
        assert_close(a, e)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("m", "n", "d"), [(1, 1, 5), (2, 3, 12), (4, 16, 17), (2, 3, 260), (4, 16, 70), (8, 64, 150)])
@pytest.mark.parametrize("half", ["write", "read"])
def test_backward_in_half_precision(m, n, d, dtype, half):
    case = Case(m, n, d, dtype, write=half == "write", read=half == "read", norm=False)
    grad_state = half == "write"  # else a rounded sum of two
    relative = 1e-4 if dtype == torch.bfloat16 else 1e-5  # two bfloat16 stand for a float32 of the weights
    for a, e in zip(case.backward(grad_state), case.exact_backward(grad_state), strict=True):
        assert_close(a, e, relative=relative)


@pytest.mark.parametrize("half", ["write", "read"])
@pytest.mark.parametrize(("m", "n", "d"), [(8, 64, 70), (16, 64, 66), (64, 64, 66), (2, 70, 130)])
def test_of_many_slots_in_bfloat16(m, n, d, half):
    """Rows enough for all warps, of segments too or not, and columns in the order of tensor cores."""
    sizes = backend.tiling(m, n, d, tuning.rule(n, d))
    assert (sizes["S"], sizes["U"]) == (1, 4)
    case = Case(m, n, d, torch.bfloat16, tokens=2, write=half == "write", read=half == "read", norm=False)
    assert_half_is_exact(case)


@pytest.mark.parametrize("half", ["write", "read"])
def test_backward_of_wide_chunks_at_64_slots(half):
    d = 520
    sizes = backend.tiling(8, 64, d, tuning.rule(64, d), backward=True)
    assert (sizes["BD"], sizes["NC"]) == (128, 5)
    case = Case(8, 64, d, torch.bfloat16, tokens=2, write=half == "write", read=half == "read", norm=False)
    for a, e in zip(case.backward(half == "write"), case.exact_backward(half == "write"), strict=True):
        assert_close(a, e, relative=1e-4)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("m", "n", "d"), [(2, 3, 12), (8, 64, 70), (16, 64, 70)])
def test_backward_of_the_norm_in_half_precision(m, n, d, dtype):
    case = Case(m, n, d, dtype, write=False)
    digits = torch.finfo(dtype).eps
    for a, e in zip(case.backward(), case.exact_backward(), strict=True):
        assert_close(a, e, relative=4 * digits)  # the gradient of what is normalised is rounded on its way


@pytest.mark.parametrize(("m", "n"), [(2, 3), (2, 64)])
def test_behind_a_norm_the_routing_keeps_more_than_bfloat16(m, n):
    """The gradient is rounded on its way, but not in one direction: that would be a coefficient that was rounded."""
    case = Case(m, n, 512, torch.bfloat16, tokens=4, write=False, dynamic=(False, False))
    actual, exact = case.backward(False, False)[0].double(), case.exact_backward(False, False)[0]
    actual, exact = (t.unflatten(1, (n, -1)).transpose(0, 1).flatten(1) for t in (actual, exact))
    along = (actual * exact).sum(1) / exact.square().sum(1)
    assert (along - 1).abs().max() < 4e-4


@pytest.mark.usefixtures("several_chunks")
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("m", "n", "d"), [(2, 3, 40), (4, 16, 33), (8, 64, 20)])
def test_backward_in_chunks(m, n, d, norm):
    case = Case(m, n, d, tokens=5, norm=norm)
    case.programs = 2
    for a, e in zip(case.backward(), case.exact_backward(), strict=True):
        assert_close(a, e)


@pytest.mark.parametrize(("m", "n", "d"), [(2, 3, 12), (3, 7, 9), (4, 16, 17)])
def test_gradients_of_many_tiles_add_up(m, n, d):
    case = Case(m, n, d, tokens=33 if n < 8 else 7)
    case.programs = 2
    for a, e in zip(case.backward(), case.exact_backward(), strict=True):
        assert_close(a, e)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(
    ("m", "n", "d", "tokens"), [(1, 1, 5, 3), (2, 3, 140, 50), (3, 7, 66, 9), (4, 16, 17, 5), (9, 12, 8, 2)]
)
def test_gradients_of_the_projections_over_all_tokens_at_once(m, n, d, tokens, dtype):
    """As from 33 slots on; several shares of the rows, the last not full; all else is the same to the bit."""
    case = Case(m, n, d, dtype, tokens, norm=False)
    case.apart = True
    relative = 1e-4 if dtype == torch.bfloat16 else 1e-5
    if dtype in HALF:  # else the gradient of the new state is rounded on its way
        case.read, case.grad_x = None, None
    apart = case.backward()
    for a, e in zip(apart, case.exact_backward(), strict=True):
        assert_close(a, e, relative=relative)
    case.apart = False
    for i, (a, b) in enumerate(zip(apart, case.backward(), strict=True)):
        if i in (4, 5, 8):  # those of the projections, and of the gain, which is a sum over them
            assert_close(a, b.double(), relative=relative)
        else:
            assert_same([a], [b])


@pytest.mark.parametrize(("m", "n", "d"), [(2, 70, 5), (66, 70, 3)])
def test_more_than_64_slots(m, n, d):
    """The columns of the carry's projection are shared out among programs, and those of beta if there are so many."""
    case = Case(m, n, d, tokens=2, read=False)
    for a, e in zip(case.backward(), case.exact_backward(), strict=True):
        assert_close(a, e)


# To the bit


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(
    ("m", "n", "d", "launch"),
    [(2, 3, 40, None), (2, 3, 40, Launch(16, True, 4)), (4, 8, 20, Launch(16, False, 8))],
)
def test_fused_is_write_then_read(m, n, d, dtype, launch, monkeypatch):
    launched(monkeypatch, launch)
    c = Case(m, n, d, dtype, tokens=5)
    new, _ = backend.forward(c.state, c.z, c.write, None, None)
    _, x = backend.forward(new, None, None, c.read, c.norm)
    assert_same(c.forward(), [new, x])
    through, *of_read = backend.backward(None, c.grad_x, new, None, None, c.read, c.norm, True)
    rest = backend.backward(c.grad_state + through, None, c.state, c.z, c.write, None, None, True)
    assert_same(c.backward(), [*rest, *of_read])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("m", "n", "d"), [(2, 3, 300), (8, 64, 130)])
def test_fused_is_write_then_read_of_many_columns(m, n, d, dtype, monkeypatch):
    test_fused_is_write_then_read(m, n, d, dtype, None, monkeypatch)


@pytest.mark.skipif(not COMPILED, reason="in bfloat16 the sums are in one order on tensor cores alone")
@pytest.mark.parametrize(("m", "n", "d"), [(2, 3, 300), (4, 16, 300), (8, 64, 300), (2, 70, 130)])
def test_fused_is_write_then_read_of_many_columns_in_bfloat16(m, n, d, monkeypatch):
    test_fused_is_write_then_read(m, n, d, torch.bfloat16, None, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("m", "n", "d"), [(2, 3, 70), (4, 16, 70), (1, 4, 33), (8, 64, 70)])
def test_few_tokens_are_as_among_many(m, n, d, dtype):
    """Projections made ready for all tiles, or by each; several tokens a tile and the last one not full."""
    many = Case(m, n, d, dtype, tokens=17)
    few = Case(m, n, d, dtype, tokens=17)
    few.state, few.z, few.grad_state, few.grad_x = (t[:5] for t in (few.state, few.z, few.grad_state, few.grad_x))
    assert_same(few.forward(), [t[:5] for t in many.forward()])
    assert_same(few.backward(needs_weights=False), [t[:5] for t in many.backward(needs_weights=False)])


@pytest.mark.parametrize(("m", "n", "d"), [(2, 3, 40), (4, 16, 17)])
def test_packed_or_not_the_weights_get_the_same_gradients(m, n, d, monkeypatch):
    case = Case(m, n, d, torch.bfloat16, tokens=9)
    results = []
    for few in (16, 0):
        monkeypatch.setattr(backend, "_FEW", few)
        results.append(case.backward())
    assert_same(*results)


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize(("m", "n", "d"), [(2, 3, 300), (4, 16, 300), (8, 64, 300), (2, 70, 300)])
def test_forward_and_backward_share_out_the_columns_alike(m, n, d, split):
    """Else the backward would not compute the forward's new state again to the bit."""
    launch = tuning.rule(n, d)
    a, b = (backend.tiling(m, n, d, launch, split, backward) for backward in (False, True))
    assert a["S"] == b["S"]
    # the order of columns depends on the chunk, or three products in TF32 are added up before they are added
    assert (split and n < 64) or (a["BD"], a["U"]) == (b["BD"], b["U"])
    assert a["NC"] * a["BD"] == b["NC"] * b["BD"] >= d / a["S"]
    assert b["BT"] >= a["BT"]


def test_two_runs_agree():
    case = Case(4, 8, 20, torch.bfloat16, tokens=5)
    assert_same(case.forward(), case.forward())
    assert_same(case.backward(), case.backward())


# The backend


def test_launches(monkeypatch):
    """One forward for few tokens, as when decoding, else two; gradients of weights take one more, or two."""
    from vwn.ops import triton_backward, triton_forward, triton_pack, triton_sums, triton_weights

    launches = []

    class Counted:
        def __init__(self, kernel, name):
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid):
            launches.append(self.name)
            return self.kernel[grid]

    kernels = [(triton_forward, "boundary"), (triton_backward, "boundary_backward"), (triton_sums, "sums")]
    for module, name in [*kernels, (triton_pack, "pack"), (triton_weights, "over_rows")]:
        monkeypatch.setattr(module, name, Counted(getattr(module, name), name))

    def launched_by(what, *arguments):
        launches.clear()
        what(*arguments)
        return launches.copy()

    for tokens in (1, 16):
        few = Case(2, 3, 12, tokens=tokens)
        assert launched_by(few.forward) == ["boundary"]
        assert launched_by(few.backward) == ["boundary_backward", "sums"]
    many = Case(2, 3, 12, tokens=17)
    assert launched_by(many.forward) == ["pack", "boundary"]
    assert launched_by(many.backward) == ["pack", "boundary_backward", "sums"]
    assert launched_by(many.backward, True, False) == ["pack", "boundary_backward"]
    assert launched_by(Case(2, 33, 5, tokens=1).backward) == ["boundary_backward", "over_rows", "sums"]
    assert launched_by(Case(2, 33, 5, tokens=1).backward, True, False) == ["boundary_backward"]
    assert launched_by(Case(2, 33, 5, tokens=1, write=False).backward) == ["boundary_backward", "sums"]
    assert launched_by(Case(2, 3, 12, tokens=17, dynamic=(False, False)).forward) == ["boundary"]
    assert launched_by(Case(2, 3, 12, tokens=0).forward) == []


@pytest.mark.skipif(COMPILED, reason="a compiled kernel does not see the change")
def test_the_result_is_the_kernels(monkeypatch):
    from vwn.ops import triton_forward

    case = Case(2, 3, 12)
    right = case.forward()
    mixed = triton_forward.mixed
    monkeypatch.setattr(triton_forward, "mixed", lambda a, x, acc, split: mixed(a, x, acc, split) * 2)
    assert all((a != b).any() for a, b in zip(right, case.forward(), strict=True))


def test_through_the_ops():
    c = Case(2, 3, 12, tokens=6)
    inputs = [c.state.view(2, 3, -1), c.z.view(2, 3, -1)]
    results = []
    for name in ("triton", "reference"):
        state, z = (t.clone().requires_grad_() for t in inputs)
        weights = [RoutingWeights(*(t.clone().requires_grad_() for t in c.write[:-1]), c.write.eps)]
        weights.append(ReadWeights(*(t.clone().requires_grad_() for t in c.read[:-1]), c.read.eps))
        new, x = ops.write_read(state, z, *weights, c.norm, backend=name)
        (new.sin().sum() + x.cos().sum()).backward()
        results.append([new, x, state.grad, z.grad, *(t.grad for w in weights for t in w[:-1])])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


def test_unavailable(monkeypatch):
    here = torch.device(DEVICE)
    assert backend.unavailable(here, torch.bfloat16) is None
    assert "float64 is not supported" in str(backend.unavailable(here, torch.float64))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "not on cpu" in str(backend.unavailable(torch.device("cpu"), torch.float32))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in str(backend.unavailable(torch.device("cuda"), torch.float32))
    backends._choose.cache_clear()
    with pytest.raises(UserError, match="pip install triton"):
        backends.choose("triton", torch.device("cuda"), torch.float32)
    backends._choose.cache_clear()
