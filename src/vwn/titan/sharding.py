"""Which part of what each rank of a tensor-parallel group holds.

Connections act on every token alone, so they run on the sequence-sharded state with their small weights replicated;
what they read, ``D`` wide, is gathered in front of attention and FFN, and what those return is scattered again.
"""

from __future__ import annotations

from typing import Any

import spmd_types as spmd
from torchtitan.models.common.decoder_sharding import (
    dense_activation_placement,
    dense_param_placement,
    dense_sequence_parallel_placement,
    norm_config,
    pre_lm_head_norm_config,
    set_decoder_sharding_config,
    set_dense_ffn_sharding,
    set_gqa_attention_sharding,
    set_gqa_inner_attention_local_map,
)
from torchtitan.models.common.moe_sharding import set_moe_sharding_config
from torchtitan.protocols.sharding import ShardingConfig

_EXPERTS = {"w1_EFD": spmd.S(1), "w2_EDF": spmd.S(2), "w3_EFD": spmd.S(1)}
_WIDE = (
    *("bias_alpha", "bias_beta", "dynamic_alpha", "dynamic_beta", "scale_alpha", "scale_beta"),
    *("slot_norm", "group_norm", "group_norm_bias", "weight", "state_norm", "embedding_norm"),
)


def set_sharding(config: Any, sequence: bool, experts: bool) -> None:
    """Give every part its plan; axes that a run does not have are left out by the engine.

    Args:
        config: of the model.
        sequence: whether the state is sharded over the sequence where there is tensor parallelism.
        experts: whether experts are spread over ranks.
    """
    replicated = _replicated(sequence)
    embedding, norm = config.tok_embeddings, config.norm
    config.tok_embeddings, config.norm = embedding.table, norm.norm  # where the engine's plan of the root looks
    set_decoder_sharding_config(config, enable_sp=sequence)
    config.tok_embeddings, config.norm = embedding, norm
    if embedding.expand is not None:
        embedding.expand.sharding_config = replicated
    norm.reduce.sharding_config = replicated
    for block in config.layers:
        _set_block(block, sequence, experts)
    for predictor in config.mtp_layers:
        _set_block(predictor.layer, sequence, experts)
        predictor.sharding_config = predictor.fuse.sharding_config = predictor.reduce.sharding_config = replicated
        predictor.norm.sharding_config = pre_lm_head_norm_config(enable_sp=sequence)


def _set_block(block: Any, sequence: bool, experts: bool) -> None:
    for connection in block.connections:
        connection.sharding_config = _replicated(sequence)
    block.attention_norm.sharding_config = block.ffn_norm.sharding_config = norm_config(enable_sp=sequence)
    set_gqa_attention_sharding(block.attention, enable_sp=sequence)
    set_gqa_inner_attention_local_map(block.attention.inner_attention)
    if block.moe is not None:
        set_moe_sharding_config(block.moe, enable_ep=experts, enable_sp=sequence, expert_param_layout=_EXPERTS)
        return
    layout = dense_sequence_parallel_placement() if sequence else dense_activation_placement(tp=spmd.I)
    set_dense_ffn_sharding(block.feed_forward, attn_x_layout=layout, enable_sp=sequence)


def _replicated(sequence: bool) -> ShardingConfig:
    """Whole weights on every rank; with a sharded sequence each sees its own tokens and gradients are summed."""
    layout = dense_param_placement(tp=spmd.R if sequence else spmd.I)
    return ShardingConfig(state_shardings=dict.fromkeys(_WIDE, layout))
