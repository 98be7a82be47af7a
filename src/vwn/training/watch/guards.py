"""Steps that would do harm are skipped and recorded, a bounded number of them; then the run stops.

A loss or gradient that is not finite would ruin the weights for good. A spike, a loss or gradient norm far above what
the last steps had, may. Either way the weights, the optimiser's moments and its step counts stay as they were; the data
and the learning rate go on. What is looked at is the mean loss and the norm of all processes, so all skip the same.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections import deque
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from vwn.common.files import write_json
from vwn.common.processes import rank
from vwn.training.checkpoint.saving import not_finite

SPAN = 100
"""Steps in which bad ones are counted."""
HISTORY = 128
"""Good steps that a spike is measured against, of which half must have been seen."""
FOLDER = "skipped"
"""Folder in the run directory: ``step-N.json`` says why, ``step-N-rankR.safetensors`` holds the batch."""


class StepGuard(TrainerCallback):
    """Decides between the backward pass and the optimiser's step.

    At most ``limit`` bad steps are skipped among the last :data:`SPAN`. A spike is ``factor`` robust standard
    deviations (1.4826 times the median absolute deviation) above the median of the last steps; 0 looks for none.
    """

    def __init__(self, trainer: Any, limit: int, factor: float) -> None:
        self.trainer, self.limit, self.factor = trainer, limit, factor
        self.history: deque[list[float]] = deque(maxlen=HISTORY)  # [loss, gradient norm]
        self.skipped: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        return {"history": list(self.history), "skipped": self.skipped}

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        self.history.extend(states[0]["history"])  # the same in all processes
        self.skipped = states[0]["skipped"]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, step = self.trainer, state.global_step + 1
        loss = trainer.accelerator.reduce(sum(trainer.step_losses), reduction="mean").item()
        norm = trainer.gradient_norm
        norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        why = self.verdict(loss, norm)
        if why is None:
            self.history.append([loss, norm])
            return
        ruined = not_finite(trainer.model)
        self.skipped = [s for s in self.skipped if s > step - SPAN] + [step]
        self._record(step, why, loss, norm)
        if ruined or len(self.skipped) > self.limit:
            before = f", after the bad steps {self.skipped[:-1]}" if self.skipped[1:] and not ruined else ""
            trainer.stop(why + before)
        if rank() == 0:
            count = f"{len(self.skipped)} of at most {self.limit} in {SPAN} steps"
            where = Path(args.output_dir) / FOLDER
            print(f"vwn: step {step} is skipped: {why} ({count}; its batch is in {where})", file=sys.stderr)
        trainer.model.zero_grad(set_to_none=True)  # an optimiser passes over what has no gradient
        trainer.forget_step()

    def verdict(self, loss: float, norm: float) -> str | None:
        """Say what is wrong with a step; None if nothing is."""
        if not math.isfinite(loss):
            return "the loss is no longer finite"
        if not math.isfinite(norm):
            return "the gradient is no longer finite"
        if not self.factor or len(self.history) < HISTORY // 2:
            return None
        for name, value, seen in zip(
            ("loss", "gradient norm"), (loss, norm), zip(*self.history, strict=True), strict=True
        ):
            median = statistics.median(seen)
            spread = 1.4826 * statistics.median(abs(x - median) for x in seen)
            if spread and value > median + self.factor * spread:
                return f"the {name} of {value:.4g} is {(value - median) / spread:.1f} deviations above {median:.4g}"
        return None

    def _record(self, step: int, why: str, loss: float, norm: float) -> None:
        folder = Path(self.trainer.args.output_dir) / FOLDER
        folder.mkdir(exist_ok=True)
        batch = {f"input_ids_{k}": ids.detach().cpu().contiguous() for k, ids in enumerate(self.trainer.step_inputs)}
        save_file(batch, folder / f"step-{step}-rank{rank()}.safetensors")
        if rank() == 0:
            write_json(folder / f"step-{step}.json", {"step": step, "why": why, "loss": loss, "gradient_norm": norm})
