"""One training run: its data, its model, training, and what is left behind."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset
from transformers import AutoModelForCausalLM, TrainerState, TrainingArguments, default_data_collator
from transformers.utils import logging as hf_logging

from vwn.common.errors import UserError
from vwn.common.processes import all_present, first_ones, first_process, rank, world_size
from vwn.common.provenance import PeakMemory
from vwn.cost.model import model_cost
from vwn.data import Corpus, PackedWindows, prepare
from vwn.data.stream import prepare_stream
from vwn.hf import VirtualWidthForCausalLM
from vwn.hf.checkpoint.card import TrainingFacts
from vwn.hf.loss import choose_loss
from vwn.nn.connection import Connection
from vwn.ops import choose
from vwn.training import directory
from vwn.training.checkpoint.manifest import agreed_checkpoint
from vwn.training.checkpoint.sharding import MODEL, load_weights
from vwn.training.config import SpeedOptions, TrainConfig
from vwn.training.distributed import (
    SHARDED,
    AsAskedFor,
    first_alone,
    join,
    parallel_arguments,
    resolve,
    together,
)
from vwn.training.groups import default_factors, parse_factors
from vwn.training.model import build_model, load_backbone, model_config, resize_backbone
from vwn.training.presets import EMBEDDING_STD, PRESETS
from vwn.training.trainer import Diverged, ProgressBar, VirtualWidthTrainer
from vwn.training.watch.preemption import Stopped, StopSignals

logger = logging.getLogger(__name__)

Label = str | Callable[[int], str]


@dataclass(frozen=True)
class RunResult:
    """What a finished run measured; also its `result.json`.

    ``connection`` is ``"residual"`` for a plain backbone. ``curve`` holds ``{tokens, loss, loss_2, seconds}`` of each
    validation, losses in nats per token, ``loss_2`` None without MTP; ``peak_memory_bytes`` is the GPU's where there is
    one, else the process's.
    """

    name: str
    m: int
    n: int
    r: float
    connection: str
    embedding: str
    mtp: int
    seed: int
    learning_rate: float
    params: int
    flops_per_token: float | None
    tokens_per_second: float
    peak_memory_bytes: int
    curve: list[dict[str, float | None]]


def train(config: TrainConfig, corpus: Corpus | None = None, label: Label | None = None) -> RunResult:
    """Train one model and leave in ``config.out`` its weights, tokenizer, checkpoints, logs, and ``result.json``.

    Args:
        config: the run; with ``resume``, exactly the one that was started.
        corpus: its data, where that is prepared already.
        label: what the progress bar says, or what gives it from the steps taken in this process.

    Raises:
        UserError: input that cannot be used, or a run directory that exists (without ``resume``) or belongs to another
            configuration or text (with it).
        Diverged: the loss or the weights became non-finite; its ``curve`` ends there.
        Stopped: SIGTERM or Ctrl-C; a checkpoint is written.
        CannotWrite: the disk is full; what was saved is untouched.
        LostProcess: another process of the run is gone.
    """
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    config.check()
    check_device(config.speed)
    join(timedelta(minutes=config.reliability.distributed_timeout))
    parallel = resolve(config)
    stored, result = first_ones(together(lambda: _open(config, corpus) if rank() == 0 else (None, None)))
    if result is not None:
        return result
    learning_rate = learning_rate_of(config)
    corpus = corpus or first_alone(lambda: load_corpus(config))
    if isinstance(corpus.train, PackedWindows) and len(corpus.train) < config.optim.batch_size:
        raise UserError(
            f"the text gives {len(corpus.train)} windows of {config.corpus.window} tokens, fewer than one batch of "
            f"{config.optim.batch_size}; lower --batch-size or --window, or give more text"
        )
    if stored is not None:
        directory.check_same_text(config.out, stored, corpus.fingerprint)
    backbone = load_backbone(
        config.backbone, len(corpus.tokenizer), config.corpus.window, corpus.tokenizer.eos_token_id
    )
    backbone = resize_backbone(backbone, config.hidden_size, config.intermediate_size)
    embedding_std = EMBEDDING_STD if config.backbone in PRESETS else None
    model = build_model(model_config(backbone, config.m, config.n, config.width), config.seed, embedding_std)
    with ExitStack() as stack:
        together(lambda: _begin(stack, config, corpus.fingerprint) if rank() == 0 else None)
        return _train(config, corpus, model, learning_rate, label or config.name, parallel)


def _open(config: TrainConfig, corpus: Corpus | None) -> tuple[dict[str, Any] | None, RunResult | None]:
    """The record of the run in ``config.out`` and, if it has ended, its result; None for what is not there."""
    stored = directory.open_directory(config.out, "run.json", bool(config.resume))
    if stored is None and config.resume is True:
        raise UserError(f"there is no run in {config.out} to continue; leave --resume away, or use --resume auto")
    if stored is None:
        return None, None
    directory.check_same(config.out, stored.get("config", {}), directory.settings(config))
    if corpus is not None:
        directory.check_same_text(config.out, stored, corpus.fingerprint)
    return stored, stored_result(config.out)


def _begin(stack: ExitStack, config: TrainConfig, fingerprint: str) -> None:
    """Keep others out of the run directory for as long as ``stack`` is open, and record the run."""
    stack.enter_context(directory.locked(config.out))
    directory.start(config, fingerprint)


def _train(
    config: TrainConfig, corpus: Corpus, model: Any, learning_rate: float, label: Label, parallel: str
) -> RunResult:
    checkpoint = agreed_checkpoint(config.out)
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")) if checkpoint else TrainerState()
    trained = state.global_step >= config.optim.steps
    if trained and checkpoint is not None:  # killed between the last checkpoint and the result
        if (checkpoint / MODEL).is_dir():
            load_weights(model, checkpoint)
        else:
            model = AutoModelForCausalLM.from_pretrained(checkpoint)
    arguments = training_arguments(config, learning_rate, checkpoint is not None, parallel_arguments(parallel, model))
    if parallel not in SHARDED:  # a sharded one moves layer by layer
        model.to(arguments.device)
    apply_speed(model, config.speed, arguments.device, whole=parallel not in SHARDED)
    memory = PeakMemory()
    trainer = VirtualWidthTrainer(
        model=model,
        args=arguments,
        train_dataset=corpus.train,
        eval_dataset=spread(corpus.valid, config.corpus.max_valid_tokens // config.corpus.window),
        processing_class=corpus.tokenizer,
        data_collator=default_data_collator,
        callbacks=[AsAskedFor(parallel), ProgressBar(label)],
        window=config.corpus.window,
        rate_factors=rate_factors(config, model),
        health_every=config.intervals[1] if config.health_every is None else config.health_every,
        keep_last=config.reliability.keep_last,
        skip_bad_steps=config.reliability.skip_bad_steps,
        spike_factor=config.reliability.spike_factor,
    )
    if checkpoint is not None:
        trainer.restore(checkpoint)
    trainer.stopwatch.seconds = state.log_history[-1]["seconds"] if state.log_history else 0.0

    def result(curve: list[dict[str, float | None]]) -> RunResult:
        tokens = trainer.state.global_step * trainer.tokens_per_step
        return RunResult(
            name=config.name,
            m=config.m or 1,
            n=config.n or 1,
            r=(config.n or 1) / (config.m or 1),
            connection=getattr(model.config, "connection", "residual"),
            embedding=getattr(model.config, "embedding", "direct"),
            mtp=config.width.mtp,
            seed=config.seed,
            learning_rate=learning_rate,
            params=sum(p.numel() for p in model.parameters()),
            flops_per_token=flops_per_token(model.config, config.corpus.window),
            tokens_per_second=tokens / max(trainer.stopwatch.seconds, 1e-9),
            peak_memory_bytes=memory.read(),
            curve=curve,
        )

    if trained:
        trainer.state = state
    else:
        try:
            with StopSignals() as signals, all_present():
                trainer.add_callback(signals)
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if signals.agreed is not None and trainer.state.global_step < config.optim.steps:
                raise Stopped(signals.agreed, trainer.state.global_step)
        except Diverged as diverged:
            end = trainer.state.global_step + 1
            lost = {"tokens": end * trainer.tokens_per_step, "loss": None, "loss_2": None}
            seen = [p for p in validation_curve(trainer.state.log_history) if p["tokens"] < lost["tokens"]]
            diverged.result = result([*seen, lost | {"seconds": round(trainer.stopwatch.seconds, 3)}])
            raise
    finished = result(validation_curve(trainer.state.log_history))
    if isinstance(model, VirtualWidthForCausalLM):
        model.training_facts = training_facts(config, finished, directory.read_json(config.out / "run.json"))
    trainer.save_final()
    if rank() == 0:
        directory.write_json(config.out / "result.json", dataclasses.asdict(finished))
    return finished


def rate_factors(config: TrainConfig, model: Any) -> dict[str, float]:
    """The factors given, and the defaults for the other groups, of which the log tells."""
    given = parse_factors(config.optim.rate_factors)
    added = {group: factor for group, factor in default_factors(model).items() if group not in given}
    for group, factor in added.items():
        logger.info("the %s of this deep model learns at %.3g of the rate (--rate-factors %s=1: at all of it)",
                    group, factor, group)  # fmt: skip
    return added | given


def training_facts(config: TrainConfig, result: RunResult, record: dict[str, Any]) -> TrainingFacts:
    """What the model card says of a finished run, from its configuration, result and ``run.json``."""
    last = result.curve[-1]
    losses = {"next-token loss": last["loss"], "next-2-token loss": last["loss_2"]}
    return TrainingFacts(
        data=", ".join(config.corpus.stream) or config.corpus.data,
        tokens=int(last["tokens"] or 0),
        losses={name: value for name, value in losses.items() if value is not None},
        command=record["command"],
        versions={name: value for name, value in record["versions"].items() if value is not None},
    )


def stored_result(out: Path) -> RunResult | None:
    """The result of a run that has ended."""
    path = out / "result.json"
    if not path.exists():
        return None
    try:
        return RunResult(**directory.read_json(path))
    except TypeError:
        raise UserError(f"{path} does not hold a run's result; delete it, and --resume writes it afresh") from None


def load_corpus(config: TrainConfig) -> Corpus:
    """The run's text, tokenised and packed, or to be streamed."""
    c = config.corpus
    if c.stream:
        return prepare_stream(
            c.stream,
            valid=c.valid,
            tokenizer=c.tokenizer,
            window=c.window,
            batch_size=config.optim.batch_size,
            seed=config.seed,
            skip_bad_rows=c.skip_bad_rows,
            control_tokens=c.control_tokens,
        )
    return prepare(c.data, valid=c.valid, tokenizer=c.tokenizer, window=c.window, control_tokens=c.control_tokens)


def training_arguments(
    config: TrainConfig, learning_rate: float, resumed: bool, parallel: dict[str, Any]
) -> TrainingArguments:
    """The Trainer's settings for a run; ``parallel`` is what they say of its processes."""
    o = config.optim
    log, evaluate, save = config.intervals
    if torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ:
        raise UserError("several GPUs are visible; set CUDA_VISIBLE_DEVICES to one, or use torchrun")
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(config.out / "logs")
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
        warmup_steps=o.warmup_steps if o.warmup_steps is not None else max(1, o.steps // 20),
        weight_decay=o.weight_decay,
        adam_beta1=o.beta1,
        adam_beta2=o.beta2,
        max_grad_norm=o.max_grad_norm,
        bf16=o.precision == "bf16" or (o.precision == "auto" and cuda_bf16),
        use_cpu=not torch.cuda.is_available(),
        seed=config.seed,
        data_seed=config.seed,
        logging_strategy="steps",
        logging_steps=log,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=evaluate,
        eval_on_start=not resumed,
        save_strategy="steps",
        save_steps=save,
        torch_compile=config.speed.compile,
        remove_unused_columns=False,
        dataloader_drop_last=True,
        dataloader_num_workers=config.corpus.workers,
        ignore_data_skip=bool(config.corpus.stream),  # a stream is opened where it stands
        label_names=["labels"],
        disable_tqdm=True,
        report_to=["tensorboard"],
        ddp_timeout=round(60 * config.reliability.distributed_timeout),
        **parallel,
    )


def check_device(speed: SpeedOptions) -> None:
    """Refuse backends that cannot run where the training will."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choose(speed.connection_backend, device, torch.float32)
    choose_loss(speed.loss_backend, device)


def apply_speed(model: Any, speed: SpeedOptions, device: torch.device, whole: bool = True) -> None:
    """Set up a model for the options of a run.

    Args:
        model: wherever it is now.
        speed: the options.
        device: that it will run on.
        whole: whether its weights will all be there in one process; a fused loss needs the unembedding's.
    """
    if isinstance(model, VirtualWidthForCausalLM):
        choose_loss(speed.loss_backend, device)
        model.loss_backend = speed.loss_backend if whole else "torch"
        if model.config.connection != "residual":
            if whole:
                model.set_connection_backend(speed.connection_backend)
            else:  # it is not yet on the device that decides
                for connection in (m for m in model.modules() if isinstance(m, Connection)):
                    connection.set_backend(speed.connection_backend)
            model.model.keep_states_every = speed.keep_states_every
    if not speed.gradient_checkpointing:
        return
    if hasattr(model, "activation_checkpointing_enable"):  # transformers renamed the switch
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable()


def learning_rate_of(config: TrainConfig) -> float:
    """The rate given, else the preset's, for plain and wide models separately."""
    if config.optim.learning_rate is not None:
        return config.optim.learning_rate
    if config.backbone not in PRESETS:
        raise UserError(f"--learning-rate is needed: none is known for the backbone {config.backbone!r}")
    preset = PRESETS[config.backbone]
    return preset.learning_rate if config.m is None else preset.wide_learning_rate


def spread(dataset: Any, count: int) -> Any:
    """At most ``count`` items (at least one), evenly spread, always the same."""
    count = max(1, min(count, len(dataset)))
    return Subset(dataset, [i * len(dataset) // count for i in range(count)])


def validation_curve(history: list[dict[str, Any]]) -> list[dict[str, float | None]]:
    """``{tokens, loss, loss_2, seconds}`` of each validation in a Trainer's log."""
    return [
        {
            "tokens": entry["tokens"],
            "loss": entry["eval_loss"],
            "loss_2": entry.get("eval_loss_2"),
            "seconds": entry["seconds"],
        }
        for entry in history
        if "eval_loss" in entry
    ]


def flops_per_token(config: Any, window: int) -> float | None:
    """Forward FLOPs per token, by the formulas of :mod:`vwn.cost.model`; None for attention they do not know."""
    try:
        return model_cost(config, sequence_length=window).forward_flops_per_token
    except UserError as unknown:
        if first_process():
            print(f"vwn: FLOPs are left out of the result: {unknown}", file=sys.stderr)
        return None
