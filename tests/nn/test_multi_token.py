"""Block linear and the fusing of a multi-token predictor (section 3.4)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import reference
from conftest import perturb
from vwn import BlockLinear, Geometry, MultiTokenPredictor, OverWidthReduce

GEOMETRIES = [Geometry(6, 1, 1), Geometry(6, 1, 3), Geometry(6, 2, 3), Geometry(6, 3, 6), Geometry(6, 3, 3)]
EACH = pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)


def slot_norm(state: Tensor, gain: Tensor, n: int, eps: float) -> Tensor:
    """Each slot by RMSNorm with one gain of size d, by the reference's loops."""
    out = []
    for token in state.double().reshape(-1, state.shape[-1]).unbind(0):
        slots = [reference.rms_norm(slot, list(gain.double().unbind(0)), eps) for slot in reference.rows(token, n)]
        out.append(reference.flatten(slots))
    return torch.stack(out).reshape(state.shape)


def predictor_for(geometry: Geometry) -> MultiTokenPredictor:
    layer = nn.Linear(geometry.over_width, geometry.over_width)
    predictor = MultiTokenPredictor(geometry, layer, OverWidthReduce(geometry), nn.LayerNorm(geometry.hidden_size))
    return perturb(predictor, seed=4)  # pyright: ignore[reportReturnType]


def test_block_linear_keeps_the_variance():
    assert abs(float(BlockLinear(256, 128)(torch.randn(500, 256)).detach().std()) - 1) < 0.05


@EACH
def test_predictor_fuses_runs_and_reduces(geometry):
    predictor = predictor_for(geometry)
    state, embedding = torch.randn(2, 3, geometry.over_width), 5 * torch.randn(2, 3, geometry.over_width)
    h, new = predictor(state, embedding)

    left = slot_norm(state, predictor.state_norm.detach(), geometry.n, predictor.eps)
    right = slot_norm(embedding, predictor.embedding_norm.detach(), geometry.n, predictor.eps)
    fused = reference.block_linear(left, right, predictor.fuse.weight.detach(), geometry.n)
    wanted = predictor.layer(fused.float())
    assert_close(new, wanted, rtol=1e-4, atol=1e-4)
    assert_close(h, predictor.norm(predictor.reduce(wanted)), rtol=1e-4, atol=1e-4)
    assert h.shape == (2, 3, geometry.hidden_size)


def test_gains_start_at_one_and_a_zero_embedding_is_finite():
    geometry = Geometry(6, 2, 4)
    predictor = MultiTokenPredictor(geometry, nn.Identity(), OverWidthReduce(geometry), nn.Identity())
    assert (predictor.state_norm == 1).all()
    assert (predictor.embedding_norm == 1).all()
    embedding = torch.zeros(1, 2, 12, requires_grad=True)
    h, _ = predictor(torch.randn(1, 2, 12), embedding)
    h.sum().backward()
    assert torch.isfinite(h).all()
    assert torch.isfinite(embedding.grad).all()


def test_the_callers_way_of_running_the_layer_is_used():
    predictor = predictor_for(Geometry(6, 2, 3))
    seen = []

    def run(layer: nn.Module, fused: Tensor) -> Tensor:
        seen.append(layer)
        return 2 * layer(fused)

    state = torch.randn(1, 2, 9)
    _, doubled = predictor(state, state, run)
    assert seen == [predictor.layer]
    assert torch.equal(doubled, 2 * predictor(state, state)[1])
