"""Tensor, expert and data parallelism of a model, in torchtitan's order: shard, checkpoint, compile, FSDP2.

Connections act on every token alone, so they run on the sequence-sharded state with their small weights replicated;
what they read, ``D`` wide, is gathered in front of attention and FFN, and what those return is scattered again.
"""

from __future__ import annotations

import logging
from typing import Any

import spmd_types as spmd
import torch.distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed.compile import apply_compile
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
from torchtitan.models.deepseek_v3.mtp import apply_fsdp_to_mtp_decoder
from torchtitan.protocols.sharding import ShardingConfig

from vwn.titan.modules import Connections

logger = logging.getLogger("vwn.titan")
_EXPERTS = {"w1_EFD": spmd.S(1), "w2_EDF": spmd.S(2), "w3_EFD": spmd.S(1)}
_WIDE = (
    *("bias_alpha", "bias_beta", "dynamic_alpha", "dynamic_beta", "scale_alpha", "scale_beta"),
    *("slot_norm", "group_norm", "group_norm_bias", "weight", "state_norm", "embedding_norm"),
)


def parallelize(
    model: Any,
    *,
    parallel_dims: Any,
    training: Any,
    parallelism: Any,
    compile_config: Any,
    ac_config: Any,
    dump_folder: str,
) -> Any:
    """Shard a model, or a pipeline stage of it, over the meshes of ``parallel_dims``; torchtitan's own signature."""
    dims = parallel_dims
    if dims.tp_enabled or dims.ep_enabled:
        model.parallelize(dims)
    if ac_config is not None:
        ac_config.build(dump_folder=dump_folder).apply(model)
    if compile_config.enable and "model" in compile_config.components:
        apply_compile(model, compile_config=compile_config, parallel_dims=dims)
    outer = ["dp_replicate"] if dims.dp_replicate_enabled else []
    _shard_connections(model, dims.get_mesh([*outer, "fsdp"]), training, compile_config)
    apply_fsdp_to_mtp_decoder(
        model,
        dims.get_mesh([*outer, "fsdp"]),
        param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
        reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
        pp_enabled=dims.pp_enabled,
        cpu_offload=training.enable_cpu_offload,
        reshard_after_forward_policy=parallelism.fsdp_reshard_after_forward,
        ep_degree=dims.ep,
        edp_mesh=dims.get_optional_mesh([*outer, "efsdp"]) if dims.ep_enabled else None,
        enable_symm_mem=parallelism.enable_fsdp_symm_mem,
    )
    if dist.get_backend() == "gloo":  # which has no scaled sum
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
    return model


def _shard_connections(model: Any, mesh: Any, training: Any, compile_config: Any) -> None:
    """Shard the connections of each block as a unit of their own, which no policy rounds: routing is float32.

    They are gathered once for forward and backward. A block that is compiled as one graph cannot gather a part of
    itself; there they remain in the block's unit.
    """
    if compile_config.enable and "model" in compile_config.components:
        if training.mixed_precision_param != "float32":
            logger.warning(
                "torch.compile: the routing weights are rounded to mixed_precision_param = %s with the rest of a block",
                training.mixed_precision_param,
            )
        return
    policy = MixedPrecisionPolicy(
        reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce], cast_forward_inputs=False
    )
    offload: Any = {"offload_policy": CPUOffloadPolicy()} if training.enable_cpu_offload else {}
    for module in list(model.modules()):
        if isinstance(module, Connections):
            fully_shard(module, mesh=mesh, reshard_after_forward=False, mp_policy=policy, **offload)


def set_sharding(config: Any, sequence: bool, experts: bool) -> None:
    """Give every part its plan; axes that a run does not have are left out by the engine.

    Args:
        config: of the model.
        sequence: whether the state is sharded over the sequence where there is tensor parallelism.
        experts: whether experts are spread over ranks.
    """
    replicated = _replicated(sequence)
    embedding, norm = config.tok_embeddings, config.norm
    config.tok_embeddings, config.norm = embedding.table, norm.norm  # the engine's plan looks for them here
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
    """Keep whole weights on every rank; with a sharded sequence each sees its own tokens and gradients are summed."""
    layout = dense_param_placement(tp=spmd.R if sequence else spmd.I)
    return ShardingConfig(state_shardings=dict.fromkeys(_WIDE, layout))
