"""A run of several processes: how the model is spread over them, and how they start and fail together."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from vwn.common.errors import UserError
from vwn.common.processes import all_gather_object, rank, world_size
from vwn.hf import VirtualWidthForCausalLM
from vwn.training.config import TrainConfig

T = TypeVar("T")


def join(patience: timedelta) -> None:
    """Meet the other processes of the launcher, if there are any, and wait for them as long as ``patience``."""
    if int(os.environ.get("WORLD_SIZE") or 1) > 1 and not dist.is_initialized():
        on_cpu = not torch.cuda.is_available()
        PartialState(cpu=on_cpu, timeout=patience, **({"backend": "gloo"} if on_cpu else {}))


def leave() -> None:
    """Part from the others after a run that went well."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def on_all_ranks(act: Callable[[], T]) -> T:
    """Call ``act`` on every rank and return its result; a failure on one is raised on all."""
    failure: ValueError | OSError | None = None
    try:
        result = act()
    except (ValueError, OSError) as error:
        failure = error
    said = [text for text in all_gather_object(failure and str(failure)) if text is not None]
    if failure is not None:
        raise failure
    if said:
        raise UserError(said[0])
    return result


def rank0_first(act: Callable[[], T]) -> T:
    """Call ``act`` on rank 0 and then, when what it has prepared is there, on the others."""
    made = on_all_ranks(lambda: act() if rank() == 0 else None)
    return on_all_ranks(lambda: act() if made is None else made)


def parallel_mode(config: TrainConfig) -> str:
    """Return what ``--parallel`` and the launcher ask for: ``none``, ``ddp`` or ``fsdp2``.

    Raises:
        UserError: they contradict each other, or an option does not go with it.
    """
    world, asked, o, s = world_size(), config.parallel, config.optim, config.speed
    by_launcher = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if by_launcher and (asked == "ddp" or os.environ.get("FSDP_VERSION", "2") != "2"):
        raise UserError(
            "the accelerate configuration asks for FSDP; set fsdp_version: 2 in it, and drop --parallel ddp"
        )
    if world == 1:
        if asked != "auto" or by_launcher:
            raise UserError(
                f"--parallel {asked} and FSDP need several processes and there is one; start with torchrun or "
                "accelerate launch, or drop --parallel"
            )
        return "none"
    parallel = ("fsdp2" if by_launcher else "ddp") if asked == "auto" else asked
    if o.batch_size % (world * o.gradient_accumulation):
        raise UserError(
            f"--batch-size {o.batch_size} is shared by {world} processes in {o.gradient_accumulation} passes each; "
            f"make it a multiple of {world * o.gradient_accumulation}"
        )
    needs_whole_weights = {
        "--keep-states-every": s.keep_states_every > 1,
        "--compile": s.compile,
        "--optimizer muon": o.optimizer == "muon",
        f"--loss-backend {s.loss_backend}": s.loss_backend not in ("auto", "torch"),
    }
    for option, is_given in needs_whole_weights.items():
        if is_given and parallel == "fsdp2":
            raise UserError(f"{option} does not go with --parallel fsdp2, which shards the weights; drop it")
    return parallel


def parallel_arguments(parallel: str, model: nn.Module) -> dict[str, Any]:
    """Return what the Trainer's arguments say of ``parallel``, for ``model``."""
    arguments: dict[str, Any] = {}
    if parallel != "none" and not torch.cuda.is_available():
        arguments["ddp_backend"] = "gloo"
    if parallel == "fsdp2":
        arguments["fsdp"] = True
        arguments["fsdp_config"] = {
            "version": 2,
            "state_dict_type": "SHARDED_STATE_DICT",
            "transformer_layer_cls_to_wrap": layer_classes(model),
            "reshard_after_forward": os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true"),
            "cpu_offload": os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true",
        }
    return arguments


def layer_classes(model: Any) -> list[str] | None:
    """Return the class names of its layers, those of MTP modules too: each is sharded and gathered as one."""
    if not isinstance(model, VirtualWidthForCausalLM):
        return None  # transformers knows them
    layers: list[Any] = [*model.model.layers]
    predictors: Any = model.model.mtp
    for predictor in predictors:
        layers += predictor.layer.anatomy.layers(predictor.layer)
    return sorted({type(layer).__name__ for layer in layers})


class CheckParallel(TrainerCallback):
    """Refuse to train unless the model is spread over the processes as ``parallel`` says."""

    def __init__(self, parallel: str) -> None:
        self.parallel = parallel

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        is_sharded = {isinstance(p, DTensor) for p in model.parameters()}
        if is_sharded != {self.parallel == "fsdp2"}:
            raise UserError(
                f"accelerate has {'sharded' if True in is_sharded else 'left whole'} weights on the device "
                f"{args.device.type}, which --parallel {self.parallel} does not; ask for another --parallel, or change "
                "the accelerate configuration"
            )
