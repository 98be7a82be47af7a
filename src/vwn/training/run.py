"""One training run: its directory, its data, its model, training, and what is left behind."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset
from transformers import TrainingArguments, default_data_collator
from transformers.utils import logging as hf_logging

from vwn.cost import model_cost
from vwn.data import Corpus, prepare
from vwn.errors import UserError
from vwn.training.config import CorpusConfig, OptimConfig, TrainConfig, WidthOptions
from vwn.training.machine import PeakMemory, provenance
from vwn.training.model import build_model, load_backbone, model_config
from vwn.training.presets import PRESETS
from vwn.training.trainer import ProgressBar, VirtualWidthTrainer


@dataclass(frozen=True)
class RunResult:
    """What a finished run measured; also its `result.json`.

    ``curve`` holds ``{tokens, loss, loss_2, seconds}`` of each validation, losses in nats per token, ``loss_2`` None
    without MTP; ``peak_memory_bytes`` is the GPU's where there is one, else the process's.
    """

    name: str
    m: int
    n: int
    r: float
    seed: int
    learning_rate: float
    params: int
    flops_per_token: float | None
    tokens_per_second: float
    peak_memory_bytes: int
    curve: list[dict[str, float | None]]


def train(config: TrainConfig, corpus: Corpus | None = None, label: str | None = None) -> RunResult:
    """Train one model and leave in ``config.out`` its weights, tokenizer, checkpoints, logs, and ``result.json``.

    Args:
        config: the run.
        corpus: its data, where that is prepared already.
        label: what the progress bar says.

    Raises:
        UserError: input that cannot be used, or a run directory that exists (without ``resume``) or belongs to another
            configuration (with it).
    """
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    config.check()
    config, finished = open_run(config)
    if finished is not None:
        return finished
    corpus = corpus or load_corpus(config)
    learning_rate = config.optim.learning_rate or preset_learning_rate(config)
    backbone = load_backbone(
        config.backbone, len(corpus.tokenizer), config.corpus.window, corpus.tokenizer.eos_token_id
    )
    model = build_model(model_config(backbone, config.m, config.n, config.width), config.seed)
    start_directory(config)

    if config.gradient_checkpointing:
        enable_checkpointing(model)
    checkpoint = last_checkpoint(config.out)
    memory = PeakMemory()
    trainer = VirtualWidthTrainer(
        model=model,
        args=training_arguments(config, learning_rate, resumed=checkpoint is not None),
        train_dataset=corpus.train,
        eval_dataset=spread(corpus.valid, config.corpus.max_valid_tokens // config.corpus.window),
        processing_class=corpus.tokenizer,
        data_collator=default_data_collator,
        callbacks=[ProgressBar(label or config.name)],
        tokens_per_step=config.optim.batch_size * config.corpus.window,
    )
    if checkpoint:
        history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
        trainer.stopwatch.seconds = history[-1]["seconds"] if history else 0.0
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_model()
    (config.out / "training_args.bin").unlink(missing_ok=True)  # a pickle; run.json says it all

    curve = validation_curve(trainer.state.log_history)
    result = RunResult(
        name=config.name,
        m=config.m or 1,
        n=config.n or 1,
        r=(config.n or 1) / (config.m or 1),
        seed=config.seed,
        learning_rate=learning_rate,
        params=sum(p.numel() for p in model.parameters()),
        flops_per_token=flops_per_token(model.config, config.corpus.window),
        tokens_per_second=trainer.state.global_step * trainer.tokens_per_step / max(trainer.stopwatch.seconds, 1e-9),
        peak_memory_bytes=memory.read(),
        curve=curve,
    )
    write_json(config.out / "result.json", dataclasses.asdict(result))
    return result


def load_corpus(config: TrainConfig) -> Corpus:
    """The run's text, tokenised and packed."""
    c = config.corpus
    return prepare(c.data, valid=c.valid, tokenizer=c.tokenizer, window=c.window)


def open_run(config: TrainConfig) -> tuple[TrainConfig, RunResult | None]:
    """Check the run directory; with ``resume``, the stored configuration and, if the run had ended, its result."""
    stored = config.out / "run.json"
    if not config.resume:
        if config.out.exists() and any(config.out.iterdir()):
            raise UserError(
                f"the run directory {config.out} exists already; continue it with --resume or choose another --out"
            )
        return config, None
    if not stored.exists():
        return config, None
    kept = json.loads(stored.read_text())["config"]
    for name, value in settings(config).items():
        if value != kept.get(name) and value != settings(TrainConfig(out=config.out)).get(name):
            raise UserError(
                f"the run in {config.out} was started with {name} = {kept.get(name)!r}, not {value!r}; "
                "leave the option away to resume it, or choose another --out"
            )
    config = from_settings(config.out, kept)
    result = config.out / "result.json"
    return config, RunResult(**json.loads(result.read_text())) if result.exists() else None


def settings(config: TrainConfig) -> dict[str, Any]:
    """Everything that determines the run, flat, by dotted name; where it lies and whether it resumes do not."""
    flat: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        flat |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
    return {name: value for name, value in flat.items() if name not in ("out", "resume")}


def from_settings(out: Path, flat: dict[str, Any]) -> TrainConfig:
    """The configuration that :func:`settings` came from, resumed."""
    parts: dict[str, Any] = {name: value for name, value in flat.items() if "." not in name}
    for group, make in (("corpus", CorpusConfig), ("width", WidthOptions), ("optim", OptimConfig)):
        parts[group] = make(**{k.split(".")[1]: v for k, v in flat.items() if k.startswith(f"{group}.")})
    return TrainConfig(out=out, resume=True, **parts)


def start_directory(config: TrainConfig) -> None:
    """Create the run directory with everything needed to repeat the run; drop what a killed one left half done."""
    config.out.mkdir(parents=True, exist_ok=True)
    for rest in config.out.glob(".incomplete"):
        shutil.rmtree(rest)
    for rest in config.out.glob(".discarded-*"):
        shutil.rmtree(rest)
    if not (config.out / "run.json").exists():
        write_json(config.out / "run.json", {"config": settings(config), **provenance()})


def last_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint; only whole ones bear the name."""
    found = [(int(m[1]), p) for p in directory.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
    return max(found)[1] if found else None


def training_arguments(config: TrainConfig, learning_rate: float, resumed: bool) -> TrainingArguments:
    """The Trainer's settings for a run."""
    o = config.optim
    log, evaluate, save = config.intervals
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(config.out / "logs")
    cuda_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return TrainingArguments(
        output_dir=str(config.out),
        max_steps=o.steps,
        per_device_train_batch_size=o.batch_size // o.gradient_accumulation,
        gradient_accumulation_steps=o.gradient_accumulation,
        per_device_eval_batch_size=o.batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": o.final_learning_rate},
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
        torch_compile=config.compile,
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        report_to=["tensorboard"],
    )


def enable_checkpointing(model: Any) -> None:
    """Recompute layers in the backward pass; transformers renamed the switch."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def preset_learning_rate(config: TrainConfig) -> float:
    """A preset's rate, for plain and wide models separately."""
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
    """Forward FLOPs per token, by the formulas of :mod:`vwn.cost`; None for attention they do not know."""
    try:
        return model_cost(config, sequence_length=window).forward_flops_per_token
    except UserError as unknown:
        print(f"vwn: FLOPs are left out of the result: {unknown}", file=sys.stderr)
        return None


def write_json(path: Path, value: Any) -> None:
    """Write whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1, default=str) + "\n")
    partial.replace(path)
