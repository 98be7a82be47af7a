"""Models whose FLOPs PyTorch's own counter sees all of, and what it counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

BATCH, LENGTH = 2, 64
_SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
_MOE = {"num_experts_per_tok": 2, "num_experts": 8, "moe_intermediate_size": 96, "mlp_only_layers": [0]}
BACKBONES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 48},  # heads together wider than the hidden size, as in Qwen3 itself
    "mixtral": {"num_experts_per_tok": 2, "num_local_experts": 8, "sliding_window": 16},
    "qwen3_moe": {"head_dim": 48, **_MOE},  # the first layer dense
}


def backbone(kind: str = "llama", **changes: Any) -> PreTrainedConfig:
    return CONFIG_MAPPING[kind](**_SIZES | BACKBONES[kind] | changes)


def build_counted(config: PreTrainedConfig, experts: str = "eager") -> nn.Module:
    # Only attention spelt out in matmuls is counted on a CPU: the counter has no entry for its fused attention.
    # Of the ways transformers runs experts it counts the loop over experts ("eager": one mm for each expert that was
    # hit) and "batched_mm" (one bmm over token-expert pairs); for "grouped_mm", the default, it has no entry either.
    inner = getattr(config, "backbone", config)
    inner._attn_implementation = "eager"
    inner._experts_implementation = experts
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def counted_flops_per_token(model: nn.Module) -> float:
    ids = torch.randint(1, 320, (BATCH, LENGTH))
    with_mtp = {"output_mtp_logits": True} if getattr(model.config, "num_mtp_modules", 0) else {}
    with FlopCounterMode(display=False, depth=20) as counter, torch.no_grad():
        model(ids, use_cache=False, **with_mtp)
    return counter.get_total_flops() / (BATCH * LENGTH)
