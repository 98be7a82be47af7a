"""One training run: its data, its model, training, and what is left behind."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, TrainerState, default_data_collator
from transformers.integrations import TensorBoardCallback
from transformers.utils import logging as hf_logging

from vwn.common.errors import UserError
from vwn.common.memory import PeakMemory
from vwn.common.processes import all_present, broadcast, rank
from vwn.data import Corpus, PackedWindows, prepare
from vwn.data.packing import spread
from vwn.data.stream import prepare_stream
from vwn.data.tokenizer import BYTES, load_checkpoint_tokenizer
from vwn.hf import VirtualWidthForCausalLM
from vwn.nn.embedding import EMBEDDING_STD
from vwn.nn.groups import default_factors
from vwn.training import directory
from vwn.training.arguments import (
    apply_speed,
    check_device,
    check_trackers,
    learning_rate_of,
    parse_factors,
    training_arguments,
)
from vwn.training.branches import train_branches
from vwn.training.checkpoint.manifest import checkpoints, last_checkpoint
from vwn.training.checkpoint.saving import MODEL, load_weights
from vwn.training.config import TrainConfig
from vwn.training.distributed import CheckParallel, join, on_all_ranks, parallel_arguments, parallel_mode, rank0_first
from vwn.training.model import (
    build_model,
    load_backbone,
    model_config,
    record_start,
    recorded_start,
    resize_backbone,
    start_from,
)
from vwn.training.presets import PRESETS
from vwn.training.result import Point, RunResult, flops_per_token, stored_result, training_facts, validation_curve
from vwn.training.trainer import Diverged, ProgressBar, VirtualWidthTrainer
from vwn.training.watch.preemption import Stopped, StopSignals
from vwn.training.watch.samples import SampleLog, last_sample

START = "start"
"""Folder in the run directory with config and tokenizer of the model that ``--init-from`` named, which may go away."""
EPOCHS = 4
"""Passes over a text up to which a repeated token is worth about as much as a new one (arXiv 2305.16264)."""


def train(
    config: TrainConfig,
    corpus: Corpus | None = None,
    label: str | Callable[[int], str] | None = None,
    budgets: int | None = None,
) -> RunResult:
    """Train one model and leave in ``config.out`` its weights, tokenizer, checkpoints, logs, and ``result.json``.

    With several budgets the model is that of the largest, and every budget's is in ``branches``.

    Args:
        config: the run; with ``resume``, the one that was started, or a longer one.
        corpus: its data, where that is prepared already.
        label: text of the progress bar, or a function that makes it from the steps taken in this process.
        budgets: how many of the budgets are trained now, the smallest first; by default all.

    Raises:
        UserError: unusable input, or a run directory that exists (without ``resume``) or belongs to another run.
        Diverged: the loss or the weights became non-finite; its ``curve`` ends there.
        Stopped: SIGTERM or Ctrl-C; a checkpoint is written.
        CannotWrite: the disk is full; what was saved is untouched.
        LostProcess: another process of the run is gone.
    """
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    config.check()
    config = with_tokenizer(config)
    check_device(config.speed, config.n)
    check_trackers(config.report_to)
    join(timedelta(minutes=config.reliability.distributed_timeout))
    parallel = parallel_mode(config)
    asked = config
    opened = on_all_ranks(lambda: _open(asked, corpus, budgets) if rank() == 0 else (asked, None, None))
    config, stored, result = broadcast(opened)
    if result is not None:
        return result
    check_model(config)
    learning_rate = learning_rate_of(config)
    corpus = corpus or rank0_first(lambda: load_corpus(config))
    if isinstance(corpus.train, PackedWindows) and len(corpus.train) < config.optim.batch_size:
        raise UserError(
            f"the text gives {len(corpus.train)} windows of {config.corpus.window} tokens, fewer than one batch of "
            f"{config.optim.batch_size}; lower --batch-size or --window, or give more text"
        )
    if stored is not None:
        directory.check_same_text(config.out, stored, corpus.fingerprint)
    name = config.name if config.init_from is None else Path(config.init_from).name
    run = Run(config, corpus, learning_rate, ProgressBar(label or name, config.tokens_per_step), parallel)
    model = run.build()  # what cannot be built leaves no directory behind
    run.rate_factors = rate_factors(config, model, stored)
    if label is None and rank() == 0:
        for line in summary(config, corpus, model, learning_rate, run.rate_factors):
            print(f"vwn: {line}", file=sys.stderr)
    with ExitStack() as stack:
        on_all_ranks(lambda: _begin(stack, run, model) if rank() == 0 else None)
        return train_branches(run, budgets) if config.branches else run.train(config, model=model)


def _open(
    config: TrainConfig, corpus: Corpus | None, budgets: int | None
) -> tuple[TrainConfig, dict[str, Any] | None, RunResult | None]:
    """Return the run to train, the record of the one in ``config.out``, and its result if it has ended."""
    stored = directory.open_directory(config.out, "run.json", bool(config.resume))
    if stored is None and config.resume is True:
        raise UserError(f"there is no run in {config.out} to continue; drop --resume, or use --resume auto")
    if stored is None:
        return config, None, None
    directory.check_same(config.out, stored.get("config", {}), directory.settings(config))
    config = directory.continued(config, stored)
    config.check()
    if corpus is not None:
        directory.check_same_text(config.out, stored, corpus.fingerprint)
    result = stored_result(config.out)
    return config, stored, result if result is not None and result.is_whole(config, budgets) else None


def _begin(stack: ExitStack, run: Run, model: Any) -> None:
    """Keep others out of the run directory for as long as ``stack`` is open, and record the run."""
    out = run.config.out
    stack.enter_context(directory.locked(out))
    directory.start(run.config, run.corpus.fingerprint, run.rate_factors)
    if run.config.init_from is not None and not (out / START / "config.json").exists():
        record_start(model, run.corpus.tokenizer, out / START)


@dataclass
class Run:
    """A run under way: what its trunk and its branches share."""

    config: TrainConfig
    corpus: Corpus
    learning_rate: float
    bar: ProgressBar
    parallel: str
    rate_factors: dict[str, float] = field(default_factory=dict)

    def build(self) -> Any:
        """Return the model as it starts, set up for the options of speed."""
        model = self._start()
        apply_speed(model, self.config.speed, self.config.optim.precision, self.parallel != "fsdp2")
        return model

    def _start(self) -> Any:
        c = self.config
        if c.init_from is not None:
            if (c.out / START / "config.json").exists():
                if checkpoints(c.out):
                    return recorded_start(c.out / START)
                began = directory.read_json(c.out / "run.json")["config"]["init_from"]
                if began != c.init_from:  # another path to the same model is fine where its weights are here
                    raise UserError(f"{c.out} has no checkpoint yet; continue it with --init-from {began}")
            return start_from(c.init_from, len(self.corpus.tokenizer), c.corpus.window)
        tokenizer = self.corpus.tokenizer
        backbone = load_backbone(c.backbone, len(tokenizer), c.corpus.window, tokenizer.eos_token_id)
        backbone = resize_backbone(backbone, c.hidden_size, c.intermediate_size)
        is_preset = c.backbone in PRESETS
        embedding_std = EMBEDDING_STD if is_preset else None
        output_init = c.output_init or ("zero" if is_preset else "config")
        return build_model(model_config(backbone, c.m, c.n, c.width), c.seed, embedding_std, output_init)

    def train(
        self, config: TrainConfig, model: Any = None, start: Path | None = None, part: str = "", is_trunk: bool = False
    ) -> RunResult:
        """Train to ``config.optim.steps``, from the last checkpoint in ``config.out`` where there is one.

        Args:
            config: of the run, or of its trunk or a branch.
            model: as it starts; None builds it.
            start: checkpoint that a branch starts from.
            part: what the progress bar adds to its label.
            is_trunk: whether it goes on after these steps, and leaves neither model nor result.
        """
        model, memory = model or self.build(), PeakMemory()
        checkpoint = last_checkpoint(config.out)
        if checkpoint is not None and rank() == 0:
            print(f"vwn: continuing from {checkpoint}", file=sys.stderr)
        checkpoint = checkpoint or start
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")) if checkpoint else TrainerState()
        trained = state.global_step >= config.optim.steps
        in_parts = checkpoint is not None and (checkpoint / MODEL).is_dir()
        if trained and checkpoint is not None:  # killed between the last checkpoint and the result
            if in_parts:
                load_weights(model, checkpoint)
            else:
                model = AutoModelForCausalLM.from_pretrained(checkpoint)
        elif checkpoint is not None and in_parts != (self.parallel == "fsdp2"):
            raise UserError(f"{checkpoint} is of a run {'with' if in_parts else 'without'} --parallel fsdp2; keep that")
        trainer = self._trainer(config, model, checkpoint)
        self.bar.begin(part, trainer.stopwatch)
        trainer.stopwatch.seconds = state.log_history[-1]["seconds"] if state.log_history else 0.0

        def result(curve: list[Point]) -> RunResult:
            return self._result(config, trainer, memory, curve)

        if trained:
            trainer.state = state
        else:
            try:
                with StopSignals() as signals, all_present():
                    trainer.add_callback(signals)
                    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
                if signals.agreed is not None and (is_trunk or trainer.state.global_step < config.optim.steps):
                    raise Stopped(signals.agreed, trainer.state.global_step)
            except Diverged as diverged:
                end = trainer.state.global_step + 1
                lost: Point = {"tokens": end * trainer.tokens_per_step, "loss": None, "loss_2": None}
                seen = [p for p in validation_curve(trainer.state.log_history) if p["tokens"] < lost["tokens"]]  # type: ignore[operator]
                diverged.result = result([*seen, lost | {"seconds": round(trainer.stopwatch.seconds, 3)}])
                raise
        finished = result(validation_curve(trainer.state.log_history))
        if is_trunk:
            return finished
        if isinstance(model, VirtualWidthForCausalLM):
            model.training_facts = training_facts(config, finished)
        trainer.save_final()
        if rank() == 0:
            directory.write_json(config.out / "result.json", dataclasses.asdict(finished))
        return finished

    def _trainer(self, config: TrainConfig, model: Any, checkpoint: Path | None) -> VirtualWidthTrainer:
        board = TensorBoardCallback() if "tensorboard" in config.report_to else None
        if board is not None:
            board.logging_dir = str(config.out / "logs")
        parallel = parallel_arguments(self.parallel, model)
        arguments = training_arguments(config, self.learning_rate, checkpoint is not None, parallel)
        if self.parallel != "fsdp2":  # a sharded one moves layer by layer
            model.to(arguments.device)
        trainer = VirtualWidthTrainer(
            config,
            self.rate_factors,
            model=model,
            args=arguments,
            train_dataset=self.corpus.train,
            eval_dataset=spread(self.corpus.valid, config.corpus.max_valid_tokens // config.corpus.window),
            processing_class=self.corpus.tokenizer,
            data_collator=default_data_collator,
            callbacks=[CheckParallel(self.parallel), *([board] if board else [])],
        )
        trainer.add_callback(self.bar)  # behind the stopwatch
        trainer.add_callback(SampleLog(trainer, config.sample_tokens, board))
        if checkpoint is not None:
            trainer.restore(checkpoint)
        return trainer

    def _result(
        self, config: TrainConfig, trainer: VirtualWidthTrainer, memory: PeakMemory, curve: list[Point]
    ) -> RunResult:
        model = trainer.model
        m, n = getattr(model.config, "m", 1), getattr(model.config, "n", 1)
        median, p90 = trainer.stopwatch.quantiles()
        tokens = trainer.state.global_step * trainer.tokens_per_step
        return RunResult(
            name=config.name if config.init_from is None or n == 1 else f"{m}x{n}",
            m=m,
            n=n,
            r=n / m,
            connection=getattr(model.config, "connection", "residual"),
            embedding=getattr(model.config, "embedding", "direct"),
            mtp=getattr(model.config, "num_mtp_modules", 0),
            seed=config.seed,
            learning_rate=self.learning_rate,
            params=sum(p.numel() for p in model.parameters()),
            flops_per_token=flops_per_token(model.config, config.corpus.window),
            tokens_per_second=tokens / max(trainer.stopwatch.seconds, 1e-9),
            peak_memory_bytes=memory.read(),
            curve=curve,
            step_seconds_median=median,
            step_seconds_p90=p90,
            sample=last_sample(config.out) if rank() == 0 else None,
        )


def rate_factors(config: TrainConfig, model: Any, record: dict[str, Any] | None = None) -> dict[str, float]:
    """Return the factors given and the defaults for the other groups; a run that goes on keeps its ``record``'s."""
    before = default_factors(model) if record is None else record.get("rate_factors", {})
    return before | parse_factors(config.optim.rate_factors)


def load_corpus(config: TrainConfig) -> Corpus:
    """Return the run's text, tokenised and packed, or to be streamed."""
    c = config.corpus
    shared: dict[str, Any] = {"valid": c.valid, "window": c.window, "control_tokens": c.control_tokens}
    shared["tokenizer"] = BYTES if c.tokenizer is None else c.tokenizer
    start = config.out / START
    if config.init_from is not None and (start / "config.json").exists() and not Path(shared["tokenizer"]).exists():
        shared["tokenizer"] = str(start)
    if not c.stream:
        return prepare(c.data, **shared)
    return prepare_stream(
        c.stream, batch_size=config.optim.batch_size, seed=config.seed, skip_bad_rows=c.skip_bad_rows, **shared
    )


def with_tokenizer(config: TrainConfig) -> TrainConfig:
    """Fill in the tokenizer where none is given: that of the weights to start from, or bytes."""
    if config.corpus.tokenizer is not None:
        return config
    name = BYTES if config.init_from is None else str(directory.locate(config.init_from))
    if config.init_from is not None:
        load_checkpoint_tokenizer(name)  # or its error says what lacks
    return dataclasses.replace(config, corpus=dataclasses.replace(config.corpus, tokenizer=name))


def check_model(config: TrainConfig) -> None:
    """Refuse a backbone or a width that cannot be had, before the text is read."""
    if config.init_from is None:
        backbone = load_backbone(config.backbone, 1, config.corpus.window)
        backbone = resize_backbone(backbone, config.hidden_size, config.intermediate_size)
        model_config(backbone, config.m, config.n, config.width)
    elif not (config.out / START / "config.json").exists():
        directory.locate(config.init_from)


def summary(
    config: TrainConfig, corpus: Corpus, model: Any, learning_rate: float, rate_factors: dict[str, float]
) -> list[str]:
    """Say in a few lines what a run is going to do."""
    o = config.optim
    steps = config.branches[-1].steps if config.branches else o.steps
    tokens = steps * config.tokens_per_step
    rates = [f"{group} {learning_rate * factor:.3g}" for group, factor in rate_factors.items() if factor != 1]
    at = f" ({', '.join(rates)})" if rates else ""
    what = config.init_from or f"{config.backbone}, {config.name}"
    lines = [
        f"{what}: {sum(p.numel() for p in model.parameters()):,} parameters, learning rate {learning_rate:.3g}{at}, "
        f"{o.optimizer}, {o.schedule}",
        f"{steps:,} steps of {config.tokens_per_step:,} tokens: {tokens:,}",
    ]
    if corpus.train_tokens is not None:
        epochs = tokens / corpus.train_tokens
        lines[-1] += f"; the text has {corpus.train_tokens:,}, so {epochs:.2g} epochs"
        if epochs > EPOCHS:
            lines.append(
                f"more than {EPOCHS} epochs: the model will learn this text by heart; give more text, or fewer --steps"
            )
    return lines
