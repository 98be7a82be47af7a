"""Text that the model writes at each validation: a line of ``samples.jsonl``, and TensorBoard's text."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from vwn.common.errors import UserError
from vwn.common.processes import LostProcess, all_present
from vwn.training.watch.lines import StepLines

FILE = "samples.jsonl"
PROMPT_TOKENS = 32
"""Tokens of the prompt, the beginning of the validation text; at most half a window."""
VALID_TOKENS_PER_TOKEN = 1024
"""Validation tokens for each generated one, so that a sample costs little of the validation."""
logger = logging.getLogger(__name__)


class SampleLog(TrainerCallback):
    """Continues the beginning of the validation text at each validation; training is not changed by it.

    The sampling has a seed of its own, so that samples differ by the weights alone. ``board`` is TensorBoard's.
    """

    def __init__(self, trainer: Any, tokens: int, board: Any = None) -> None:
        self.trainer, self.board = trainer, board
        window = trainer.eval_dataset[0]["input_ids"]
        self.prompt = window[: min(PROMPT_TOKENS, len(window) // 2)]
        affordable = len(trainer.eval_dataset) * len(window) // VALID_TOKENS_PER_TOKEN
        self.tokens = min(tokens, len(window) - len(self.prompt), affordable)
        self.lines = StepLines(Path(trainer.args.output_dir) / FILE)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.lines.forget_after(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        is_sharded = self.trainer.is_fsdp_enabled  # each process then holds a part of every weight
        if not self.tokens or not (is_sharded or state.is_world_process_zero):
            return
        try:
            with all_present():
                prompt, text = self._generate()
        except LostProcess:
            raise
        except Exception as error:  # not every backbone can generate, nor every tokenizer decode all of a model's ids
            why = str(error).split("\n")[0]
            if is_sharded:  # the other processes may wait for this one
                raise UserError(f"a sample failed ({type(error).__name__}: {why}); use --sample-tokens 0") from error
            logger.warning("no samples are written: %s: %s", type(error).__name__, why)
            self.tokens = 0
            return
        if state.is_world_process_zero:
            entry = {"step": state.global_step, "tokens": state.global_step * self.trainer.tokens_per_step}
            self.lines.append({**entry, "prompt": prompt, "text": text})
            if getattr(self.board, "tb_writer", None):
                as_code = "    " + (prompt + text).replace("\n", "\n    ")
                self.board.tb_writer.add_text("sample", as_code, state.global_step)

    def _generate(self) -> tuple[str, str]:
        """Return the prompt and its continuation."""
        model, device = self.trainer.model, self.trainer.args.device
        training, prompt = model.training, self.prompt[None].to(device)
        model.eval()
        try:
            with (
                torch.random.fork_rng([device] if device.type == "cuda" else []),
                self.trainer.compute_loss_context_manager(),
            ):
                torch.manual_seed(self.trainer.args.seed)
                out = model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=self.tokens,
                    do_sample=True,
                    temperature=0.8,
                    top_p=0.95,
                    remove_invalid_values=True,
                    pad_token_id=self.trainer.processing_class.eos_token_id,
                )
        finally:
            model.train(training)
        decode, start = self.trainer.processing_class.decode, len(self.prompt)
        return decode(out[0, :start], skip_special_tokens=True), decode(out[0, start:], skip_special_tokens=True)


def last_sample(directory: Path) -> str | None:
    """Return the text of the last sample of a run, its prompt included; None if it has none."""
    entries = StepLines(directory / FILE).read()
    return entries[-1]["prompt"] + entries[-1]["text"] if entries else None
