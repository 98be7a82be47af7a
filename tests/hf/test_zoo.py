"""The zoo is worth testing on: it covers all types, and its models compute something in every part they have."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from zoo import CAUSAL_TYPES, NOT_DECODERS, VOCAB, tiny_causal_lm, tiny_config

KINDS = ("layer_types", "layers_block_type", "mlp_layer_types", "block_types")
# Hybrids and mixtures: modules each of which must be in some layer and missing in another.
MIXED = {
    "bailing_hybrid": ("DeltaAttention", "BailingHybridAttention", "MoE"),
    "bamba": ("Mixer", "BambaAttention"),
    "deepseek_v3": ("MoE",),
    "glm4_moe": ("MoE",),
    "granitemoehybrid": ("MambaLayer", "HybridAttention"),
    "jamba": ("MambaMixer", "JambaAttention", "SparseMoeBlock"),
    "kimi_linear": ("DeltaAttention", "KimiLinearAttention", "MoE"),
    "lfm2": ("ShortConv", "Lfm2Attention"),
    "lfm2_moe": ("ShortConv", "Lfm2MoeAttention", "SparseMoeBlock"),
    "lfm3": ("ShortConv", "Lfm3Attention"),
    "llama4_text": ("TextMoe",),
    "minimax": ("LightningAttention", "MiniMaxAttention"),
    "nemotron_h": ("Mamba2Mixer", "NemotronHAttention", "MoE"),
    "olmo_hybrid": ("GatedDeltaNet", "OlmoHybridAttention"),
    "qwen2_moe": ("SparseMoeBlock",),
    "qwen3_5_text": ("GatedDeltaNet", "Qwen3_5Attention"),
    "qwen3_moe": ("SparseMoeBlock",),
    "qwen3_next": ("GatedDeltaNet", "Qwen3NextAttention", "SparseMoeBlock"),
    "recurrent_gemma": ("RecurrentBlock", "RecurrentGemmaAttention"),
    "zamba": ("ZambaAttention",),
    "zamba2": ("Zamba2Attention",),
}


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits


def test_every_type_is_built_or_has_a_reason() -> None:
    assert set(NOT_DECODERS) <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert sorted([*CAUSAL_TYPES, *NOT_DECODERS]) == sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - {"virtual_width"})


@pytest.mark.slow
@pytest.mark.parametrize("model_type", CAUSAL_TYPES)
def test_a_tiny_causal_model(model_type: str) -> None:
    model = tiny_causal_lm(model_type)
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) < 400_000
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.numel() == 1 or parameter.std() > 1e-3, f"{name} is constant"
    ids = torch.randint(3, VOCAB, (2, 7))
    logits = _logits(model, ids)
    assert logits.shape == (2, 7, VOCAB)
    assert torch.isfinite(logits).all()
    # every token says something about those after it, and nothing about those before
    for position in (0, 4):
        other = ids.clone()
        other[:, position] = (other[:, position] + 1 - 3) % (VOCAB - 3) + 3
        change = (_logits(model, other) - logits).abs().amax((0, 2))
        assert (change[:position] < 1e-5).all()
        assert change[position] > 1e-3
        assert change[position + 1 :].max() > 1e-4


@pytest.mark.parametrize("model_type", CAUSAL_TYPES)
def test_all_layer_kinds_of_the_default_configuration_are_kept(model_type: str) -> None:
    tiny = tiny_config(model_type)
    default = CONFIG_MAPPING[model_type]()
    if not isinstance(default, type(tiny)):
        default = default.get_text_config()
    default, tiny = default.get_text_config(), tiny.get_text_config()
    for name in KINDS:
        assert set(getattr(default, name, None) or ()) <= set(getattr(tiny, name, None) or ())


@pytest.mark.parametrize("model_type", MIXED)
def test_layers_of_each_kind_are_there(model_type: str) -> None:
    model = tiny_causal_lm(model_type)
    layers = [{type(module).__name__ for module in layer.modules()} for layer in model.get_submodule("model.layers")]
    for kind in MIXED[model_type]:
        having = [any(name.endswith(kind) for name in names) for names in layers]
        assert any(having), kind
        assert not all(having), kind


def test_the_same_seed_gives_the_same_model() -> None:
    torch.manual_seed(1)
    one, same, other = (tiny_causal_lm("qwen3_next", seed=seed) for seed in (3, 3, 4))
    ids = torch.randint(3, VOCAB, (2, 7))
    assert torch.equal(_logits(one, ids), _logits(same, ids))
    assert not torch.allclose(_logits(one, ids), _logits(other, ids))
    state = torch.random.get_rng_state()
    tiny_causal_lm("llama")
    assert torch.equal(torch.random.get_rng_state(), state)


def test_changes_reach_the_model() -> None:
    assert tiny_causal_lm("falcon", new_decoder_architecture=True).transformer.h[0].ln_attn is not None
