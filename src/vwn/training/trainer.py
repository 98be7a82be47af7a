"""Hugging Face Trainer, plus what virtual width needs: losses per head, one decay rule, checkpoints that are whole."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import RandomSampler
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback

from vwn.common.errors import UserError
from vwn.common.processes import world_size
from vwn.data.stream import StreamLoader, TokenStream
from vwn.nn.groups import GROUPS, parameter_groups
from vwn.training.checkpoint.manifest import checkpoints
from vwn.training.checkpoint.saving import SavingTrainer, not_finite
from vwn.training.config import TrainConfig
from vwn.training.watch.guards import StepGuard
from vwn.training.watch.health import HealthLog


class Diverged(UserError):
    """A run that cannot go on because its loss or its weights are no longer finite."""

    result: Any = None
    """The measurements until then; their curve ends in None."""


def head_losses(outputs: Any, router_aux_loss_coef: float = 0.0) -> Tensor:
    """Return unweighted mean cross-entropy of each head, next token first, ``[1 + depth]``, in nats per token."""
    if getattr(outputs, "losses", None) is not None:
        return torch.stack(outputs.losses)
    aux_loss = getattr(outputs, "aux_loss", None)  # a stock MoE backbone adds it to its loss
    return (outputs.loss if aux_loss is None else outputs.loss - router_aux_loss_coef * aux_loss).detach()[None]


def named_losses(losses: Any) -> dict[str, float]:
    """Return ``loss`` for the next token, ``loss_2`` for the next but one, and so on."""
    return {"loss" if k == 0 else f"loss_{k + 1}": float(value) for k, value in enumerate(losses)}


class VirtualWidthTrainer(SavingTrainer):
    """A Trainer that logs every head's loss, decays by our rule, stops at a non-finite loss, and saves atomically.

    Training logs hold ``loss`` (next token), ``loss_2`` …, and ``objective``, their weighted sum with the router's
    auxiliary loss; validation the same with the prefix ``eval_``, all in nats per token, and ``tokens`` and
    ``seconds`` (of training alone) so far.
    """

    def __init__(self, config: TrainConfig, rate_factors: Mapping[str, float], **kwargs: Any) -> None:
        c = config
        super().__init__(
            compute_metrics=lambda rows: named_losses(rows.predictions.astype(np.float64).mean(axis=0)),
            keep_last=c.reliability.keep_last,
            **kwargs,
        )
        self.config, self.rate_factors = c, dict.fromkeys(GROUPS, 1.0) | dict(rate_factors)
        self.tokens_per_step = c.tokens_per_step
        health_every = c.intervals[1] if c.health_every is None else c.health_every
        self.health = HealthLog(self, health_every) if health_every else None
        self.remove_callback(PrinterCallback)  # the progress bar shows what matters, the logs hold the rest
        self._losses: list[Tensor] = []
        self.step_losses: list[Tensor] = []  # of the forward passes of the step under way, and their tokens
        self.step_inputs: list[Tensor] = []
        self.gradient_norm: Any = None  # of the step under way, before clipping
        self.stopwatch, self.log_window = Stopwatch(), LogWindow(self)
        guard = StepGuard(self, c.reliability.skip_bad_steps, c.reliability.spike_factor)
        for callback in (self.stopwatch, *([self.health] if self.health else []), guard, self.log_window):
            self.add_callback(callback)
        self.stateful |= {"guard": guard, "log": self.log_window, "stopwatch": self.stopwatch}
        if isinstance(self.train_dataset, TokenStream):
            a = self.args
            processes = a.process_index, a.world_size
            passes, workers = a.gradient_accumulation_steps, a.dataloader_num_workers
            self.stream = StreamLoader(self.train_dataset, *processes, passes, workers)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Make AdamW on :func:`vwn.parameter_groups` with ``rate_factors``, or Muon and AdamW together."""
        a, optimizer = self.args, self.config.optim.optimizer
        betas = a.adam_beta1, a.adam_beta2
        if self.optimizer is None:  # type: ignore[has-type]
            groups = parameter_groups(self.model, a.learning_rate, a.weight_decay, optimizer, self.rate_factors)
            if optimizer == "muon":
                made: Any = MuonWithAdamW(groups[0], groups[1], betas)
            else:
                made = AdamW(groups, betas=betas, fused=True)
            self.optimizer = made
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the Trainer's, or with a cool-down a warm-up, the peak rate, and a linear fall to the final one."""
        scheduler: Any = self.lr_scheduler  # type: ignore[has-type]
        c = self.config
        if scheduler is None and c.cooldown_steps:
            leaves, final = num_training_steps - c.cooldown_steps, c.optim.final_learning_rate
            factor = partial(cooled_down, warmup=c.warmup, leaves=leaves, ends=num_training_steps, final=final)
            self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, factor)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Take the Trainer's step; keep its loss for the guard, and show complete gradients to the health log."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.step_losses.append(loss)
        self.step_inputs.append(inputs["input_ids"])
        if self.health and self.accelerator.sync_gradients:
            self.health.see_gradients(self.model)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the model's loss, and remember each head's."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            losses = self._head_losses(outputs)
            if getattr(outputs, "losses", None) is None and num_items_in_batch is not None:
                # a stock model's loss is this batch's share of all accumulated ones, not its mean
                losses = losses * num_items_in_batch / (inputs["labels"][:, 1:] != -100).sum()
            self._losses.append(losses)
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        self.gradient_norm = super()._get_grad_norm(*args, **kwargs)
        return self.gradient_norm

    def forget_step(self) -> None:
        """Leave the step under way out of the losses that are logged: its gradients are not used."""
        del self._losses[len(self._losses) - len(self.step_losses) :]
        self._tr_loss.copy_(self.log_window.before)
        self.log_window.skipped += 1

    def stop(self, why: str) -> NoReturn:
        """Raise `Diverged` for a run that cannot go on, naming what is left."""
        last = next(iter(checkpoints(Path(self.args.output_dir)).values()), None)
        kept = f"the last checkpoint is {last}; " if last else ""
        raise Diverged(
            f"{why} at step {self.state.global_step + 1}; {kept}"
            f"train again in another --out with a --learning-rate below {self.args.learning_rate:g}"
        )

    def get_train_dataloader(self) -> Any:
        """Return batches of packed windows in an order that depends on the seed alone, or those of streamed data."""
        return self.stream or super().get_train_dataloader()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        # Whole global batches only, so that an epoch has as many steps however they are divided among processes.
        sampler = super()._get_train_sampler(train_dataset)
        batch = self.config.optim.batch_size
        size = len(self.train_dataset) // batch * batch
        return RandomSampler(sampler.data_source, num_samples=size, generator=sampler.generator)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Return batches of all of the validation text, the last incomplete one too."""
        drop, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return each head's loss in place of logits, one row per window, so that the Trainer averages them."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            losses = self._head_losses(model(**inputs))
        rows = losses.float().expand(len(inputs["labels"]), -1).contiguous()
        return losses[0], rows, rows.new_zeros(len(rows))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the heads' losses, tokens and seconds."""
        if "loss" in logs and not self._losses:
            del logs["loss"]  # all its steps were skipped
        if "loss" in logs:
            logs["objective"] = logs.pop("loss") * self.log_window.mean_of_used(self.state.global_step)
            losses = torch.stack(self._losses).float().mean(0)
            if world_size() > 1:  # every process has had as many windows
                torch.distributed.all_reduce(losses)
            logs |= named_losses((losses / world_size()).tolist())
            self._losses.clear()
            if self.health:
                logs |= self.health.unlogged
                self.health.unlogged = {}
        if not math.isfinite(logs.get("eval_loss", 0.0)):
            self.stop("the validation loss is no longer finite")
        self.log_window.skipped = 0 if "learning_rate" in logs else self.log_window.skipped
        logs["tokens"] = self.state.global_step * self.tokens_per_step
        logs["seconds"] = round(self.stopwatch.seconds, 3)
        super().log(logs, start_time)

    def _head_losses(self, outputs: Any) -> Tensor:
        return head_losses(outputs, getattr(self.model.config, "router_aux_loss_coef", 0.0))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        name = not_finite(model)
        if name is not None:
            self.stop(f"the weight {name} is no longer finite")
        super()._save_checkpoint(model, trial)


def cooled_down(step: int, warmup: int, leaves: int, ends: int, final: float) -> float:
    """Return the share of the peak rate after ``step`` steps: constant up to the cool-down, linear to ``final``."""
    return step / warmup if step < warmup else 1.0 - (1.0 - final) * max(0, step - leaves) / (ends - leaves)


class LogWindow(TrainerCallback):
    """The steps since the last training log, which a checkpoint may cut in two: a resumed run logs the same."""

    def __init__(self, trainer: VirtualWidthTrainer) -> None:
        self.trainer, self.skipped = trainer, 0
        self.saved: dict[str, Any] | None = None

    def mean_of_used(self, step: int) -> float:
        """Return the factor from the mean over all steps of the window to that over those not skipped."""
        steps = step - self.logged
        return steps / (steps - self.skipped) if self.skipped else 1.0

    def state_dict(self) -> dict[str, Any]:
        t = self.trainer
        losses, objective = [row.tolist() for row in t._losses], t._tr_loss.item()
        state = {"losses": losses, "objective": objective, "step": t._globalstep_last_logged, "skipped": self.skipped}
        return state | {"seconds": t.stopwatch.seconds, "health": t.health.unlogged if t.health else {}}

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        rank = self.trainer.args.process_index
        self.saved = states[rank if rank < len(states) else 0]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.saved is not None:
            t, self.skipped = self.trainer, self.saved["skipped"]
            t._losses = [torch.tensor(row, device=args.device) for row in self.saved["losses"]]
            t._tr_loss.fill_(self.saved["objective"])
            t._globalstep_last_logged = self.saved["step"]
            t.stopwatch.seconds = self.saved["seconds"]
            if t.health:
                t.health.unlogged = self.saved["health"]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = self.trainer._tr_loss.clone()
        self.logged = self.trainer._globalstep_last_logged  # moves on before the log is made
        self.trainer.step_losses, self.trainer.step_inputs = [], []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.stream is not None:  # it has no epochs: log the share of the run instead
            state.epoch = state.global_step / state.max_steps


class Stopwatch(TrainerCallback):
    """Seconds spent in optimiser steps, without validation and checkpoints, and in each of this process's last 1024."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.steps: deque[float] = deque(maxlen=1024)

    def quantiles(self) -> tuple[float | None, float | None]:
        """Return median and 90th percentile of the seconds of a step; None before the first."""
        if not self.steps:
            return None, None
        median, p90 = np.quantile(self.steps, [0.5, 0.9])
        return float(median), float(p90)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": list(self.steps)}

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        self.steps.extend(states[0]["steps"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        took = time.perf_counter() - self.started
        self.seconds += took
        self.steps.append(round(took, 6))


class ProgressBar(TrainerCallback):
    """A bar over each part of a run with losses, pace and time left, also where there is no terminal to redraw.

    Args:
        label: as in :func:`vwn.training.run.train`.
        tokens_per_step: for the pace, which is the median of the last 50 steps.
    """

    def __init__(self, label: str | Callable[[int], str], tokens_per_step: int) -> None:
        self.label = label if callable(label) else lambda _: label
        self.tokens_per_step = tokens_per_step
        self.steps = 0  # of all parts, in this process
        self.shown: dict[str, str] = {}

    def begin(self, part: str, stopwatch: Stopwatch) -> None:
        """Turn to a part of the run, which is named behind the label, and is timed by ``stopwatch``."""
        self.part, self.stopwatch = part, stopwatch

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.label(self.steps) + self.part,
            unit="step",
            mininterval=0.1 if on_terminal else 15,
            dynamic_ncols=on_terminal,
            disable=not state.is_world_process_zero,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1
        self.shown["tokens/s"] = f"{self.tokens_per_step / statistics.median([*self.stopwatch.steps][-50:]):,.0f}"
        self.bar.set_description(self.label(self.steps) + self.part, refresh=False)
        self.bar.set_postfix(self.shown, refresh=False)
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        for key, name in (("loss", "loss"), ("eval_loss", "valid")):
            if logs and key in logs:
                self.shown[name] = f"{logs[key]:.4f}"
                self.bar.set_postfix(self.shown, refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


class MuonWithAdamW(Optimizer):
    """Muon and AdamW with one state and one list of groups, Muon's first, as :func:`vwn.parameter_groups` makes."""

    def __init__(self, muon: list[dict[str, Any]], adamw: list[dict[str, Any]], betas: tuple[float, float]) -> None:
        self.parts: tuple[Optimizer, ...] = (Muon(muon, adjust_lr_fn="match_rms_adamw"), AdamW(adamw, betas=betas))
        self.matrices = len(muon)
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step both; what was loaded or scheduled stands in this optimiser's groups and state."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups[: self.matrices], self.param_groups[self.matrices :]
        for part, own in zip(self.parts, groups, strict=True):
            part.param_groups, part.state = own, self.state
            part.step()
        return loss
