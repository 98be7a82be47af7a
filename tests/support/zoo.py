"""A tiny causal language model of every model type of the installed transformers, or the reason why there is none."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 99
HIDDEN = 32
LAYERS = 4

_ENCODER = "an encoder: attends to both sides unless its configuration says is_decoder=True"
_ASSISTANT = "a drafting head: reads the keys and values of another model, and takes no token ids"
_AUDIO = "takes several codebooks of audio codes per position and has one head for each; no token ids"
NOT_DECODERS: dict[str, str] = {
    **dict.fromkeys(
        ("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie"), _ENCODER
    ),
    **dict.fromkeys(("megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer"), _ENCODER),
    **dict.fromkeys(("xlm-roberta", "xlm-roberta-xl", "xmod"), _ENCODER),
    "reformer": "an encoder: its class raises unless its configuration says is_decoder=True; two reversible streams",
    "xlm": "an encoder: attends to both sides unless its configuration says causal=True",
    "xlnet": "a permutation language model: attends to both sides unless given a permutation mask",
    "blt": "reads bytes in patches of varying length with three transformers in a row; no single stack of layers",
    "cpmant": "a prefix language model: attends to both sides within its input",
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), _ASSISTANT),
    "gemma3n": "multi-modal: its vision tower needs timm, which is not installed; its text model is gemma3n_text",
    **dict.fromkeys(("musicgen", "musicgen_melody"), _AUDIO),
}
CAUSAL_TYPES: tuple[str, ...] = tuple(
    t for t in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if t not in NOT_DECODERS and t != "virtual_width"
)

# What an attribute of this name is set to, in every configuration that has a value for it.
_NAMES: tuple[tuple[Any, str], ...] = (
    (VOCAB, "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size"),
    (
        HIDDEN,
        "hidden_size n_embd d_model emb_dim embedding_dim word_embed_proj_dim lru_width input_size"
        " hidden_size_global out_hidden_size",
    ),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers num_blocks"),
    (
        2,
        "encoder_layers num_encoder_layers decoder_layers num_decoder_layers num_layers_per_stack num_key_value_heads"
        " num_kv_heads kv_n_heads swa_num_key_value_heads num_experts_per_tok num_experts_per_token moe_topk moe_top_k"
        " moe_k linear_num_heads linear_num_key_heads mamba_n_groups mamba_ngroups n_groups"
        " first_k_dense_replace num_dense_layers index_topk_blocks floor_scale log_scaling_n_floor",
    ),
    (
        48,
        "intermediate_size mlp_dim ffn_dim dim_ff dff ffn_hidden_size intermediate_size_mlp d_inner"
        " dense_intermediate_size encoder_ffn_dim decoder_ffn_dim",
    ),
    (
        16,
        "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size"
        " shared_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size block_multiple_of"
        " index_n_heads",
    ),
    (
        4,
        "num_attention_heads n_head n_heads num_heads attention_heads swa_num_attention_heads qk_rope_head_dim"
        " encoder_attention_heads decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads"
        " rotary_dim num_experts num_local_experts n_routed_experts moe_num_experts linear_num_value_heads"
        " index_topk sliding_window sliding_window_size attention_chunk_size window_size attention_window_size"
        " local_attention rel_extent mamba_chunk_size chunk_size block_size index_block_size mamba_dt_rank"
        " time_step_rank keep_window_size",
    ),
    (
        8,
        "head_dim swa_head_dim dim_head kv_channels d_head qk_nope_head_dim v_head_dim index_head_dim q_lora_rank"
        " kv_lora_rank o_lora_rank d_rel gated_norm_rank adapter_rank laurel_rank hidden_size_per_layer_input"
        " router_hidden_size linear_head_dim linear_key_head_dim linear_value_head_dim mamba_d_state state_size"
        " ssm_state_size mamba_n_heads mamba_num_heads mamba_d_head mamba_head_dim num_mel_bins hc_lowrank"
        " ffn_round_up_to_multiple_of nemo_conv_channels ext_pw_out_channel output_channels",
    ),
    (
        1,
        "n_shared_experts num_shared_experts moe_num_shared_experts zero_expert_num n_group topk_group"
        " num_expert_group",
    ),
    (
        64,
        "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions"
        " max_source_positions model_max_length encoder_hash_byte_group_vocab",
    ),
    # factors that are one, or large, by default would hide that they were forgotten
    (3.0, "embedding_multiplier logits_scaling embedding_scale logits_mup_width_multiplier"),
    (0.6, "residual_multiplier"),
    (0.4, "attention_multiplier key_multiplier lm_head_multiplier"),
    (1.3, "attention_in_multiplier ssm_in_multiplier full_attn_alpha_factor linear_attn_alpha_factor mlp_alpha_factor"),
    (0.7, "attention_out_multiplier ssm_out_multiplier full_attn_beta_factor linear_attn_beta_factor mlp_beta_factor"),
)
_SIZES: dict[str, Any] = {name: value for value, names in _NAMES for name in names.split()}
_SIZES |= {"mlp_multipliers": [1.2, 0.8], "ssm_multipliers": [1.1, 0.9, 1.2, 0.8, 1.3], "mlp_only_layers": [0, 1]}
_SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_DROPOUT = ("dropout", "pdrop", "layerdrop", "jitter")
_UNUSED = ("audio_encoder_config", "depth_decoder_config")  # of sibling classes of the causal language model
_LAYER_KINDS = ("layer_types", "layers_block_type", "block_types")


def _repeat(*kinds: str) -> list[str]:
    """`kinds`, one after the other, for all layers."""
    return [kinds[i % len(kinds)] for i in range(max(LAYERS, len(kinds)))]


def _runs(*kinds: str) -> list[str]:
    """`kinds`, each for as many layers in a row: beside `_repeat`, every pair of kinds occurs."""
    return [kinds[i * len(kinds) // LAYERS] for i in range(LAYERS)]


_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_FULL_SLIDING = {"layer_types": _repeat("full_attention", "sliding_attention"), "sliding_window": 4}
_WINDOWED = {**_FULL_SLIDING, "use_sliding_window": True, "max_window_layers": 1}
_LINEAR_FULL = _repeat("linear_attention", "full_attention")
_DENSE_SPARSE = _runs("dense", "sparse")
_QSA = ("indexer_n_heads", "indexer_kv_heads", "indexer_head_dim", "indexer_budget", "indexer_compress_ratio")
_LLAMA4 = {"no_rope_layers": [1, 0, 1, 0], "moe_layers": [2, 3], "num_experts_per_tok": 1}
_QWEN4 = {
    **dict(zip(_QSA, (2, 1, 8, 4, 2), strict=True)),
    "ple_layer_ids": [1],
    "ple_embed_dim": HIDDEN,
    "ngram_vocab_size_base": 50,
    "make_ngram_vocab_size_divisible_by": 4,
    "split_ngram_parts": 1,
    "heads_per_ngram": 2,
}
_GEMMA4 = {"global_head_dim": 16, "num_kv_shared_layers": 2, "use_double_wide_mlp": True}
_DOTS3 = {
    "mlp_layer_types": _DENSE_SPARSE,
    "head_dim": 16,
    **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 8, "swa_kv_lora_rank": 8},
    **{"swa_head_dim": 12, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8},
}
# What the rule by names gets wrong or does not reach: layer kinds that the default configuration lacks, and sizes
# that depend on one another.
_EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere2_moe": {"mlp_layer_types": _DENSE_SPARSE, "prefix_dense_intermediate_size": 48},
    "cohere_compass_text": {
        **_FULL_SLIDING,
        "rope_parameters": {
            "full_attention": {**_ROPE, "mrope_section": [2, 1, 1]},
            "sliding_attention": {**_ROPE, "mrope_section": [2, 1, 1]},
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {**_FULL_SLIDING, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": _DOTS3,
    "dots3_note_text": _DOTS3,
    "exaone4": {"sliding_window_pattern": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.9, 0.9, 0.0, 0.0]},
    "gemma4_text": {
        **_GEMMA4,
        **{"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    },
    "gemma4_unified_text": _GEMMA4,
    "glm_moe_dsa": {"indexer_types": _repeat("full", "shared")},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": _LINEAR_FULL, "position_embedding_type": "rope"},
    "hrm_text": {"H_cycles": 2, "L_cycles": 2, "num_hidden_layers": 12},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hy_v4": {"indexer_types": _repeat("full", "shared")},
    "inkling_text": {"mlp_layer_types": _DENSE_SPARSE},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 3, "expert_layer_offset": 0},
    "laguna": {**_FULL_SLIDING, "num_attention_heads_per_layer": [4, 8, 4, 8]},
    "lfm2": {"layer_types": _repeat("conv", "full_attention")},
    "lfm2_moe": {"layer_types": _repeat("conv", "full_attention")},
    "llama4": _LLAMA4,
    "llama4_text": _LLAMA4,
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mellum": {**_FULL_SLIDING, "mlp_layer_types": _DENSE_SPARSE},
    "minimax_m3_vl_text": {
        "index_n_heads": 2,
        "layer_types": _repeat("full_attention", "minimax_m3_sparse"),
        "mlp_layer_types": _DENSE_SPARSE,
    },
    "ministral": {"head_dim": 8, "layer_types": _repeat("sliding_attention", "full_attention")},
    "moshi": {"sliding_window": 64},  # within a shorter window its cached pass differs from its full one
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "qwen2": _WINDOWED,
    "qwen2_moe": _WINDOWED,
    "qwen3": _WINDOWED,
    "qwen4_exp": _QWEN4,
    "qwen4_exp_text": _QWEN4,
    "rwkv": {"rescale_every": 2},
    "smollm3": {**_FULL_SLIDING, "use_sliding_window": True, "no_rope_layers": [1, 1, 0, 0]},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4},
    "zamba2": {"num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1, "layer_types": _repeat("hybrid", "hybrid_sliding"), "sliding_window": 4},
}


def _overrides(config: PreTrainedConfig) -> dict[str, Any]:
    """What makes the default configuration `config` tiny, by the names of its attributes."""
    tiny: dict[str, Any] = {}
    values = {**vars(config), **config.to_dict()}
    for name, value in values.items():
        if isinstance(vars(config).get(name), PreTrainedConfig) and name not in _UNUSED:
            tiny[name] = _tiny(vars(config)[name])
        elif name in _SIZES and not name.endswith("_token_id"):
            if value is not None and not isinstance(value, bool | dict):
                tiny[name] = _SIZES[name]
        elif name in _SIZES:
            tiny[name] = _SIZES[name]
        elif name in _LAYER_KINDS and value:
            tiny[name] = _repeat(*dict.fromkeys(value))
        elif name == "mlp_layer_types" and value:
            tiny[name] = _runs(*dict.fromkeys(value))
        elif isinstance(value, float) and any(part in name for part in _DROPOUT):
            tiny[name] = 0.0
    if "kv_lora_rank" in tiny:  # latent attention has keys and values for every head
        tiny["num_key_value_heads"] = tiny["num_attention_heads"]
        if values.get("head_dim") == values["qk_rope_head_dim"]:
            tiny["head_dim"] = tiny["qk_rope_head_dim"]
    return tiny


def _tiny(default: PreTrainedConfig) -> dict[str, Any]:
    return {**_overrides(default), **_EXCEPTIONS.get(default.model_type, {})}


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """The configuration, with `changes`, of `tiny_causal_lm`: the text part where a type is made of several."""
    default = CONFIG_MAPPING[model_type]()
    if not isinstance(default, MODEL_FOR_CAUSAL_LM_MAPPING[type(default)].config_class):
        default = default.get_text_config()
    return type(default)(**{**_tiny(default), **_EXCEPTIONS.get(model_type, {}), **changes})


def tiny_causal_lm(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model in float32 and evaluation mode in which no parameter or saved buffer is at its initial value."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = model_class._from_config(tiny_config(model_type, **changes), dtype=torch.float32)
    return _perturb(model, seed).eval()


@torch.no_grad()
def _perturb(model: PreTrainedModel, seed: int, scale: float = 0.1) -> PreTrainedModel:
    """Noise on every parameter and on the buffers that stand for learned values: they begin as a constant."""
    generator = torch.Generator().manual_seed(seed)
    saved = model.state_dict(keep_vars=True)
    buffers = [
        b for n, b in model.named_buffers() if n in saved and b.is_floating_point() and (b == b.flatten()[0]).all()
    ]
    for tensor in [*model.parameters(), *buffers]:
        tensor.add_(scale * torch.randn(tensor.shape, generator=generator))
    return model
