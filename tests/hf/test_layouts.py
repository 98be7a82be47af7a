"""Layouts described by hand: taken before what would be found, and refused where they cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tiny import copy_stock_weights, stock, token_ids, vwn_config
from vwn import UserError, VirtualWidthForCausalLM
from vwn.hf import Layout, Sublayer, layout_of, layouts, register_layout

ATTENTION = Sublayer("self_attn", pre_norm="input_layernorm", takes_context=True)
FFN = Sublayer("mlp", pre_norm="post_attention_layernorm")


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(layouts, "_LAYOUTS", {})
    return lambda *sublayers: register_layout(LlamaDecoderLayer, sublayers)


def test_it_goes_before_what_would_be_found(register: Any) -> None:
    theirs, config = stock("llama"), vwn_config("llama", 1, 1, dynamic=False, frozen=True)
    assert layout_of(theirs.model.layers[0]) is None
    register(ATTENTION, FFN)
    ours = copy_stock_weights(theirs, VirtualWidthForCausalLM(config)).eval()
    assert layout_of(ours.model.layers[0]) == layout_of(theirs.model.layers[0]) == Layout((ATTENTION, FFN))
    assert torch.equal(ours(token_ids()).logits, theirs(token_ids()).logits)
    register(ATTENTION)  # wrong: no FFN
    wrong = copy_stock_weights(theirs, VirtualWidthForCausalLM(config)).eval()
    assert not torch.equal(wrong(token_ids()).logits, theirs(token_ids()).logits)


@pytest.mark.parametrize("arguments", [(LlamaDecoderLayer, ()), (LlamaDecoderLayer, (ATTENTION, "mlp"))])
def test_a_layout_is_made_of_sublayers(register: Any, arguments: tuple) -> None:
    with pytest.raises(UserError, match=r"class of a decoder layer and one or more Sublayer"):
        register_layout(*arguments)
    with pytest.raises(UserError, match=r"got 'LlamaDecoderLayer'"):
        register_layout("LlamaDecoderLayer", (ATTENTION, FFN))  # type: ignore[arg-type]
    assert not layouts._LAYOUTS


@pytest.mark.parametrize(
    "wrong", [Sublayer("ffn"), Sublayer("mlp", pre_norm="ffn"), Sublayer("mlp", pre_norm=None, post_norm="ffn")]
)
def test_an_attribute_that_is_not_there(register: Any, wrong: Sublayer) -> None:
    register(ATTENTION, wrong)
    with pytest.raises(UserError, match=r"LlamaDecoderLayer names 'ffn'.*it has self_attn, mlp, input_layernorm"):
        VirtualWidthForCausalLM(vwn_config())


def test_of_a_widened_layer_it_says_what_was_found() -> None:
    layout = layout_of(VirtualWidthForCausalLM(vwn_config()).model.layers[0])
    assert layout.names == ("self_attn", "mlp")
    assert layout.norms == ("input_layernorm", "post_attention_layernorm")
