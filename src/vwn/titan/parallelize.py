"""Tensor, expert and data parallelism of a model, in torchtitan's order: shard, checkpoint, compile, FSDP2."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed.compile import apply_compile
from torchtitan.models.deepseek_v3.mtp import apply_fsdp_to_mtp_decoder


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
