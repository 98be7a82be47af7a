"""Over-width embedding and reduce against the reference, torch's own GroupNorm, and their refusals."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import reference
from conftest import perturb
from vwn import Geometry, OverWidthEmbedding, OverWidthReduce

V = 11
GEOMETRIES = [
    Geometry(6, 1, 1),
    Geometry(6, 1, 4),
    Geometry(6, 2, 3),
    Geometry(6, 2, 4),
    Geometry(6, 3, 7),
    Geometry(6, 3, 3),
]
WHOLE = [g for g in GEOMETRIES if g.is_whole]
IDS = torch.tensor([[0, 3, 10], [7, 7, 1]])
EACH = pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)


def state_for(geometry: Geometry, *lead: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (3 * torch.randn(*lead, geometry.over_width) + 0.7).to(dtype)


# Embedding


@EACH
def test_direct_is_one_wide_table(geometry):
    embedding = perturb(OverWidthEmbedding(geometry, V, "direct"))
    assert {k: tuple(v.shape) for k, v in embedding.named_parameters()} == {"table.weight": (V, geometry.over_width)}
    assert torch.equal(embedding(IDS), embedding.table.weight[IDS])


@EACH
def test_factorised_is_a_table_and_one_linear(geometry):
    embedding = perturb(OverWidthEmbedding(geometry, V, "factorised"))
    D = geometry.hidden_size
    assert {k: tuple(v.shape) for k, v in embedding.named_parameters()} == {
        "table.weight": (V, D),
        "expand_weight": (geometry.over_width, D),
    }
    out = embedding(IDS)
    wanted = reference.expand(embedding.table.weight[IDS].detach(), embedding.expand_weight.detach())
    assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    out.sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert embedding(IDS).dtype == torch.float32  # the stream's own, see the residual connection
    assert embedding.expand_weight.grad.abs().min() > 0
    assert embedding.table.weight.grad[3].abs().min() > 0


@EACH
def test_replicated_repeats_segments_cyclically(geometry):
    embedding = perturb(OverWidthEmbedding(geometry, V, "replicated"))
    rows = embedding.table.weight[IDS]
    assert {k: tuple(v.shape) for k, v in embedding.named_parameters()} == {"table.weight": (V, geometry.hidden_size)}
    assert torch.equal(embedding(IDS), reference.replicate(rows, geometry.m, geometry.n))


def test_all_forms_start_at_the_same_scale():
    geometry = Geometry(64, 2, 8)
    for form in ("direct", "factorised", "replicated"):
        torch.manual_seed(0)
        out = OverWidthEmbedding(geometry, 200, form)(torch.arange(200)).detach()
        assert abs(float(out.std()) - 1) < 0.05, form


@pytest.mark.parametrize("form", ["direct", "factorised", "replicated"])
def test_padding_row_is_zero_and_gets_no_gradient(form):
    embedding = OverWidthEmbedding(Geometry(6, 2, 3), V, form, padding_idx=4)
    assert not embedding(torch.tensor([4])).any()
    (embedding(torch.tensor([4, 5])) ** 2).sum().backward()
    assert not embedding.table.weight.grad[4].any()
    assert embedding.table.weight.grad[5].any()


def test_unknown_embedding_form_is_refused():
    with pytest.raises(ValueError, match=r"direct.*factorised.*replicated.*'wide'"):
        OverWidthEmbedding(Geometry(6, 2, 3), V, "wide")


# Reduce


@pytest.mark.parametrize("norm", ["group_norm", "rms_norm", "none"])
@pytest.mark.parametrize("geometry", WHOLE, ids=str)
def test_linear_reduce_equals_the_reference_with_gradients(geometry, norm):
    reduce = perturb(OverWidthReduce(geometry, "linear", norm))
    state = state_for(geometry, 2, 3).requires_grad_()
    names = {"weight"} | ({"group_norm"} if norm != "none" else set())
    names |= {"group_norm_bias"} if norm == "group_norm" else set()
    parameters = dict(reduce.named_parameters())
    assert set(parameters) == names
    copies = {k: p.detach().double().requires_grad_() for k, p in parameters.items()}
    other = state.detach().double().requires_grad_()
    wanted = reference.linear_reduce(
        other, copies["weight"], copies.get("group_norm"), copies.get("group_norm_bias"), norm, reduce.eps
    )
    out = reduce(state)
    assert out.shape == (2, 3, geometry.hidden_size)
    assert_close(out.double(), wanted, rtol=1e-5, atol=2e-5)
    direction = torch.randn(out.shape, dtype=torch.float64)
    (out * direction.float()).sum().backward()
    (wanted * direction).sum().backward()
    assert_close(state.grad.double(), other.grad, rtol=1e-4, atol=2e-5)
    for name, copy in copies.items():
        assert_close(parameters[name].grad.double(), copy.grad, rtol=1e-4, atol=5e-5)


@EACH
def test_sum_adds_the_replicas(geometry):
    reduce = OverWidthReduce(geometry, "sum")
    assert not list(reduce.parameters())
    state = state_for(geometry, 2, 3)
    assert_close(reduce(state), reference.sum_replicas(state, geometry.m, geometry.n), rtol=1e-6, atol=1e-6)


def test_defaults_are_the_papers():
    assert (OverWidthReduce(Geometry(6, 2, 4)).form, OverWidthReduce(Geometry(6, 2, 4)).norm) == (
        "linear",
        "group_norm",
    )
    assert (OverWidthReduce(Geometry(6, 2, 3)).form, OverWidthReduce(Geometry(6, 2, 3)).norm) == ("linear", "none")
    assert (OverWidthReduce(Geometry(6, 2, 2)).form, OverWidthReduce(Geometry(6, 2, 2)).norm) == ("identity", "none")


@EACH
def test_first_slots_starts_as_the_residual_stream(geometry):
    state = state_for(geometry, 4)
    reduce = OverWidthReduce(geometry, "linear", "none", init="first_slots")
    assert torch.equal(reduce(state), state[:, : geometry.hidden_size])


def test_normal_init_has_variance_one_over_the_width():
    reduce = OverWidthReduce(Geometry(128, 2, 8))
    assert abs(float(reduce.weight.detach().std()) * reduce.weight.shape[1] ** 0.5 - 1) < 0.03
    assert (reduce.group_norm == 1).all()
    assert (reduce.group_norm_bias == 0).all()


@pytest.mark.parametrize("norm", ["group_norm", "rms_norm"])
def test_norm_statistics_are_float32_for_half_states(norm):
    """With statistics in bfloat16 a large common offset would drown the differences."""
    geometry = Geometry(64, 2, 4)
    reduce = OverWidthReduce(geometry, "linear", norm).bfloat16()
    state = (torch.randn(4, geometry.over_width) + 20).bfloat16()
    wanted = reduce.double()(state.double())
    out = reduce.bfloat16()(state)
    assert out.dtype == torch.bfloat16
    assert (out.double() - wanted).abs().max() < 0.02 * wanted.abs().max()


@pytest.mark.parametrize(
    ("geometry", "options", "message"),
    [
        (Geometry(6, 2, 4), {"form": "mean"}, r"linear.*sum.*identity.*'mean'"),
        (Geometry(6, 2, 4), {"norm": "layer_norm"}, r"group_norm.*rms_norm.*none.*'layer_norm'"),
        (Geometry(6, 2, 4), {"init": "zeros"}, r"first_slots.*normal.*'zeros'"),
        (Geometry(6, 2, 4), {"form": "identity"}, r"n = m.*m = 2, n = 4"),
        (Geometry(6, 2, 3), {"norm": "group_norm"}, r"integer r.*3/2.*'none'"),
        (Geometry(6, 2, 4), {"form": "sum", "norm": "group_norm"}, r"'group_norm'.*linear.*'sum'"),
    ],
)
def test_reduce_refusals(geometry, options, message):
    with pytest.raises(ValueError, match=message) as error:
        OverWidthReduce(geometry, **options)
    assert "\n" not in str(error.value)
