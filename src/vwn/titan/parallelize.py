"""Tensor, expert and data parallelism of a model, in torchtitan's order: shard, checkpoint, compile, FSDP2."""

from __future__ import annotations

import logging
from typing import Any

import torch.distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed.compile import apply_compile
from torchtitan.models.deepseek_v3.mtp import apply_fsdp_to_mtp_decoder

from vwn.titan.modules import Connections

logger = logging.getLogger("vwn.titan")


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
    """A model, or a pipeline stage of it, sharded over the meshes of ``parallel_dims``; torchtitan's own signature."""
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
