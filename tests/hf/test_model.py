"""The model against stock transformers models: equal where it must be, causal, indifferent to padding and caching."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import reference
from tiny import BACKBONES, VOCAB, backbone_config, build, copy_stock_weights, stock, token_ids, vwn_config
from vwn import GeneralizedHyperConnection
from vwn.hf import VirtualWidthConfig, VirtualWidthForCausalLM

KINDS = pytest.mark.parametrize("kind", BACKBONES)
PLAIN = {"residual": {"connection": "residual"}, "frozen": {"dynamic": False, "frozen": True}}
WIDTHS = [(1, 1), (1, 3), (3, 3), (2, 3), (2, 4), (4, 10), (8, 64)]


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


@KINDS
@pytest.mark.parametrize("setting", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_width_one_is_the_backbone_to_the_bit(kind, setting, dtype):
    theirs, ours = plain_and_stock(kind, setting)
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    ids = token_ids(2, 9)
    right_mask = torch.ones_like(ids)
    right_mask[0, 6:] = 0
    for inputs in ({"input_ids": ids}, left_padded(ids), {"input_ids": ids, "attention_mask": right_mask}):
        wanted, actual = theirs(**inputs, labels=ids), ours(**inputs, labels=ids)
        assert torch.equal(actual.logits, wanted.logits)
        assert torch.equal(actual.loss, wanted.loss)


@KINDS
@pytest.mark.parametrize("setting", PLAIN)
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


def test_attention_variants_of_the_backbone_survive():
    """Sliding and full attention in turn, biases, an own head size: the layers get their own masks."""
    qwen = {"use_sliding_window": True, "sliding_window": 3, "layer_types": ["full_attention", "sliding_attention"]}
    theirs, ours = plain_and_stock("qwen3", "frozen", **qwen, attention_bias=True, head_dim=8)
    ids = token_ids(2, 12)
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert not torch.allclose(stock("qwen3", attention_bias=True, head_dim=8)(ids).logits, theirs(ids).logits)


# The function-preserving start


@KINDS
@pytest.mark.parametrize(("m", "n"), WIDTHS)
@pytest.mark.parametrize("dynamic", [True, False])
def test_replicated_start_computes_the_backbones_function(kind, m, n, dynamic):
    theirs = stock(kind)
    norm = "rms_norm" if n % m == 0 and n > m else "none"
    config = vwn_config(
        kind, m, n, dynamic=dynamic, embedding="replicated", reduce_norm=norm, reduce_init="first_slots"
    )
    ours = copy_stock_weights(theirs, VirtualWidthForCausalLM(config)).eval()
    inputs = left_padded(token_ids(2, 9))
    seen = inputs["attention_mask"].bool()
    assert_close(ours(**inputs).logits[seen], theirs(**inputs).logits[seen], rtol=1e-3, atol=1e-4)


def test_tied_replicated_start_computes_the_backbones_function():
    theirs = stock("llama", tie_word_embeddings=True)
    config = vwn_config(
        "llama", 2, 4, {"tie_word_embeddings": True}, embedding="replicated", reduce_norm="rms_norm",
        reduce_init="first_slots",
    )  # fmt: skip
    ours = copy_stock_weights(theirs, VirtualWidthForCausalLM(config)).eval()
    assert ours.lm_head.weight is ours.model.embed_tokens.table.weight
    assert_close(ours(token_ids()).logits, theirs(token_ids()).logits, rtol=1e-3, atol=1e-4)


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


@KINDS
@pytest.mark.parametrize(("m", "n"), [(2, 3), (4, 8)])
def test_no_logit_sees_a_later_token(kind, m, n):
    model = build(vwn_config(kind, m, n, num_mtp_modules=2))
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


@KINDS
@pytest.mark.parametrize(("m", "n"), [(1, 1), (2, 3), (4, 8)])
def test_decoding_with_a_cache_equals_decoding_without(kind, m, n):
    model = build(vwn_config(kind, m, n))
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


def test_a_chunk_may_follow_a_cached_prefix():
    model = build(vwn_config())
    ids = token_ids(2, 9)
    first = model(ids[:, :4], use_cache=True)
    second = model(ids[:, 4:], past_key_values=first.past_key_values)
    assert_close(second.logits, model(ids).logits[:, 4:], rtol=1e-4, atol=1e-4)


# Padding


@KINDS
@pytest.mark.parametrize("side", ["left", "right"])
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


def test_four_dimensional_masks_reach_attention():
    model = build(vwn_config(num_mtp_modules=1))
    ids = token_ids(1, 6)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    assert_close(model(ids, attention_mask=causal).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


# Inputs


@pytest.mark.parametrize("embedding", ["direct", "factorised", "replicated"])
def test_over_width_embeddings_may_be_given(embedding):
    model = build(vwn_config("llama", 2, 4, embedding=embedding, num_mtp_modules=1))
    ids = token_ids()
    embeds = model.model.embed_tokens(ids)
    wanted, actual = model(ids, labels=ids), model(inputs_embeds=embeds, labels=ids)
    assert torch.equal(actual.logits, wanted.logits)
    assert torch.equal(actual.loss, wanted.loss)


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


@pytest.mark.parametrize("return_dict", [True, False])
def test_return_dict(return_dict):
    model = build(vwn_config())
    ids = token_ids()
    wanted = model(ids, labels=ids)
    out = model(ids, labels=ids, return_dict=return_dict)
    assert isinstance(out, tuple) is not return_dict
    assert torch.equal(out[0], wanted.loss)
    assert torch.equal(out[1], wanted.logits)


# Sizes


@KINDS
@pytest.mark.parametrize(("m", "n"), [(2, 3), (4, 8)])
def test_the_backbone_keeps_its_width(kind, m, n):
    """Everything of the stock model but the embedding is there in its own shape, under its own name."""
    model = VirtualWidthForCausalLM(vwn_config(kind, m, n))
    ours = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name, parameter in stock(kind).named_parameters():
        if "embed_tokens" not in name:
            name = name.replace("model.layers.", "model.backbone.layers.")
            assert ours.pop(name) == tuple(parameter.shape), name
    left = {name.split(".connections.")[0] if "connections" in name else name for name in ours}
    norms = {"model.reduce.group_norm", "model.reduce.group_norm_bias"} if n % m == 0 else set()
    layers = {"model.backbone.layers.0", "model.backbone.layers.1"}
    assert left == {"model.embed_tokens.table.weight", "model.reduce.weight"} | norms | layers


def test_two_connections_for_each_layer_and_none_shared():
    model = VirtualWidthForCausalLM(vwn_config("llama", 2, 3, num_mtp_modules=1))
    layers = [*model.model.backbone.layers, *model.model.mtp[0].layer.layers]
    connections = [c for layer in layers for c in layer.connections]
    assert len(connections) == len({id(c) for c in connections}) == 6
    assert len({p.data_ptr() for c in connections for p in c.parameters()}) == 6 * 7


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_settings_reach_every_connection(dynamic, frozen):
    model = VirtualWidthForCausalLM(vwn_config("llama", 2, 3, dynamic=dynamic, frozen=frozen, num_mtp_modules=1))
    connections = [m for m in model.modules() if isinstance(m, GeneralizedHyperConnection)]
    assert len(connections) == 6
    for connection in connections:
        assert (connection.geometry, connection.dynamic) == (model.config.geometry, dynamic)
        assert len(connection.state_dict()) == (7 if dynamic else 2)
        assert not any(value.requires_grad is frozen for value in connection.state_dict(keep_vars=True).values())


def test_any_backbone_config_object_or_dict_gives_the_same_model():
    config = backbone_config("qwen3")
    torch.manual_seed(0)
    one = VirtualWidthForCausalLM(VirtualWidthConfig(backbone=config, m=2, n=3))
    torch.manual_seed(0)
    two = VirtualWidthForCausalLM(VirtualWidthConfig(backbone=config.to_dict(), m=2, n=3))
    assert torch.equal(one(token_ids()).logits, two(token_ids()).logits)


@pytest.mark.parametrize("dynamic", [True, False])
def test_the_configs_choice_of_routing_reaches_every_connection(dynamic):
    model = VirtualWidthForCausalLM(vwn_config("llama", 2, 4, dynamic=dynamic, num_mtp_modules=1))
    connections = [m for m in model.modules() if isinstance(m, GeneralizedHyperConnection)]
    assert len(connections) == 2 * 3
    assert all(connection.dynamic is dynamic for connection in connections)
    assert all(hasattr(connection, "dynamic_alpha") is dynamic for connection in connections)
