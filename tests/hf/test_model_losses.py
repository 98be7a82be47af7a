"""Losses: each head against a hand-made cross-entropy, accumulation, ignored labels, experts' auxiliary loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tiny import build, copy_stock_weights, stock, token_ids, vwn_config
from vwn.hf import VirtualWidthForCausalLM
from vwn.hf.auxiliary_loss import router_loss


def cross_entropies(logits: Tensor, labels: Tensor, ahead: int) -> list[Tensor]:
    """Of every position that has a target ``ahead`` tokens later; by hand, one at a time."""
    out = []
    for row, targets in zip(logits.double(), labels.tolist(), strict=True):
        for t in range(len(targets) - ahead):
            if targets[t + ahead] != -100:
                out.append(row[t].logsumexp(0) - row[t, targets[t + ahead]])
    return out


def with_holes(ids: Tensor) -> Tensor:
    labels = ids.clone()
    labels[0, 2:4] = -100
    labels[1, :5] = -100
    return labels


# Multi-token prediction


@pytest.mark.parametrize(("kind", "depth"), [("llama", 0), ("qwen3_moe", 2)])
def test_each_loss_is_the_cross_entropy_of_its_logits(kind, depth):
    model = build(vwn_config(kind, 2, 4, num_mtp_modules=depth, mtp_loss_weight=0.25))
    ids = token_ids(2, 8)
    for labels in (ids, with_holes(ids)):
        out = model(ids, labels=labels, output_mtp_logits=True)
        assert len(out.losses) == 1 + depth
        assert len(out.mtp_logits) == depth
        wanted = []
        for ahead, logits in enumerate((out.logits, *out.mtp_logits), start=1):
            wanted.append(torch.stack(cross_entropies(logits, labels, ahead)).mean())
            assert_close(out.losses[ahead - 1].double(), wanted[-1], rtol=1e-5, atol=1e-5)
        assert_close(out.loss.double(), wanted[0] + 0.25 * sum(wanted[1:]), rtol=1e-5, atol=1e-5)
        assert not any(loss.requires_grad for loss in out.losses)


def test_every_parameter_learns_from_the_loss():
    model = build(vwn_config("llama", 2, 4, embedding="factorised", num_mtp_modules=2)).train()
    ids = token_ids(2, 8)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("setting", [{"connection": "residual"}, {"m": 2, "n": 4}])
def test_modules_share_the_embedding_and_the_unembedding(setting):
    model = VirtualWidthForCausalLM(vwn_config("llama", **({"m": 1, "n": 1} | setting), num_mtp_modules=2))
    tables = [name for name, p in model.named_parameters() if 61 in p.shape]
    assert tables == ["model.embed_tokens.table.weight", "lm_head.weight"]


def test_a_chained_module_takes_the_state_of_the_one_before():
    """Replacing the first module's layer must change what the second predicts."""
    model = build(vwn_config("llama", 2, 4, num_mtp_modules=2))
    before = model(token_ids(), output_mtp_logits=True)
    with torch.no_grad():
        model.model.mtp[0].layer.layers[0].mlp.up_proj.weight.mul_(-1)
    after = model(token_ids(), output_mtp_logits=True)
    assert torch.equal(before.logits, after.logits)
    assert not torch.allclose(before.mtp_logits[1], after.mtp_logits[1], atol=1e-3)


def test_the_plain_backbone_gets_the_same_module_at_its_own_width():
    model = build(vwn_config("llama", 1, 1, connection="residual", num_mtp_modules=1))
    predictor = model.model.mtp[0]
    assert predictor.fuse.weight.shape == (24, 48)
    assert type(predictor.layer.layers[0]).__name__ == "LlamaDecoderLayer"
    ids = token_ids(2, 8)
    out = model(ids, labels=ids, output_mtp_logits=True)
    wanted = torch.stack(cross_entropies(out.mtp_logits[0], ids, 2)).mean()
    assert_close(out.losses[1].double(), wanted, rtol=1e-5, atol=1e-5)
    assert_close(out.loss, out.losses[0] + 0.3 * out.losses[1])


def test_a_backbone_of_mixed_layers_gets_a_module_of_the_last_kind():
    """Qwen3-MoE with a dense last layer, and Qwen3 with a sliding one: the module is what the last layer is."""
    dense = build(vwn_config("qwen3_moe", 2, 4, {"mlp_only_layers": [1]}, num_mtp_modules=1))
    assert type(dense.model.mtp[0].layer.layers[0].mlp) is type(dense.model.backbone.layers[1].mlp)
    assert type(dense.model.backbone.layers[0].mlp) is not type(dense.model.backbone.layers[1].mlp)

    types = {"use_sliding_window": True, "sliding_window": 2, "layer_types": ["full_attention", "sliding_attention"]}
    sliding = build(vwn_config("qwen3", 2, 4, types, num_mtp_modules=1))
    ids = token_ids(1, 9)
    other = ids.clone()
    other[0, 0] = (other[0, 0] + 5) % 61
    assert sliding.model.mtp[0].layer.config.layer_types == ["sliding_attention"]
    assert torch.isfinite(sliding(ids, labels=ids).loss)
    # Only the module's own attention is cut short; the state it gets has seen everything through layer 0.
    embedded = [sliding.model.embed_tokens(x) for x in (ids, other)]
    states = [sliding.model.mtp[0].layer(inputs_embeds=e).last_hidden_state for e in embedded]
    assert_close(states[0][:, 4:], states[1][:, 4:])


# Too little to predict


def test_a_head_without_targets_leaves_the_others_alone():
    """One answer token at the end of a long prompt: there is a next token to learn and no next-2 token."""
    model = build(vwn_config("llama", 2, 4, num_mtp_modules=1))
    ids = token_ids(2, 8)
    labels = torch.full_like(ids, -100)
    labels[:, 1] = ids[:, 1]
    out = model(ids, labels=labels)
    out.loss.backward()
    assert_close(out.loss, out.losses[0])
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_nothing_to_learn_in_one_of_several_accumulated_batches():
    """The stock models add zero then."""
    model, ids = build(vwn_config("llama", 2, 4)), token_ids()
    nothing = torch.full_like(ids, -100)
    assert stock()(ids, labels=nothing, num_items_in_batch=16).loss == 0
    loss = model(ids, labels=nothing, num_items_in_batch=16).loss
    assert loss == 0
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


# Accumulation


@pytest.mark.parametrize(
    ("depth", "even", "items_are"),  # uneven with modules only by each head: else the heads' shares are not known
    [(0, False, "an int"), (2, True, "a tensor"), (2, False, "of each head")],
)
def test_accumulated_batches_equal_one_big_batch(depth, even, items_are):
    model = build(vwn_config("llama", 2, 4, num_mtp_modules=depth))
    ids = token_ids(4, 9)
    labels = ids.clone()
    if not even:
        labels[0, 4:] = -100
        labels[3, :7] = -100
        labels[2, 2] = -100
    counts = [(labels[:, 1 + k :] != -100).sum() for k in range(1 + depth)]
    items = {"an int": int(counts[0]), "a tensor": counts[0], "of each head": torch.stack(counts)}[items_are]

    whole = model(ids, labels=labels, num_items_in_batch=items)
    whole.loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert_close(whole.loss, model(ids, labels=labels).loss, rtol=1e-5, atol=1e-6)
    model.zero_grad()
    parts = [model(ids[k : k + 2], labels=labels[k : k + 2], num_items_in_batch=items).loss for k in (0, 2)]
    sum(parts).backward()
    assert_close(sum(parts), whole.loss, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, wanted[name], rtol=1e-3, atol=1e-5, msg=lambda s, k=name: f"{k}: {s}")


def test_num_items_in_batch_means_what_it_means_to_stock_models():
    theirs = stock("mixtral")
    ours = copy_stock_weights(theirs, VirtualWidthForCausalLM(vwn_config("mixtral", 1, 1, connection="residual")))
    ids = token_ids()
    labels = with_holes(ids)
    for items in (40, torch.tensor(40)):
        wanted = theirs(ids, labels=labels, num_items_in_batch=items).loss
        assert_close(ours(ids, labels=labels, num_items_in_batch=items).loss, wanted, rtol=1e-6, atol=1e-6)


# Experts


def test_the_auxiliary_loss_trains_the_routers_of_a_wide_model():
    model = build(vwn_config("qwen3_moe", 2, 4, {"router_aux_loss_coef": 0.5}, num_mtp_modules=1))
    ids = token_ids()
    out, plain = model(ids, labels=ids, output_router_logits=True), model(ids, labels=ids)
    assert plain.aux_loss is None
    assert plain.router_logits is None
    assert_close(out.loss, plain.loss + 0.5 * out.aux_loss)
    out.aux_loss.backward()
    routers = [p for name, p in model.named_parameters() if name.endswith("mlp.gate.weight")]
    assert len(routers) == 3
    assert all(p.grad.abs().max() > 0 for p in routers)


def test_router_logits_by_config_and_switched_off_by_argument():
    model = build(vwn_config("mixtral", 2, 4, {"output_router_logits": True}))
    ids = token_ids()
    assert model(ids, labels=ids).aux_loss is not None
    assert len(model(ids).router_logits) == 2
    off = model(ids, labels=ids, output_router_logits=False)
    assert off.aux_loss is None
    assert off.router_logits is None
    assert model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (2, 12)


def test_the_auxiliary_loss_of_a_chunk_behind_a_cached_prefix():
    """The mask then covers the prefix too, whose tokens are not in the chunk's router logits."""
    model = build(vwn_config("mixtral", 2, 4))
    ids, mask = token_ids(), torch.ones_like(token_ids())
    mask[0, :2] = 0  # no padding in the chunk
    cache = model(ids[:, :4], attention_mask=mask[:, :4], use_cache=True).past_key_values
    out = model(ids[:, 4:], past_key_values=cache, attention_mask=mask, output_router_logits=True)
    assert_close(out.aux_loss, router_loss(out.router_logits, model.config.backbone))
