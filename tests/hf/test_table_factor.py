"""The plain backbone with a factorised wide table at both ends, against plain models with the products as tables."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tiny import VOCAB, build, stock, token_ids, vwn_config
from vwn.hf import VirtualWidthForCausalLM

PLAIN = {"m": 1, "n": 1, "connection": "residual"}


def with_factor(k: int = 3, **fields) -> VirtualWidthForCausalLM:
    return build(vwn_config(**PLAIN, table_factor=k, **fields))


def test_it_is_the_stock_model_with_the_products_as_tables():
    """Forward and backward in float64; by the chain rule a factor's gradient is the product's times the other."""
    model = with_factor(3).double()
    embedding, expand, head = model.model.embed_tokens, model.unembed_expand.weight, model.lm_head.weight
    theirs = stock().double()
    weights = {n.replace(".backbone.", "."): v for n, v in model.state_dict().items() if "embed" not in n}
    weights["model.embed_tokens.weight"] = embedding.table.weight @ embedding.contract_weight.T
    weights["lm_head.weight"] = head @ expand
    theirs.load_state_dict(weights)
    ids = token_ids()
    ours, wanted = model(ids, labels=ids), theirs(ids, labels=ids)
    assert_close(ours.logits, wanted.logits)
    model(ids).logits.square().mean().backward()
    theirs(ids).logits.square().mean().backward()
    into, out_of = theirs.get_input_embeddings().weight.grad, theirs.lm_head.weight.grad
    rows = [i for i in range(VOCAB) if i != 0]  # row 0 is the padding's, which has no gradient
    assert_close(embedding.table.weight.grad[rows], (into @ embedding.contract_weight)[rows])
    assert_close(embedding.contract_weight.grad, into.T @ embedding.table.weight)
    assert_close(head.grad, out_of @ expand.T)
    assert_close(expand.grad, head.T @ out_of)


@pytest.mark.parametrize("tied", [False, True])
def test_every_head_goes_through_the_factors(tied):
    """The multi-token modules too: against the same model without a factor."""
    model = with_factor(3, num_mtp_modules=2, tie_word_embeddings=tied)
    plain = build(vwn_config(**PLAIN, num_mtp_modules=2))
    factors = ("model.embed_tokens.", "unembed_expand.")
    weights = {n: v for n, v in model.state_dict().items() if not n.startswith(factors)}
    embedding = model.model.embed_tokens
    weights["model.embed_tokens.table.weight"] = embedding.table.weight @ embedding.contract_weight.T
    weights["lm_head.weight"] = model.lm_head.weight @ model.unembed_expand.weight
    plain.load_state_dict(weights)
    ids = token_ids()
    ours, wanted = (x(ids, labels=ids, output_mtp_logits=True) for x in (model, plain))
    assert_close(ours.logits, wanted.logits, rtol=1e-4, atol=1e-4)
    assert_close(torch.stack(ours.mtp_logits), torch.stack(wanted.mtp_logits), rtol=1e-4, atol=1e-4)
    assert_close(torch.stack(ours.losses), torch.stack(wanted.losses), rtol=1e-4, atol=1e-4)
    assert (model.lm_head.weight is embedding.table.weight) == tied
    assert_close(model(ids, logits_to_keep=2).logits, ours.logits[:, -2:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("k", "tied"), [(2, True), (8, False)])
def test_rows_and_logits_start_at_the_plain_models_scale(k, tied):
    sizes = {"hidden_size": 96, "vocab_size": 2000}
    scales = []
    for factor in (1, k):
        torch.manual_seed(0)
        model = VirtualWidthForCausalLM(vwn_config(backbone=sizes, **PLAIN, table_factor=factor))
        model.get_input_embeddings().weight.data.mul_(1 / 0.02)  # as presets do
        rows = model.model.embed_tokens(torch.arange(1, 2000))
        if tied:
            model.lm_head.weight = model.get_input_embeddings().weight
        logits = model.lm_head(model.unembed_expand(torch.randn(100, 96)))
        scales.append((float(rows.detach().std()), float(logits.detach().std())))
    assert scales[0][0] == pytest.approx(1, rel=0.02)
    assert scales[1] == pytest.approx(scales[0], rel=0.05)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**PLAIN, "table_factor": 0}, "table_factor must be 1 or more, got 0"),
        ({**PLAIN, "table_factor": 2, "embedding": "factorised"}, "table_factor = 2 .* form 'factorised'"),
        ({"m": 2, "n": 4, "table_factor": 2}, "table_factor = 2 is for the plain backbone, .* connection 'ghc'"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        vwn_config(**fields)
    assert "\n" not in str(error.value)
