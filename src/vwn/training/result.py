"""Store what a training run measured, and describe the run for its model card."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vwn.common.errors import UserError
from vwn.common.files import read_json
from vwn.common.processes import rank
from vwn.cost import model_cost
from vwn.hf.checkpoint.card import TrainingFacts
from vwn.training.config import TrainConfig

Point = dict[str, float | None]


@dataclass(frozen=True)
class RunResult:
    """The measurements of a finished run; also its `result.json`.

    ``connection`` is ``"residual"`` for a plain backbone. ``curve`` holds ``{tokens, loss, loss_2, seconds}`` of each
    validation, losses in nats per token, ``loss_2`` None without MTP; of a run with several budgets it is the trunk's,
    and ``decayed`` holds the same of the end of each budget's branch, the smallest first, its seconds with those of the
    trunk before it. ``peak_memory_bytes`` is the GPU's where there is one, else the process's.
    ``step_seconds_median`` and ``step_seconds_p90`` are the median and the 90th percentile of the time of an optimiser
    step; where they differ much, something else was at work on the machine. ``sample`` is the last text of
    ``samples.jsonl``, the prompt included.
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
    curve: list[Point]
    decayed: list[Point] = field(default_factory=list)
    step_seconds_median: float | None = None
    step_seconds_p90: float | None = None
    sample: str | None = None

    @property
    def has_diverged(self) -> bool:
        """Return whether the run, or a branch of it, ended with a loss that is not finite."""
        return any(point["loss"] is None for point in self.curve[-1:])

    def is_whole(self, config: TrainConfig, budgets: int | None = None) -> bool:
        """Return whether it covers all that a run was asked for, which may have become longer; one that diverged does.

        Args:
            config: the run.
            budgets: how many of its budgets are asked for, the smallest first; by default all.
        """
        if self.has_diverged:
            return True
        if config.branches:
            asked = {branch.steps * config.tokens_per_step for branch in config.branches[:budgets]}
            return asked <= {point["tokens"] for point in self.decayed}
        return int(self.curve[-1]["tokens"] or 0) >= config.optim.steps * config.tokens_per_step


def stored_result(out: Path) -> RunResult | None:
    """Return the result of a run that has ended."""
    path = out / "result.json"
    if not path.exists():
        return None
    try:
        return RunResult(**read_json(path))
    except TypeError:
        raise UserError(f"{path} does not hold a run's result; delete it, and --resume writes it afresh") from None


def training_facts(config: TrainConfig, result: RunResult) -> TrainingFacts:
    """Say for the model card what was trained, from its configuration and result."""
    last = result.curve[-1]
    losses = {"next-token loss": last["loss"], "next-2-token loss": last["loss_2"]}
    return TrainingFacts(
        data=", ".join(config.corpus.stream) or config.corpus.data,
        tokens=int(last["tokens"] or 0),
        losses={name: value for name, value in losses.items() if value is not None},
    )


def validation_curve(history: list[dict[str, Any]]) -> list[Point]:
    """Return ``{tokens, loss, loss_2, seconds}`` of each validation in a Trainer's log."""
    names = {"tokens": "tokens", "loss": "eval_loss", "loss_2": "eval_loss_2", "seconds": "seconds"}
    return [{ours: entry.get(theirs) for ours, theirs in names.items()} for entry in history if "eval_loss" in entry]


_COUNTED: dict[tuple[str, int], int] = {}


def flops_per_token(config: Any, window: int) -> float | None:
    """Count forward FLOPs per token by :mod:`vwn.cost.model`, once for equal configs; None if it cannot."""
    key = config.to_json_string(), window
    try:
        if key not in _COUNTED:
            _COUNTED[key] = model_cost(config, sequence_length=window).forward_flops_per_token
        return _COUNTED[key]
    except UserError as unknown:
        if rank() == 0:
            print(f"vwn: FLOPs are left out of the result: {unknown}", file=sys.stderr)
        return None
