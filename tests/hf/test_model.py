"""The model against stock transformers models: equal where it must be, causal, indifferent to padding and caching."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import reference
from tiny import NEW, VOCAB, build, copy_stock_weights, generate, greedy_by_hand, stock, token_ids, vwn_config
from vwn import GeneralizedHyperConnection
from vwn.hf import VirtualWidthForCausalLM

PLAIN = {"residual": {"connection": "residual"}, "frozen": {"dynamic": False, "frozen": True}}


def plain_and_stock(kind: str, setting: str, **backbone) -> tuple[torch.nn.Module, VirtualWidthForCausalLM]:
    theirs = stock(kind, **backbone)
    config = vwn_config(kind, 1, 1, backbone=backbone, **PLAIN[setting])
    return theirs, copy_stock_weights(theirs, VirtualWidthForCausalLM(config)).eval()


def left_padded(ids: Tensor, pad: int = 3) -> dict[str, Tensor]:
    """The second row gets ``pad`` tokens of padding in front, the first none but real tokens."""
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    return {"input_ids": ids * mask, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}


# With m = n = 1 the backbone, to the bit


@pytest.mark.parametrize(
    ("kind", "setting"), [("llama", "residual"), ("qwen3", "frozen"), ("mixtral", "frozen"), ("qwen3_moe", "residual")]
)
def test_width_one_is_the_backbone_to_the_bit(kind, setting):
    theirs, ours = plain_and_stock(kind, setting)
    ids = token_ids(2, 9)
    right_mask = torch.ones_like(ids)
    right_mask[0, 6:] = 0
    masked = left_padded(ids), {"input_ids": ids, "attention_mask": right_mask}
    for dtype, inputs in product((torch.float32, torch.bfloat16), ({"input_ids": ids}, *masked)):
        wanted, actual = (model.to(dtype)(**inputs, labels=ids) for model in (theirs, ours))
        assert torch.equal(actual.logits, wanted.logits)
        assert torch.equal(actual.loss, wanted.loss)


@pytest.mark.parametrize(("kind", "setting"), [("llama", "frozen"), ("mixtral", "residual")])
def test_width_one_trains_as_the_backbone(kind, setting):
    theirs, ours = plain_and_stock(kind, setting)
    ids = token_ids(2, 9)
    theirs.train()(ids, labels=ids).loss.backward()
    ours.train()(ids, labels=ids).loss.backward()
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    checked = 0
    for name, parameter in ours.named_parameters():
        if "connections" in name:
            assert parameter.grad is None
            continue
        name = name.replace(".backbone.", ".").replace(".table.", ".")
        assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-6, msg=lambda s, k=name: f"{k}: {s}")
        checked += 1
    assert checked == len(wanted)


# The whole model against the reference


@pytest.mark.parametrize(("m", "n", "embedding"), [(2, 3, "direct"), (3, 6, "factorised"), (1, 2, "replicated")])
def test_a_layer_reads_runs_and_writes_around_each_sublayer(m, n, embedding):
    """One perturbed layer by hand: the stock attention and MLP between reads and writes of the reference."""
    model = build(vwn_config("llama", m, n, {"num_hidden_layers": 1}, embedding=embedding))
    ids = token_ids(1, 4)
    out = model.model(ids)
    layer, backbone = model.model.backbone.layers[0], model.model.backbone
    rotary = backbone.rotary_emb(torch.zeros(1, 4, 24), torch.arange(4)[None])
    causal = torch.full((4, 4), float("-inf")).triu(1)[None, None]

    def attention(x: Tensor) -> Tensor:
        return layer.self_attn(layer.input_layernorm(x), attention_mask=causal, position_embeddings=rotary)[0]

    state = model.model.embed_tokens(ids)
    for connection, sublayer in (
        (layer.connections[0], attention),
        (layer.connections[1], lambda x: layer.mlp(layer.post_attention_layernorm(x))),
    ):
        parameters = dict(connection.named_parameters())
        x = reference.hyper_connection(state, parameters, m, n, lambda x: x, connection.eps)["x"]
        z = iter(sublayer(x.float())[0].double())
        state = reference.hyper_connection(state, parameters, m, n, lambda x, z=z: next(z), connection.eps)["state"]
    assert_close(out.over_width_state.double(), state, rtol=1e-3, atol=1e-3)
    assert_close(out.last_hidden_state, model.model.norm(model.model.reduce(out.over_width_state)))


# Causality


def test_no_logit_sees_a_later_token():
    model = build(vwn_config("mixtral", 2, 4, num_mtp_modules=2))
    ids = token_ids(1, 8)
    before = model(ids, output_mtp_logits=True)
    for t in (3, 7):
        other = ids.clone()
        other[0, t] = (other[0, t] + 11) % VOCAB
        after = model(other, output_mtp_logits=True)
        assert_close(after.logits[:, :t], before.logits[:, :t], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(after.logits[:, t], before.logits[:, t], atol=1e-2)
        for k, (a, b) in enumerate(zip(after.mtp_logits, before.mtp_logits, strict=True), start=1):
            assert_close(a[:, : t - k], b[:, : t - k], rtol=1e-5, atol=1e-5)
            assert not torch.allclose(a[:, t - k], b[:, t - k], atol=1e-3), f"module {k} ignores token t + {k}"


# Cache


def test_decoding_with_a_cache_equals_decoding_without():
    model = build(vwn_config("qwen3_moe", 2, 3))
    ids = token_ids(2, 9, seed=2)  # where no token is so near to other experts that rounding decides
    wanted = model(ids, use_cache=False).logits
    out = model(ids[:, :4], use_cache=True)
    steps = [out.logits]
    for t in range(4, 9):
        out = model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
        steps.append(out.logits)
    assert_close(torch.cat(steps, dim=1), wanted, rtol=1e-4, atol=1e-4)
    assert out.past_key_values.get_seq_length() == 9
    assert len(out.past_key_values.layers) == model.config.num_hidden_layers
    with pytest.raises(ValueError, match="names of one argument"):
        model(ids, past_key_values=out.past_key_values, cache=out.past_key_values)


# Padding


@pytest.mark.parametrize(("kind", "side"), [("llama", "left"), ("mixtral", "right")])
def test_padding_changes_nothing(kind, side):
    model = build(vwn_config(kind, 2, 4, num_mtp_modules=1))
    ids = token_ids(1, 6)
    padding = torch.zeros(1, 3, dtype=torch.long)
    order = (padding, ids) if side == "left" else (ids, padding)
    mask = torch.cat([torch.zeros_like(p) if p is padding else torch.ones_like(p) for p in order], dim=1)
    wanted = model(ids, output_mtp_logits=True)
    actual = model(torch.cat(order, dim=1), attention_mask=mask, output_mtp_logits=True)
    real = slice(3, 9) if side == "left" else slice(0, 6)
    assert_close(actual.logits[:, real], wanted.logits, rtol=1e-4, atol=1e-4)
    assert_close(actual.mtp_logits[0][:, real][:, :-1], wanted.mtp_logits[0][:, :-1], rtol=1e-4, atol=1e-4)


# Inputs


def test_inputs_that_do_not_fit_are_refused():
    model = build(vwn_config("llama", 2, 4))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(token_ids(), inputs_embeds=torch.zeros(2, 9, 48))
    with pytest.raises(ValueError, match=r"over-width.*48.*24"):
        model(inputs_embeds=torch.zeros(2, 9, 24))


def test_logits_to_keep():
    model = build(vwn_config())
    ids = token_ids()
    wanted = model(ids).logits
    assert_close(model(ids, logits_to_keep=2).logits, wanted[:, -2:])
    assert_close(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, wanted[:, [1, 4]])


# Sizes


@pytest.mark.parametrize(("dynamic", "frozen"), [(True, True), (False, False)])
def test_settings_reach_every_connection(dynamic, frozen):
    model = VirtualWidthForCausalLM(vwn_config("llama", 2, 3, dynamic=dynamic, frozen=frozen, num_mtp_modules=1))
    connections = [m for m in model.modules() if isinstance(m, GeneralizedHyperConnection)]
    assert len(connections) == 6
    for connection in connections:
        assert (connection.geometry, connection.dynamic) == (model.config.geometry, dynamic)
        assert len(connection.state_dict()) == (7 if dynamic else 2)
        assert not any(value.requires_grad is frozen for value in connection.state_dict(keep_vars=True).values())


# Generation


def test_greedy_equals_a_loop_without_cache():
    model = build(vwn_config("mixtral", 2, 3), seed=2)
    ids = token_ids(2, 5)
    wanted = greedy_by_hand(model, ids)
    assert torch.equal(generate(model, ids), wanted)
    assert len(set(wanted[0, 5:].tolist())) > 1


def test_generation_stops_at_the_backbones_end_token():
    model = build(vwn_config("llama", 2, 4))
    ids = token_ids(1, 5)
    end = int(generate(model, ids)[0, 5 + 2])
    config = vwn_config("llama", 2, 4, {"eos_token_id": end})
    again = build(config)
    assert again.generation_config.eos_token_id == end
    out = again.generate(ids, max_new_tokens=NEW, do_sample=False)
    assert out[0, -1] == end
    assert end not in out[0, 5:-1].tolist()
    assert out.shape[1] <= 5 + 3
