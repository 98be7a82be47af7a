"""Options of the model: recorded outputs, attention, checkpointing, compilation, resizing, and what is refused."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers
from packaging.version import Version
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, BertConfig, GPT2Config, OpenAIGPTConfig, PreTrainedModel

from tiny import MOE_BACKBONES, VOCAB, backbone_config, build, stock, token_ids, vwn_config
from vwn.hf import VirtualWidthConfig, VirtualWidthForCausalLM

# Recorded outputs


HOW = pytest.mark.parametrize(("kind", "how"), [("llama", "argument"), ("mixtral", "config")])


@HOW
def test_hidden_states_are_as_wide_as_the_backbone_and_end_in_the_last(kind, how):
    model = build(
        vwn_config(kind, 2, 4, num_mtp_modules=1, **({"output_hidden_states": True} if how == "config" else {}))
    )
    ids = token_ids()
    arguments = {"output_hidden_states": True} if how == "argument" else {}
    out = model(ids, labels=ids, **arguments)
    assert [tuple(h.shape) for h in out.hidden_states] == [(2, 9, 24)] * 3
    states = out.over_width_hidden_states
    assert [tuple(h.shape) for h in states] == [(2, 9, 48)] * 3
    assert torch.equal(states[0], model.model.embed_tokens(ids))
    assert torch.equal(states[-1], model.model(ids).over_width_state)
    assert torch.equal(out.hidden_states[1], model.model.reduce_state(states[1]))
    assert torch.equal(out.hidden_states[-1], model.model(ids).last_hidden_state)
    assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    assert model(ids, output_hidden_states=False).hidden_states is None
    assert len(model.model(ids, **arguments).hidden_states) == 3


def test_attentions_with_eager_attention():
    fields = {"attn_implementation": "eager", "output_attentions": True}
    model = build(vwn_config("mixtral", 2, 4, num_mtp_modules=1, **fields))
    ids = token_ids()
    out = model(ids, labels=ids)
    assert [tuple(a.shape) for a in out.attentions] == [(2, 4, 9, 9)] * 2
    assert_close(out.attentions[0].sum(-1), torch.ones(2, 4, 9))
    assert not out.attentions[0].triu(1).any()
    assert model(ids, output_attentions=False).attentions is None


# Settings on the outer config reach the inner models


def test_use_cache_reaches_the_backbone():
    model = build(vwn_config())
    assert model(token_ids()).past_key_values is not None
    assert model(token_ids(), use_cache=False).past_key_values is None
    model.config.use_cache = False
    assert model(token_ids()).past_key_values is None


def attention_of(model: torch.nn.Module) -> set[str]:
    """What every nested model and every attention module is set to."""
    models = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    assert len(models) == 4
    cores = [m for m in model.modules() if type(m).__name__.endswith("Attention")]
    assert len(cores) == 3
    return {m.config._attn_implementation for m in models + cores}


def test_the_attention_implementation_reaches_backbone_and_modules(tmp_path):
    config = vwn_config("llama", 2, 4, num_mtp_modules=1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    assert attention_of(model) == {"eager"}
    model.save_pretrained(tmp_path)
    assert attention_of(AutoModelForCausalLM.from_pretrained(tmp_path)) == {"sdpa"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert attention_of(loaded) == {"eager"}
    wanted = loaded(token_ids(), labels=token_ids()).loss
    loaded.set_attn_implementation("sdpa")
    assert attention_of(loaded) == {"sdpa"}
    assert_close(loaded(token_ids(), labels=token_ids()).loss, wanted, rtol=1e-5, atol=1e-5)


def test_one_backbone_config_may_serve_several_models():
    """`vwn compare` builds every arm from one backbone config: what one does to it must not reach the others."""
    shared = backbone_config()
    one, two = VirtualWidthConfig(backbone=shared, m=1, n=1), VirtualWidthConfig(backbone=shared, m=2, n=4)
    one.use_cache = False
    VirtualWidthForCausalLM(one).resize_token_embeddings(VOCAB + 3)
    assert (two.vocab_size, two.use_cache) == (VOCAB, True)
    assert (shared.vocab_size, shared.use_cache) == (VOCAB, True)


def test_the_backbones_special_tokens_and_sizes_are_the_models():
    config = vwn_config()
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (VOCAB, 24, 2)
    assert config.max_position_embeddings == 64
    assert config.get_text_config() is config.backbone
    assert vwn_config(eos_token_id=7).eos_token_id == 7


def test_the_backbones_initializer_range_is_used_everywhere():
    model = VirtualWidthForCausalLM(vwn_config("llama", 2, 4, {"initializer_range": 0.5}, num_mtp_modules=1))
    for weight in (
        model.lm_head.weight,
        model.model.embed_tokens.table.weight,
        model.model.mtp[0].layer.layers[0].mlp.up_proj.weight,
    ):
        assert abs(float(weight.detach().std()) - 0.5) < 0.05


def test_layers_that_must_not_be_split_are_named_as_they_are():
    """Device maps and FSDP look for these class names among the model's modules."""
    model = VirtualWidthForCausalLM(vwn_config(num_mtp_modules=1))
    layers = {type(layer).__name__ for layer in (*model.model.backbone.layers, *model.model.mtp[0].layer.layers)}
    assert layers <= set(model._no_split_modules)
    assert set(model._no_split_modules) <= {type(module).__name__ for module in model.modules()}


def test_experts_run_by_the_implementation_the_stock_model_takes():
    wanted = stock("mixtral").model.layers[0].mlp.experts.config._experts_implementation
    for choice in (None, "eager", "grouped_mm"):
        options = {} if choice is None else {"experts_implementation": choice}
        model = AutoModelForCausalLM.from_config(vwn_config("mixtral", num_mtp_modules=1), **options)
        experts = [m for m in model.modules() if type(m).__name__.endswith("Experts")]
        assert len(experts) == 3
        assert {m.config._experts_implementation for m in experts} == {choice or wanted}


# Compilation


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "m", "n"), [("llama", 2, 4), ("mixtral", 2, 3)])
def test_compiles_as_one_graph(kind, m, n):
    if kind in MOE_BACKBONES and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("the experts of this transformers do not compile as one graph on a CPU")
    torch._dynamo.reset()
    model = build(vwn_config(kind, m, n, {"num_hidden_layers": 1}, num_mtp_modules=1))
    ids = token_ids()
    wanted = model(ids, labels=ids, use_cache=False)
    actual = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, labels=ids, use_cache=False)
    assert_close(actual.loss, wanted.loss, rtol=1e-5, atol=1e-5)
    assert_close(actual.logits, wanted.logits, rtol=1e-4, atol=1e-4)
    left = torch.autograd.grad(actual.loss, list(model.parameters()))
    right = torch.autograd.grad(wanted.loss, list(model.parameters()))
    for (name, _), a, b in zip(model.named_parameters(), left, right, strict=True):
        assert_close(a, b, rtol=1e-3, atol=1e-5, msg=lambda s, k=name: f"{k}: {s}")


# Refusals


POST_NORM = {
    "Block": OpenAIGPTConfig(vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=4),
    "Bert": BertConfig(vocab_size=VOCAB, hidden_size=24, num_hidden_layers=1, num_attention_heads=4),
}


@pytest.mark.parametrize(("name", "connection"), [("Block", "ghc"), ("Bert", "residual")])
def test_backbones_that_are_no_sums_are_refused(name, connection):
    """Plain ones too, so that a baseline is what it is compared with."""
    config = VirtualWidthConfig(backbone=POST_NORM[name], connection=connection, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=name) as error:
        VirtualWidthForCausalLM(config)
    message = str(error.value)
    assert "register_layout" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"m": 5, "n": 8}, r"m = 5 .*24.* 4"),
        ({"m": 4, "n": 3}, r"n = 3 .*m = 4"),
        ({"m": 0, "n": 3}, r"m must be a positive integer, got 0"),
        ({"connection": "hyper"}, r"connection .*ghc.*residual.*'hyper'"),
        ({"connection": "residual"}, r"m = n = 1.*m = 2, n = 3"),
        ({"carry_constraint": "orthogonal"}, r"carry_constraint .*none.*'orthogonal'"),
        ({"embedding": "wide"}, r"embedding .*direct.*factorised.*replicated.*'wide'"),
        ({"reduce": "mean"}, r"reduce .*linear.*sum.*'mean'"),
        ({"reduce": ""}, r"reduce .*linear.*sum.*''"),
        ({"reduce_norm": "group_norm"}, r"integer r.*3/2"),
        ({"reduce_init": "zeros"}, r"reduce_init .*first_slots.*normal.*'zeros'"),
        ({"num_mtp_modules": -1}, r"num_mtp_modules .*-1"),
        ({"mtp_loss_weight": float("nan")}, r"mtp_loss_weight .*nan"),
        ({"mtp_loss_weight": -0.5}, r"mtp_loss_weight .*-0.5"),
        ({"tie_word_embeddings": True}, r"tie_word_embeddings .*direct.*factorised"),
        ({"backbone": {"hidden_size": 24}}, r"model_type"),
        ({"backbone": {"model_type": "gpt5"}}, r"model_type.*'gpt5'"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_sentence(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        VirtualWidthConfig(**{"backbone": backbone_config(), "m": 2, "n": 3} | fields)
    assert "\n" not in str(error.value)


def test_a_tied_backbone_with_a_wide_table_is_untied_and_says_so(caplog):
    logging.Logger.warning_once.cache_clear()
    with caplog.at_level("WARNING", "vwn.hf"):
        config = VirtualWidthConfig(backbone=GPT2Config(), m=2, n=4)
        VirtualWidthConfig(backbone=GPT2Config(), m=2, n=4)
    assert config.tie_word_embeddings is False
    assert [r.getMessage().startswith("the backbone of type gpt2 ties") for r in caplog.records] == [True]
    assert VirtualWidthConfig.from_dict(config.to_dict()).tie_word_embeddings is False
    tied = {"tie_word_embeddings": True}
    assert vwn_config("llama", 2, 2, tied).tie_word_embeddings is True
    assert vwn_config("llama", 2, 4, tied, embedding="factorised").tie_word_embeddings is True
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        vwn_config("llama", 2, 4, tied, tie_word_embeddings=True)
    assert not vwn_config("llama", 2, 4, tied, tie_word_embeddings=False).tie_word_embeddings
