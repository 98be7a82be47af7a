"""The relatives in a model: training, saving, decoding, options, weight decay and cost."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from relatives import EVERY_KIND, KINDS
from tiny import build, copy_stock_weights, step, stock, token_ids, vwn_config
from vwn import UserError, no_weight_decay
from vwn.cost import connection_cost
from vwn.hf import VirtualWidthForCausalLM
from vwn.nn.connection import Connection
from vwn.nn.relatives import HyperConnection, ManifoldHyperConnection


def model_of(kind: str, **fields) -> VirtualWidthForCausalLM:
    return build(vwn_config(backbone={"num_hidden_layers": 3}, **KINDS[kind] | fields))


@EVERY_KIND
def test_starts_as_the_plain_transformer(kind):
    """Streams that are equal stay so; their sum and mHC's gain of 1 + 2 (n - 1) σ(-3) vanish in the norms behind."""
    torch.manual_seed(0)
    fields = KINDS[kind] | {"embedding": "replicated"}
    model = VirtualWidthForCausalLM(vwn_config(backbone={"num_hidden_layers": 3}, reduce_norm="none", **fields))
    plain = stock("llama", num_hidden_layers=3)
    copy_stock_weights(plain, model).eval()
    tolerance = 2e-3 if kind == "ghc_ds" else 2e-4
    assert_close(model(token_ids()).logits, plain(token_ids()).logits, rtol=tolerance, atol=tolerance)


@EVERY_KIND
def test_sublayers_are_counted_through_the_mtp_modules(kind):
    model = model_of(kind, num_mtp_modules=2)
    connections = [c for c in model.modules() if isinstance(c, Connection)]
    assert len(connections) == 2 * (3 + 2)
    assert {c.kind for c in connections} == {model.config.connection}
    if kind != "ghc_ds":
        assert [c.index for c in connections] == list(range(10))


@EVERY_KIND
def test_every_weight_gets_a_gradient(kind):
    model = model_of(kind, num_mtp_modules=1).train()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == step(model).keys() - {"loss"}


@EVERY_KIND
def test_save_and_load(kind, tmp_path):
    model = model_of(kind, num_mtp_modules=1)
    model.save_pretrained(tmp_path)
    again = VirtualWidthForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert again.config.to_dict()["connection"] == model.config.connection
    assert again.config.carry_constraint == model.config.carry_constraint
    assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)
    half = VirtualWidthForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    dtypes = {"connections" in name: p.dtype for name, p in half.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    for name, p in half.named_parameters():
        if "connections" in name:
            assert torch.equal(p, model.get_parameter(name))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mhc", "ghc_ds"])
def test_compiles_as_one_graph(kind):
    torch._dynamo.reset()
    model = build(vwn_config(backbone={"num_hidden_layers": 1}, **KINDS[kind]))
    wanted = model(token_ids(), use_cache=False).logits
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(token_ids(), use_cache=False).logits
    assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@EVERY_KIND
def test_states_that_cannot_be_rebuilt_are_kept(kind):
    model = model_of(kind)
    model.keep_states_every = 2
    with pytest.raises(UserError, match=rf"keep_states_every = 2 cannot rebuild .* {model.config.connection!r}.* to 1"):
        model(token_ids())


@EVERY_KIND
def test_backends_of_a_model(kind):
    model = model_of(kind)
    wanted = model(token_ids()).logits
    for name in ("auto", "reference"):
        model.set_connection_backend(name)
        assert_close(model(token_ids()).logits, wanted, rtol=1e-4, atol=1e-4)
    if kind in ("hc", "frac"):
        with pytest.raises(UserError, match="'compiled' does not run"):
            model.set_connection_backend("compiled")
    else:
        model.set_connection_backend("compiled")
        assert {c.backend for c in model.modules() if isinstance(c, Connection)} == {"compiled"}
    with pytest.raises(UserError, match="'triton'"):
        model.set_connection_backend("triton")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"connection": "mhc", "m": 2, "n": 4}, "connection 'mhc' .* m = 1; got m = 2"),
        ({"connection": "mhc", "m": 1, "n": 4, "dynamic": False}, "'mhc' is dynamic .* dynamic = False"),
        ({"connection": "hc", "carry_constraint": "doubly_stochastic"}, "'doubly_stochastic' belongs .*'ghc'.* 'hc'"),
    ],
)
def test_configurations_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        vwn_config(**fields)


# Weight decay and cost


def test_what_is_not_decayed():
    assert no_weight_decay(HyperConnection(12, 1, 4)) == {"bias_alpha", "bias_beta", "slot_norm", "slot_norm_bias"}
    assert no_weight_decay(HyperConnection(12, 1, 4, dynamic=False)) == {"bias_alpha", "bias_beta"}
    assert no_weight_decay(ManifoldHyperConnection(12, 4)) == {"pre_bias", "post_bias", "res_bias"}
    assert len([name for name in no_weight_decay(model_of("mhc")) if "connections" in name]) == 6 * 3


@EVERY_KIND
def test_cost_of_a_connection(kind):
    connection = next(m for m in model_of(kind).modules() if isinstance(m, Connection))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        connection(torch.randn(2, 9, connection.geometry.over_width), lambda x: x)
    options = {"dynamic": connection.dynamic, "kind": connection.kind, "sinkhorn_rounds": connection.sinkhorn_rounds}
    assert connection_cost(connection.geometry, **options).matmul_flops == counter.get_total_flops() / 18


def test_output_matrices_of_hyper_connections_start_smaller_by_the_root_of_the_streams():
    """The sum of the streams keeps its scale (arXiv 2409.19606); nothing else moves, nor another kind of model."""
    from vwn.training.output_init import output_matrices, start_outputs

    fields = {"m": 1, "n": 4, "embedding": "replicated", "reduce": "sum"}
    for connection, factor in (("hc", 0.5), ("ghc", 1.0)):
        model = build(vwn_config(connection=connection, **fields))
        before = {name: p.clone() for name, p in model.named_parameters()}
        start_outputs(model, "config")
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name] * (factor if name in output_matrices(model) else 1.0)), name
