"""Under autocast the over-width state is in autocast's dtype at every read and write, and the routing in float32."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from relatives import EVERY_KIND, KINDS
from tiny import build, same_bits, step, token_ids, vwn_config
from vwn.nn.connection import Connection
from vwn.nn.generalized import GeneralizedHyperConnection

HALF = torch.bfloat16


@pytest.fixture
def seen(monkeypatch) -> list[torch.dtype]:
    """Dtypes of the states and outputs that connections are given and give, in the order of the calls."""
    found: list[torch.dtype] = []

    def watch(owner, name):
        method = getattr(owner, name)

        def run(*args, **kwargs):
            out = method(*args, **kwargs)
            tensors = [t for t in (args[1], *(out if isinstance(out, tuple) else (out,))) if isinstance(t, Tensor)]
            found.extend(t.dtype for t in tensors)
            return out

        monkeypatch.setattr(owner, name, run)

    for name in ("_read", "_write", "write_read"):
        for owner in (Connection, GeneralizedHyperConnection):
            watch(owner, name)
    return found


@contextmanager
def mixed():
    with torch.autocast("cpu", dtype=HALF):
        yield


@EVERY_KIND
def test_every_state_has_the_dtype_of_autocast(seen, kind):
    embedding = {"embedding": "factorised"} if kind == "frac" else {}
    model = build(vwn_config(num_mtp_modules=2, **KINDS[kind] | embedding)).train()
    with mixed():
        out = model(token_ids(), labels=token_ids(), output_over_width_state=True)
    assert out.over_width_state.dtype == HALF
    assert set(seen) == {HALF}
    assert len(seen) >= 2 * 2 * (2 + 2)  # a read and a write for two sublayers of two layers and two modules
    seen.clear()
    model(token_ids())
    assert set(seen) == {torch.float32}


def test_the_ops_compute_the_routing_in_float32_and_save_half_the_bytes():
    connection = GeneralizedHyperConnection(16, 2, 3)
    state = torch.randn(5, 24, requires_grad=True)
    dtypes = {}
    record = lambda t: dtypes.setdefault(t.shape, t.dtype) and t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(record, lambda t: t), mixed():
        connection.write(state, torch.randn(5, 16))
    assert dtypes[(5, 24)] == dtypes[(5, 16)] == HALF
    assert dtypes[(3, 5)] == dtypes[(8, 5)] == torch.float32


def test_float64_stays():
    connection = GeneralizedHyperConnection(16, 2, 3).double()
    with mixed():
        assert connection.read(torch.randn(5, 24, dtype=torch.float64)).dtype == torch.float64


def test_losses_and_gradients_are_those_of_float64_within_bfloat16():
    model = build(vwn_config("llama", 4, 8, num_mtp_modules=1)).train()
    with mixed():
        found = step(model)
    assert not same_bits(found, step(model))
    right = step(model.double())
    assert found["loss"].item() == pytest.approx(right["loss"].item(), rel=0.01)
    for name, wanted in right.items():
        assert found[name].dtype == torch.float32, name
        error = (found[name].double() - wanted).norm() / wanted.norm()
        assert error < 0.1, (name, error)


@pytest.mark.slow
def test_compiles_as_one_graph():
    torch._dynamo.reset()
    model = build(vwn_config("llama", 2, 4))
    with mixed():
        wanted = model(token_ids(), use_cache=False).logits
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(token_ids(), use_cache=False).logits
    assert (found.float() - wanted.float()).abs().max() < 0.05 * wanted.abs().max()
