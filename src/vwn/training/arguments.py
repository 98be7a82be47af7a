"""Make the Trainer's arguments, the model's backends and the learning rate from a run's options."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from vwn.common.errors import UserError
from vwn.common.extras import EXTRAS, require_packages
from vwn.common.processes import world_size
from vwn.hf import VirtualWidthForCausalLM
from vwn.hf.loss import CAN_CHUNK, choose_loss
from vwn.nn.connection import Connection
from vwn.nn.groups import GROUPS, check_factors
from vwn.ops import choose
from vwn.training.config import SpeedOptions, TrainConfig
from vwn.training.presets import PRESETS


def training_arguments(
    config: TrainConfig, learning_rate: float, resumed: bool, parallel: dict[str, Any]
) -> TrainingArguments:
    """Return the Trainer's settings for a run; ``parallel`` holds those of its processes."""
    o = config.optim
    log, evaluate, save = config.intervals
    if torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ:
        raise UserError("several GPUs are visible; set CUDA_VISIBLE_DEVICES to one, or use torchrun")
    cuda_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return TrainingArguments(
        output_dir=str(config.out),
        max_steps=o.steps,
        per_device_train_batch_size=o.batch_size // (o.gradient_accumulation * world_size()),
        gradient_accumulation_steps=o.gradient_accumulation,
        per_device_eval_batch_size=max(1, o.batch_size // world_size()),
        learning_rate=learning_rate,
        lr_scheduler_type="cosine_with_min_lr" if o.schedule == "cosine" else "constant_with_warmup",
        lr_scheduler_kwargs={"min_lr_rate": o.final_learning_rate} if o.schedule == "cosine" else {},
        warmup_steps=config.warmup,
        weight_decay=o.weight_decay,
        adam_beta1=o.beta1,
        adam_beta2=o.beta2,
        max_grad_norm=o.max_grad_norm,
        bf16=o.precision == "bf16" or (o.precision == "auto" and cuda_bf16),
        use_cpu=not torch.cuda.is_available(),
        seed=config.seed,
        data_seed=config.seed,
        logging_steps=log,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=evaluate,
        eval_on_start=not resumed,
        save_steps=save,
        torch_compile=config.speed.compile,
        remove_unused_columns=False,
        dataloader_drop_last=True,
        dataloader_num_workers=config.corpus.workers,
        ignore_data_skip=bool(config.corpus.stream),  # a stream is opened where it stands
        label_names=["labels"],
        disable_tqdm=True,
        report_to=[name for name in config.report_to if name not in ("none", "tensorboard")],
        run_name=config.out.name,
        ddp_timeout=round(60 * config.reliability.distributed_timeout),
        **parallel,
    )


def check_trackers(names: tuple[str, ...]) -> None:
    """Refuse trackers that transformers does not know, or whose package is missing."""
    if "none" in names and len(names) > 1:
        raise UserError(f"--report-to none stands alone, got {' '.join(names)}")
    for name in set(names) - {"none"}:
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(f"--report-to knows no {name!r}; give {', '.join(INTEGRATION_TO_CALLBACK)}, or none")
        if name in EXTRAS:
            require_packages(f"--report-to {name}", name)
        if name not in get_available_reporting_integrations():
            raise UserError(f"--report-to {name} needs a package that is not installed: pip install {name}")


def check_device(speed: SpeedOptions, slots: int | None) -> None:
    """Refuse backends that cannot run where the training will, with so many slots."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choose(speed.connection_backend, device, torch.float32, slots or 1)
    choose_loss(speed.loss_backend.replace("auto", "torch"), device)  # "auto" can run, and says later what it took


def apply_speed(model: Any, speed: SpeedOptions, precision: str = "auto", whole: bool = True) -> None:
    """Set up a model for the options of a run; ``whole``: one process will have all of its weights."""
    if isinstance(model, VirtualWidthForCausalLM):
        model.loss_backend = speed.loss_backend if whole else "torch"
        c, in_float32 = model.config, precision != "bf16" and not torch.cuda.is_available()
        pays = c.num_mtp_modules and c.vocab_size >= 8 * c.hidden_size and in_float32 and not speed.compile
        if model.loss_backend == "auto" and pays and CAN_CHUNK and model.can_fuse_loss:
            model.loss_backend = "chunked"
        if model.loss_backend == "chunked":
            model.fused_loss()
        model.keep_states_every = speed.keep_states_every
        for connection in (m for m in model.modules() if isinstance(m, Connection)):
            connection.set_backend(speed.connection_backend)
    elif speed.loss_backend not in ("auto", "torch"):
        raise UserError(f"--loss-backend {speed.loss_backend} needs a virtual width or --mtp; use auto or torch")
    if speed.gradient_checkpointing:  # transformers renamed the switch
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()


def learning_rate_of(config: TrainConfig) -> float:
    """Return the rate given, else the preset's, for plain and wide models separately."""
    if config.optim.learning_rate is not None:
        return config.optim.learning_rate
    if config.backbone not in PRESETS:
        raise UserError(f"--learning-rate is needed: none is known for the backbone {config.backbone!r}")
    preset = PRESETS[config.backbone]
    return preset.learning_rate if config.m is None else preset.wide_learning_rate


def parse_factors(items: tuple[str, ...]) -> dict[str, float]:
    """Parse ``("routing=0.3", ...)`` to ``{"routing": 0.3, ...}``; refuse unknown groups, and one named twice."""
    factors: dict[str, float] = {}
    for item in items:
        group, _, text = item.partition("=")
        try:
            factor = check_factors({group: float(text)})[group]
        except ValueError:
            raise UserError(
                f"--rate-factors takes GROUP=FACTOR, such as routing=0.3, with a group out of {', '.join(GROUPS)} "
                f"and a factor above 0; got {item!r}"
            ) from None
        if group in factors:
            raise UserError(f"--rate-factors names {group} twice")
        factors[group] = factor
    return factors
