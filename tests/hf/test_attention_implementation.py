"""Which attention runs: what the backbone's own causal LM would take, said by both configs, or refused as there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel

import zoo
from tiny import token_ids
from vwn import UserError, VirtualWidthConfig, VirtualWidthForCausalLM, widen

FLAGS = ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn", "_supports_attention_backend")
FLAGS += ("_can_compile_fullgraph", "_compatible_flash_implementations", "_supports_context_parallel")


def built(model_class: Any, config: Any, **options: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return model_class._from_config(copy.deepcopy(config), **options)


def outcome(model_class: Any, config: Any, **options: Any) -> str:
    """The implementation that a model of the config takes, or the kind of error."""
    try:
        model = built(model_class, config, **options)
    except ValueError:
        return "refused"
    except ImportError:
        return "not installed"
    inner = model.config.get_text_config()
    assert model.config._attn_implementation == inner._attn_implementation
    assert model.config._experts_implementation == inner._experts_implementation
    return f"{inner._attn_implementation}, {inner._experts_implementation}"


@pytest.mark.slow
@pytest.mark.parametrize("model_type", zoo.CAUSAL_TYPES)
def test_it_is_the_plain_models(model_type):
    plain_config = zoo.tiny_config(model_type)
    fields = {"m": 1, "n": 2, "embedding": "replicated", "tie_word_embeddings": False}
    try:
        config = VirtualWidthConfig(backbone=plain_config, **fields)
        wide = built(VirtualWidthForCausalLM, config)
    except ValueError:
        pytest.skip("refused")
    plain_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(plain_config)]
    plain = built(plain_class, plain_config)
    for flag in FLAGS:
        assert getattr(wide, flag, None) == getattr(plain, flag, None), flag
    for request in (None, "eager", "sdpa", "flex_attention", "flash_attention_2", "no_such_attention"):
        options = {} if request is None else {"attn_implementation": request}
        wanted = outcome(plain_class, plain_config, **options)
        assert outcome(VirtualWidthForCausalLM, config, **options) == wanted, request
    for request in ("eager", "sdpa"):
        taken = []
        for model in (plain, wide):
            try:
                model.set_attn_implementation(request)
            except ValueError:
                taken.append("refused")
            else:
                taken.append(model.config._attn_implementation)
                assert model.config.get_text_config()._attn_implementation == taken[-1]
        assert taken[0] == taken[1], request


@pytest.mark.parametrize("model_type", ["bloom", "gptj", "gemma2", "mamba"])
def test_a_refusal_names_the_type(model_type):
    with pytest.raises(
        UserError, match=f'`attn_implementation="sdpa"` is not supported by a backbone of type {model_type};'
    ):
        built(
            VirtualWidthForCausalLM,
            VirtualWidthConfig(backbone=zoo.tiny_config(model_type), m=2, n=4, tie_word_embeddings=False),
            attn_implementation="sdpa",
        )


def test_the_choice_of_the_backbones_config_stays():
    """A config that was told to run eager, or a model that does, is not set to sdpa on the way."""
    backbone = zoo.tiny_config("llama")
    backbone._attn_implementation = "eager"
    config = VirtualWidthConfig(backbone=backbone, m=2, n=4, tie_word_embeddings=False)
    assert config._attn_implementation == config.backbone._attn_implementation == "eager"
    model = VirtualWidthForCausalLM(config)
    assert model.model.backbone.config._attn_implementation == model.config._attn_implementation == "eager"


def test_a_plain_model_that_runs_eager_is_widened_so(tmp_path):
    plain = zoo.tiny_causal_lm("llama")
    plain.set_attn_implementation("eager")
    wide = widen(plain, m=2, n=4)
    assert wide.config._attn_implementation == wide.model.backbone.config._attn_implementation == "eager"
    assert torch.equal(wide(token_ids()).logits, plain(token_ids()).logits)
    wide.save_pretrained(tmp_path)
    assert "attn_implementation" not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
