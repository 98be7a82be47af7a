"""Layouts described by hand: what they cannot be is refused when they are registered or a model is built."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tiny import backbone_config, token_ids
from vwn import UserError, VirtualWidthConfig, VirtualWidthForCausalLM
from vwn.hf import Sublayer, layout_of, layouts, register_layout

ATTENTION = Sublayer("self_attn", pre_norm="input_layernorm", takes_context=True)
FFN = Sublayer("mlp", pre_norm="post_attention_layernorm")


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(layouts, "_LAYOUTS", {})
    monkeypatch.setattr(layouts, "_MEANT", {})
    return lambda *sublayers: register_layout("LlamaDecoderLayer", sublayers)


def build() -> VirtualWidthForCausalLM:
    return VirtualWidthForCausalLM(VirtualWidthConfig(backbone=backbone_config(), m=2, n=4))


@pytest.mark.parametrize("sublayers", [(), (ATTENTION, "mlp")])
def test_a_layout_is_made_of_sublayers(register: Any, sublayers: tuple) -> None:
    with pytest.raises(UserError, match=r"LlamaDecoderLayer should be one or more Sublayer"):
        register(*sublayers)
    assert not layouts._LAYOUTS


@pytest.mark.parametrize(
    "wrong", [Sublayer("ffn"), Sublayer("mlp", pre_norm="ffn"), Sublayer("mlp", pre_norm=None, post_norm="ffn")]
)
def test_an_attribute_that_is_not_there(register: Any, wrong: Sublayer) -> None:
    register(ATTENTION, wrong)
    with pytest.raises(UserError, match=r"LlamaDecoderLayer names 'ffn'.*it has self_attn, mlp, input_layernorm"):
        build()


def test_a_core_takes_hidden_states(register: Any) -> None:
    register(ATTENTION, Sublayer("mlp", pre_norm="post_attention_layernorm", takes_context=True))
    with pytest.raises(UserError, match="'mlp' of LlamaDecoderLayer takes its input as 'x'"):
        build()


def test_layers_are_called_by_keyword(register: Any) -> None:
    register(ATTENTION, FFN)
    model = build()
    with pytest.raises(UserError, match=r"LlamaDecoderLayer has a registered layout .* by keyword"):
        model.model.layers[0](torch.zeros(1, 3, 48), None)
    assert model(token_ids()).logits.isfinite().all()


def test_a_core_returns_a_tensor_like_its_input(register: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    register(ATTENTION, FFN)
    model = build()
    for result, got in (({"z": 1}, "dict"), (torch.zeros(2, 9, 5), r"\[2, 9, 5\]")):
        monkeypatch.setattr(model.model.layers[1].mlp, "forward", lambda x, r=result: r)
        with pytest.raises(UserError, match=rf"'mlp' of LlamaDecoderLayer should return .*got {got}"):
            model(token_ids())


def test_a_class_a_full_name_and_a_bare_name(register: Any) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    other = type("LlamaDecoderLayer", (LlamaDecoderLayer,), {})  # of another library
    layer, foreign = (kind(backbone_config(), 0) for kind in (LlamaDecoderLayer, other))
    assert layout_of(layer) is None
    register_layout(other, [ATTENTION])
    register(ATTENTION, FFN)
    assert layout_of(foreign).names == ["self_attn"]
    assert layout_of(layer).names == ["self_attn", "mlp"]
    del layouts._LAYOUTS[f"{__name__}.LlamaDecoderLayer"]
    with pytest.raises(UserError, match=r"registered for LlamaDecoderLayer, which is transformers.* and .*bare name"):
        layout_of(foreign)
    register_layout("transformers.models.llama.modeling_llama.LlamaDecoderLayer", [FFN])
    assert layout_of(layer).names == ["mlp"]


def test_of_a_widened_layer_it_says_what_was_found() -> None:
    layout = layout_of(build().model.layers[0])
    assert layout.names == ("self_attn", "mlp")
    assert layout.norms == ("input_layernorm", "post_attention_layernorm")
