"""Sharded models in a Trainer: their precision, and whole weights at the end.

Checkpoints of a sharded run are PyTorch's distributed checkpoints: every process writes its part, and any number of
processes reads them. The others hold ``model.safetensors`` and ``optimizer.pt``.
"""

from __future__ import annotations

from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer

MODEL = "pytorch_model_fsdp_0"
"""Folder of the weights in a checkpoint of a sharded run, by accelerate's name."""


class ShardingTrainer(Trainer):
    """A Trainer whose sharded weights stay float32, and are written whole at the end."""

    def create_accelerator_and_postprocess(self) -> None:
        """Weights are gathered as they are, float32; autocast computes in bfloat16 what it does in one process.

        FSDP's own mixed precision would round the routing weights too, which are computed in float32 (section 4).
        """
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None:
            plugin.mixed_precision_policy = MixedPrecisionPolicy()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save whole weights; a checkpoint of a sharded model has them in parts already."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
        elif not _internal_call:
            whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
            self._save(output_dir, get_model_state_dict(self.model, options=whole))


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Load a sharded run's weights into a model that is whole in each process."""
    state = {"model": get_model_state_dict(model)}
    dcp.load(state, storage_reader=dcp.FileSystemReader(checkpoint / MODEL))
    set_model_state_dict(model, state["model"])
