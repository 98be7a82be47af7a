"""The one rule of what is not decayed, on a module, a whole model and wrapped ones."""

from __future__ import annotations

import pytest
from torch import nn

from tiny import vwn_config
from vwn import GeneralizedHyperConnection, no_weight_decay
from vwn.hf import VirtualWidthForCausalLM

DECAYED = ("dynamic_alpha", "dynamic_beta", "scale_alpha", "scale_beta")


def test_a_connection_alone():
    assert no_weight_decay(GeneralizedHyperConnection(12, 2, 3)) == {"bias_alpha", "bias_beta", "slot_norm"}
    assert no_weight_decay(GeneralizedHyperConnection(4, 1, 1, dynamic=False)) == {"bias_alpha", "bias_beta"}


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_a_whole_model_by_the_rule(kind):
    """Every parameter of every kind is listed here by its last name: a new one has to be decided upon."""
    fields = {"embedding": "factorised", "num_mtp_modules": 2, "ngram_order": 2, "ngram_buckets": 7}
    bias = {"attention_bias": True} if kind in ("llama", "qwen3", "qwen3_moe") else {}
    model = VirtualWidthForCausalLM(vwn_config(kind, 2, 4, backbone=bias, **fields))
    decayed_weights = (
        *("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"),
        *("gate_proj.weight", "up_proj.weight", "down_proj.weight"),
        *("mlp.gate.weight", "experts.gate_up_proj", "experts.down_proj"),
        *("table.weight", "ngram.weight", "expand_weight", "lm_head.weight", "reduce.weight", "fuse.weight"),
    )
    spared_names = ("bias_alpha", "bias_beta", "_norm", "_norm_bias", "_proj.bias")
    spared_norms = ("layernorm.weight", "q_norm.weight", "k_norm.weight", ".norm.weight")
    spared = no_weight_decay(model)
    for name, _ in model.named_parameters():
        wanted = name.endswith(spared_names) or name.endswith(spared_norms)
        assert wanted or name.endswith(decayed_weights) or name.endswith(DECAYED), f"undecided: {name}"
        assert (name in spared) == wanted, name
    assert spared <= {name for name, _ in model.named_parameters()}
    connections = [m for m in model.modules() if isinstance(m, GeneralizedHyperConnection)]
    assert len([name for name in spared if name.endswith("bias_alpha")]) == len(connections) == 2 * 4
    if bias:
        assert any(name.endswith("q_proj.bias") for name in spared)


def test_names_fit_a_module_however_it_is_wrapped():
    inner = nn.ModuleDict({"a": GeneralizedHyperConnection(12, 2, 3), "b": nn.Linear(3, 3)})
    outer = nn.Sequential(nn.Sequential(inner))
    assert no_weight_decay(outer) == {f"0.0.{name}" for name in no_weight_decay(inner)}
    assert no_weight_decay(inner) == {"a.bias_alpha", "a.bias_beta", "a.slot_norm", "b.bias"}


def test_only_parameters_are_named():
    """What is frozen is no parameter, and an optimiser that looks the names up must find them all."""
    model = VirtualWidthForCausalLM(vwn_config("llama", 2, 4, frozen=True, num_mtp_modules=1))
    assert no_weight_decay(model) <= {name for name, _ in model.named_parameters()}
    assert no_weight_decay(GeneralizedHyperConnection(4, 1, 1, frozen=True)) == set()
