"""Read, write and write_read on the backends of a CPU: against float64, to the bit, and as PyTorch sees them."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.library import CustomOpDef, opcheck
from torch.utils.flop_counter import FlopCounterMode

import reference as loops
from vwn import Geometry, ops
from vwn.cost.connection import connection_cost
from vwn.ops import backends, reference
from vwn.ops.weights import Inputs, NormWeights, RoutingWeights

KINDS = ("read", "write", "write_read")
HALF = (torch.bfloat16, torch.float16)
WRITE_EPS, READ_EPS, NORM_EPS = 1e-3, 1e-2, 1e-1  # large and different, so that a wrong one shows
TOKENS = 35

FEW_SHAPES = [(1, 4, 16), (2, 3, 5), (4, 8, 17)]
SHAPES = [*FEW_SHAPES, (1, 1, 5), (2, 2, 1), (3, 7, 17), (4, 16, 32), (8, 64, 5)]
EVERY_SHAPE = pytest.mark.parametrize(("m", "n", "d"), SHAPES)
A_FEW_SHAPES = pytest.mark.parametrize(("m", "n", "d"), FEW_SHAPES)
PAIRS = list(product([True, False], repeat=2))
SIDES = pytest.mark.parametrize("dynamic", PAIRS, ids=lambda p: "-".join("dynamic" if x else "static" for x in p))
ALIKE = pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
NORM = pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])

Tensors = dict[str, Tensor]


def make(m, n, d, *lead, dtype=torch.float32, dynamic=(True, True), norm=True, carry=(True, True)) -> Tensors:
    """Inputs of a write followed by a read; no gain is one, no scale zero; without a ``carry`` it is the identity."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    t = {"state": draw(*lead, n * d).to(dtype), "z": draw(*lead, m * d).to(dtype)}
    if norm:
        t["norm"] = (1 + 0.3 * draw(m * d)).to(dtype)
    for side, varies, carries in zip(("write", "read"), dynamic, carry, strict=True):
        columns = m + n if carries else m
        w = {"bias_alpha": draw(n, columns), "bias_beta": draw(m, n)}
        if varies:
            w |= {"dynamic_alpha": draw(d, columns), "dynamic_beta": draw(d, m), "slot_norm": 1 + 0.3 * draw(d)}
            w |= {"scale_alpha": draw(n, columns), "scale_beta": draw(m, n)}
        wide = torch.promote_types(dtype, torch.float32)
        t |= {f"{side}.{name}": x.to(wide) for name, x in w.items() if side == "write" or not name.endswith("beta")}
    return t


def parts(t: Tensors) -> tuple[RoutingWeights, RoutingWeights, NormWeights | None]:
    def side(name: str, eps: float) -> RoutingWeights:
        return RoutingWeights(*(t.get(f"{name}.{field}") for field in RoutingWeights._fields[:-1]), eps)  # type: ignore

    return side("write", WRITE_EPS), side("read", READ_EPS), NormWeights(t["norm"], NORM_EPS) if "norm" in t else None


def call(kind: str, t: Tensors, backend: str) -> Tensors:
    """The new state and ``x``, as far as the op gives them; ``plain`` is the reference without an op around it."""
    write, read, norm = parts(t)
    if backend == "plain":
        w, r, z = None if kind == "read" else write, None if kind == "write" else read, t["z"]
        found = reference.forward(Inputs(t["state"], z, w, r, norm))
        return {name: x for name, x in zip(("new", "x"), found, strict=True) if x is not None}
    if kind == "write_read":
        return dict(zip(("new", "x"), ops.write_read(t["state"], t["z"], write, read, norm, backend), strict=True))
    out = {} if kind == "read" else {"new": ops.write(t["state"], t["z"], write, backend)}
    return out if kind == "write" else out | {"x": ops.read(out.get("new", t["state"]), read, norm, backend)}


def directions(out: Tensors) -> Tensors:
    generator = torch.Generator().manual_seed(9)
    return {name: torch.randn(x.shape, generator=generator).to(x.dtype) for name, x in out.items()}


def run(kind: str, t: Tensors, backend: str, given: Tensors | None = None) -> Tensors:
    """Outputs, and under their names the gradients of the inputs that they depend on."""
    t = {name: x.detach().requires_grad_() for name, x in t.items()}
    out = call(kind, t, backend)
    given = {name: (given or directions(out))[name] for name in out}
    found = torch.autograd.grad(list(out.values()), list(t.values()), list(given.values()), allow_unused=True)
    return {name: x.detach() for name, x in [*out.items(), *zip(t, found, strict=True)] if x is not None}


def run_in_float64(kind: str, t: Tensors) -> tuple[Tensors, Tensors]:
    """The same by autograd, which believes no hand-written backward; and the largest magnitude of each tensor, for a
    sum over tokens with all its terms positive."""
    wide = {name: x.double() for name, x in t.items()}
    rows = {name: wide.pop(name) for name in ("state", "z")}
    right = call(kind, wide | rows, "plain")
    given = {name: g.to(t["state"].dtype).double() for name, g in directions(right).items()}

    def objective(weights: Tensors, rows: Tensors, given: Tensors) -> Tensor:
        return sum((x * given[name]).sum() for name, x in call(kind, weights | rows, "plain").items())  # type: ignore

    grad_weights, grad_rows = torch.vmap(torch.func.grad(objective, (0, 1)), (None, 0, 0))(wide, rows, given)
    sizes = {name: x.abs().max() for name, x in (right | grad_rows).items()}
    sizes |= {name: x.abs().sum(0).max() for name, x in grad_weights.items()}
    right |= grad_rows | {name: x.sum(0) for name, x in grad_weights.items()}
    return {name: x for name, x in right.items() if sizes[name]}, sizes


def close(actual: Tensor, wanted: Tensor, tolerance: float, size: Tensor | None = None) -> bool:
    size = wanted.abs().max() if size is None else size
    return bool((actual.double() - wanted).abs().max() < tolerance * size)


def ulps(actual: Tensor, wanted: Tensor) -> float:
    """Largest distance in units of the last place, of numbers not far below the largest."""
    size = wanted.abs().clamp_min(wanted.abs().max() * 0.05)
    unit = torch.finfo(actual.dtype).eps * torch.exp2(torch.floor(torch.log2(size)))
    return float(((actual.double() - wanted).abs() / unit).max())


def same_bits(one: Tensors, other: Tensors) -> bool:
    assert one.keys() == other.keys()
    return all(x.dtype == other[name].dtype and torch.equal(x, other[name]) for name, x in one.items())


@SIDES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@EVERY_SHAPE
def test_outputs_and_gradients_equal_float64(backend, m, n, d, dtype, dynamic):
    for (norm, carry), kind in product([(False, True), (True, True), (True, False)], KINDS):
        t = make(m, n, d, TOKENS, dtype=dtype, dynamic=dynamic, norm=norm, carry=(carry, carry))
        result, (right, sizes) = run(kind, t, backend), run_in_float64(kind, t)
        assert all(x.dtype == dtype and (name in right or not x.any()) for name, x in result.items())
        for name, x in ((name, result[name]) for name in right):
            tolerance = 1e-5 if dtype == torch.float32 else 1e-13
            assert close(x, right[name], tolerance, sizes[name]), (kind, norm, carry, name)


@ALIKE
@pytest.mark.parametrize("dtype", HALF)
@EVERY_SHAPE
def test_half_precision_rounds_float64_once(backend, m, n, d, dtype, dynamic):
    """Outputs and gradients of state and input are the nearest numbers; the weights' are as good as in float32."""
    for kind, carry in product(("read", "write"), (True, False)):
        t = make(m, n, d, TOKENS, dtype=dtype, dynamic=(dynamic, dynamic), norm=False, carry=(carry, carry))
        result, (right, sizes) = run(kind, t, backend), run_in_float64(kind, t)
        assert all(name in right or not x.any() for name, x in result.items())
        for name, x in ((name, result[name]) for name in right):
            assert x.dtype == (torch.float32 if "." in name else dtype)
            near = close(x, right[name], 1e-5, sizes[name]) if "." in name else ulps(x, right[name]) < 0.51
            assert near, (kind, carry, name)


@pytest.mark.parametrize("dtype", HALF)
@A_FEW_SHAPES
def test_half_precision_norm_rounds_where_the_llama_norm_does(backend, m, n, d, dtype):
    t = make(m, n, d, TOKENS, dtype=dtype)
    result, x = (
        run("read", t, backend),
        call("read", {k: v for k, v in t.items() if k != "norm"}, backend)["x"].double(),
    )
    unit = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPS)).to(dtype)
    assert ulps(result["x"], t["norm"].double() * unit.double()) < 1.01
    assert (result["x"] == t["norm"] * unit).float().mean() > 0.99
    right, sizes = run_in_float64("read", t)
    assert all(close(g, right[name], 4 * torch.finfo(dtype).eps, sizes[name]) for name, g in result.items())


@ALIKE
@pytest.mark.parametrize(("m", "n", "d"), [(1, 1, 2), (2, 3, 5), (3, 7, 1)])
def test_the_reference_is_the_papers(m, n, d, dynamic):
    """In float64, against loops over single numbers that know nothing of this package."""
    t = make(m, n, d, 2, dtype=torch.float64, dynamic=(dynamic, dynamic))
    weights = {name.removeprefix("write."): x for name, x in t.items() if name.startswith("write.")}
    t |= {f"read.{name}": x for name, x in weights.items() if not name.endswith("beta")}
    x, new = call("read", t, "plain")["x"], call("write", t, "plain")["new"]
    for token in range(2):
        slots, z = loops.rows(t["state"][token], n), loops.rows(t["z"][token], m)
        read = loops.flatten(loops.read(slots, loops.routing(slots, weights, m, READ_EPS)[0], m))
        assert close(x[token], torch.stack(loops.rms_norm(list(read), list(t["norm"]), NORM_EPS)), 1e-13)
        A, B = loops.routing(slots, weights, m, WRITE_EPS)
        assert close(new[token], loops.flatten(loops.write(slots, z, A, B)), 1e-13)


@NORM
@SIDES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "d"), [(1, 1, 5), (2, 3, 16), (4, 16, 17)])
def test_write_read_is_write_then_read_to_the_bit(backend, m, n, d, dtype, dynamic, norm):
    for carry in PAIRS:
        t = make(m, n, d, TOKENS, dtype=dtype, dynamic=dynamic, norm=norm, carry=carry)
        assert same_bits(run("write_read", t, backend), run("write then read", t, backend))
    leaves = {name: x.detach().requires_grad_() for name, x in t.items()}
    for used in ("new", "x"):  # the other output has no gradient
        outs = [call(kind, leaves, backend)[used] for kind in ("write_read", "write then read")]
        inputs, given = list(leaves.values()), torch.ones_like(outs[0])
        one, other = (torch.autograd.grad(out, inputs, given, allow_unused=True) for out in outs)
        assert all(torch.equal(g, torch.zeros_like(g) if h is None else h) for g, h in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_whatever_the_threads(backend, kind):
    """More tokens than one thread takes at a time."""
    t = make(4, 8, 17, 500)
    first = run(kind, t, backend)
    assert same_bits(run(kind, t, backend), first)
    for threads in (2, 3) if backend == "compiled" else ():
        torch.set_num_threads(threads)
        try:
            assert same_bits(run(kind, t, backend), first)
        finally:
            torch.set_num_threads(1)


def test_nothing_is_left_unwritten(backend):
    """The same bits where fresh memory holds NaN, as it does under deterministic algorithms."""
    cases = product(FEW_SHAPES, PAIRS, KINDS, PAIRS[::3])
    every = [(kind, make(*shape, TOKENS, dynamic=pair, carry=carry)) for shape, pair, kind, carry in cases]
    clean = [run(kind, t, backend) for kind, t in every]
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        assert all(same_bits(run(kind, t, backend), wanted) for (kind, t), wanted in zip(every, clean, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["state", "z", "gradient of new", "gradient of x"])
def test_a_nan_stays_in_its_token(backend, where, bad):
    m, n, d = 2, 3, 5
    rest = torch.arange(TOKENS) != 4
    for dynamic, norm in PAIRS:
        t = make(m, n, d, TOKENS, norm=norm, dynamic=(dynamic, dynamic))
        clean = run("write_read", t, backend)
        given, spoilt = directions({name: clean[name] for name in ("new", "x")}), {k: x.clone() for k, x in t.items()}
        (spoilt[where] if where in t else given[where.split()[-1]])[4, -1] = bad
        result = run("write_read", spoilt, backend, given)
        reached = {"new", "x"} if where in t else {"state"}
        if dynamic or norm:
            reached |= {"state", "z"}
        assert not any(result[name][4].isfinite().all() for name in reached)
        if dynamic and where == "state":
            assert all(result[name][4].isnan().all() for name in reached)
        assert not all(result[f"write.bias_{name}"].isfinite().all() for name in ("alpha", "beta"))
        for name in ("new", "x", "state", "z"):
            assert torch.equal(result[name][rest], clean[name][rest]), (name, dynamic, norm)
        assert same_bits(run("write_read", t, backend), clean)


@pytest.mark.parametrize("lead", [(), (3, 1, 5), (2, 0)])
@pytest.mark.parametrize("kind", KINDS)
def test_any_leading_shape(backend, kind, lead):
    t = make(3, 7, 5, *lead)
    result = run(kind, t, backend)
    flat = {name: x.reshape(-1, x.shape[-1]) if name in ("state", "z") else x for name, x in t.items()}
    given = {name: g.reshape(-1, g.shape[-1]) for name, g in directions(call(kind, t, backend)).items()}
    wanted = run(kind, flat, backend, given)
    assert result.keys() == wanted.keys()
    for name, x in result.items():
        assert x.shape == (t[name].shape if name in t else (*lead, x.shape[-1]))
        assert torch.equal(x.reshape(wanted[name].shape), wanted[name])


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "strided": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0],
    "contiguous but not where a vector begins": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(backend, layout, dtype):
    for kind, (m, n, d) in product(KINDS, FEW_SHAPES[1:]):
        t = make(m, n, d, 5, 7, dtype=dtype)
        moved = {name: LAYOUTS[layout](x) if x.ndim > 1 or layout != "transposed" else x for name, x in t.items()}
        given = {name: LAYOUTS[layout](g) for name, g in directions(call(kind, t, backend)).items()}
        assert same_bits(run(kind, moved, backend, given), run(kind, t, backend))


# Weights that do not train, and other dtypes


@ALIKE
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_weights_are_not_differentiated_and_change_no_bit(backend, monkeypatch, kind, dynamic):
    asked, module = [], backends.module(backend)
    original = module.backward

    def noted(*args):
        asked.append(args[-1])
        return original(*args)

    monkeypatch.setattr(module, "backward", noted)
    t = make(2, 3, 5, TOKENS, dynamic=(dynamic, dynamic))
    wanted = run(kind, t, backend)
    assert asked.pop() is True
    inputs = [name for name in t if name in wanted]
    for names in [[name for name in inputs if name in ("state", "z")], *([name] for name in inputs)]:
        leaves = {name: x.detach().requires_grad_(name in names) for name, x in t.items()}
        out = call(kind, leaves, backend)
        given = directions(out)
        found = torch.autograd.grad(list(out.values()), [leaves[k] for k in names], [given[k] for k in out])
        assert asked.pop() is not all(name in ("state", "z") for name in names)
        for name, x in [*out.items(), *zip(names, found, strict=True)]:
            assert torch.equal(x, wanted[name]), (name, names)


def test_half_precision_weights_are_cast(backend):
    t = {name: x.bfloat16() for name, x in make(2, 3, 5, TOKENS, dtype=torch.bfloat16).items()}
    wanted = run("write_read", {name: x.float() if "." in name else x for name, x in t.items()}, backend)
    assert same_bits(run("write_read", t, backend), {name: x.bfloat16() for name, x in wanted.items()})


@pytest.mark.parametrize(("dtype", "z_dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_the_sublayers_output_may_have_another_dtype(backend, dtype, z_dtype):
    t = make(2, 3, 5, TOKENS, dtype=dtype)
    t["z"] = t["z"].to(z_dtype)
    for kind in ("write", "write_read"):
        wanted = run(kind, t | {"z": t["z"].to(dtype)}, backend)
        assert same_bits(run(kind, t, backend), wanted | {"z": wanted["z"].to(z_dtype)})


# As PyTorch sees them


def arguments(t: Tensors, backend: str) -> dict[str, tuple]:
    write, read, norm = parts(t)
    normed, state, z = (None, 0.0) if norm is None else tuple(norm), t["state"], t["z"]
    read_arguments = (state, *read, *normed, backend)
    write_arguments = (state, z, *write, backend)
    both = (*write_arguments[:-1], *read_arguments[1:])
    new, x = torch.randn_like(state), torch.randn_like(z)
    backward = {"read": (x, *read_arguments), "write": (new, *write_arguments), "write_read": (new, x, *both)}
    forward = {"read": read_arguments, "write": write_arguments, "write_read": both}
    return forward | {f"{name}_backward": (*given, True) for name, given in backward.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dynamic", "norm", "backend"),
    [*((*pair, "reference") for pair in PAIRS), (True, True, "compiled"), (True, True, "triton")],
)
@pytest.mark.parametrize("op", arguments(make(1, 1, 1, 1), ""))
def test_opcheck(op, dynamic, norm, backend):
    t = make(2, 3, 5, 4, 2, dynamic=(dynamic, dynamic), norm=norm)
    t |= {name: t[name].transpose(0, 1) for name in ("state", "z")}
    if not op.endswith("backward"):
        t = {name: x.requires_grad_() for name, x in t.items()}
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    checks += ["test_aot_dispatch_dynamic"] if dynamic and norm and backend == "reference" else []  # slow
    opcheck(getattr(torch.ops.vwn, op).default, arguments(t, backend)[op], test_utils=checks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dynamic", "backend"), [("read", False, "reference"), ("write_read", True, "compiled")]
)
def test_compiles_as_one_graph_for_any_number_of_tokens(backend, kind, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: call(kind, t, backend), fullgraph=True, backend="aot_eager", dynamic=True)
    for lead in [(4, 7), (6, 11), (8, 9)]:  # no number that is also a size of the weights: those are guarded as equal
        leaves = {k: x.requires_grad_() for k, x in make(2, 3, 5, *lead, dynamic=(dynamic, dynamic)).items()}
        with torch.compiler.set_stance("default" if lead == (4, 7) else "fail_on_recompile"):
            out = compiled(leaves)
        given = list(directions(out).values())
        found = torch.autograd.grad(list(out.values()), list(leaves.values()), given, allow_unused=True)
        result = {name: x for name, x in [*out.items(), *zip(leaves, found, strict=True)] if x is not None}
        assert same_bits(result, run(kind, leaves, backend))


def test_the_dispatcher_is_passed_by_unless_something_looks_on(backend, monkeypatch):
    t = make(2, 3, 5, TOKENS)
    with torch.profiler.profile() as profile:
        dispatched = run("write_read", t, backend)
    assert {"vwn::write_read", "vwn::write_read_backward"} <= {event.key for event in profile.key_averages()}
    monkeypatch.setattr(CustomOpDef, "__call__", None)
    assert same_bits(run("write_read", t, backend), dispatched)


def flops(kind: str, t: Tensors, backend: str, f=call) -> int:
    with FlopCounterMode(display=False) as counter:
        f(kind, t, backend)
    return counter.get_total_flops()


@ALIKE
@pytest.mark.parametrize(("m", "n", "d"), [(1, 4, 3), (2, 3, 5)])
@pytest.mark.parametrize("carry", [True, False], ids=["carry", "identity"])
def test_flops_are_those_of_the_references_matrix_products(backend, m, n, d, dynamic, carry):
    t = make(m, n, d, TOKENS, dynamic=(dynamic, dynamic), carry=(carry, carry))
    forward = {kind: flops(kind, t, backend) for kind in KINDS}
    for kind, count in forward.items():
        assert count == flops(kind, t, "plain")
        assert flops(kind, t, backend, run) == flops(kind, t, "plain", run) == 3 * count
    cost = connection_cost(Geometry(m * d, m, n), dynamic=dynamic, learned_carry=carry)
    assert forward["read"] + forward["write"] == forward["write_read"] == TOKENS * cost.matmul_flops
