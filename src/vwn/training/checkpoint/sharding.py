"""Sharded models in a Trainer: precision, and weights and optimiser states between sharded, copied and single models.

Checkpoints of a sharded run are PyTorch's distributed checkpoints: every process writes its part, and any number of
processes reads them. The others hold ``model.safetensors`` and ``optimizer.pt``. Either kind continues as the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer

from vwn.common.errors import UserError
from vwn.common.processes import rank
from vwn.nn.initialisation import current_name
from vwn.training.distributed import on_all_ranks

MODEL, OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"
"""Folders in a checkpoint of a sharded run, by accelerate's names."""

_FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)


class ShardingTrainer(Trainer):
    """A Trainer that resumes on another number of processes, sharded or not, and writes whole weights at the end."""

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

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder, model = Path(resume_from_checkpoint), self.model if model is None else model
        in_parts = (folder / MODEL).is_dir()
        if in_parts == bool(self.is_fsdp_enabled):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif in_parts:
            load_weights(model, folder)
        else:
            _load_whole_weights(model, folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        in_parts = (folder / OPTIMIZER).is_dir()
        if in_parts == bool(self.is_fsdp_enabled):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if in_parts:
            state = {"optimizer": get_optimizer_state_dict(self.model, self.optimizer)}
            dcp.load(state, storage_reader=dcp.FileSystemReader(folder / OPTIMIZER))
            set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
        else:
            stored = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True) if rank() == 0 else {}
            named = _by_name(stored, self.model, self.optimizer) if stored else {}
            set_optimizer_state_dict(self.model, self.optimizer, named, options=_FROM_FIRST)
        self.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Load a sharded run's weights into a model that is whole in each process. Raises `UserError` where they differ."""
    state = {"model": get_model_state_dict(model)}
    try:
        dcp.load(state, storage_reader=dcp.FileSystemReader(checkpoint / MODEL))
    except (dcp.api.CheckpointException, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the weights in {checkpoint} cannot be read into this model: {reason}") from error
    set_model_state_dict(model, state["model"])


def _load_whole_weights(model: nn.Module, checkpoint: Path) -> None:
    def read() -> dict[str, Any]:
        weights: dict[str, Any] = {}
        for path in sorted(checkpoint.glob("*.safetensors")):
            weights |= {current_name(name): weight for name, weight in load_file(path).items()}
        tied = set(getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ())
        if missing := sorted(name for name, _ in model.named_parameters() if name not in weights.keys() | tied):
            raise UserError(f"{checkpoint} lacks {len(missing)} weights of the model, such as {missing[0]}")
        return weights

    weights = on_all_ranks(lambda: read() if rank() == 0 else {})
    set_model_state_dict(model, weights, options=_FROM_FIRST)


def _by_name(stored: dict[str, Any], model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Key an optimiser's state by parameters' names instead of numbers; the groups are the same in any run."""
    names = {id(p): name for name, p in model.named_parameters()}
    name_of: dict[int, str] = {}
    groups = []
    for old, new in zip(stored["param_groups"], optimizer.param_groups, strict=True):
        name_of |= {i: names[id(p)] for i, p in zip(old["params"], new["params"], strict=True)}
        groups.append({**old, "params": [name_of[i] for i in old["params"]]})
    return {"state": {name_of[i]: s for i, s in stored["state"].items()}, "param_groups": groups}
