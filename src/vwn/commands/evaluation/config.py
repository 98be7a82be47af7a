"""The options of `vwn eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vwn.common.errors import UserError, require


@dataclass(frozen=True)
class EvalConfig:
    """Measure a trained model: losses on a text, scores on tasks, or both."""

    checkpoint: str
    """A run directory, one of its checkpoints, a folder with any causal language model, or a hub id."""
    data: str | None = None
    """Text to measure the losses on, as in `vwn train`; without it and --tasks the validation text of the run."""
    tokenizer: str | None = None
    """`bytes`, a folder, or a hub id, for --data and --tasks; by default the checkpoint's own."""
    max_tokens: int | None = None
    """Tokens of the text to use, evenly spread; by default all, or as many as the run's own validation used."""
    window: int | None = None
    """Tokens that the model reads at once; by default the window of its training, else at most 1024; for tasks by
    default all its positions."""
    stride: int | None = None
    """Tokens between the starts of two windows; by default the window. If it is less, the last so many tokens of a
    window are counted and those before them are context."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-eval to run on local files: lambada, piqa, arc_easy, openbookqa, hellaswag, blimp."""
    data_dir: Path | None = None
    """Folder with the tasks' files, such as piqa.jsonl.xz and blimp.tar.xz."""
    limit: int | None = None
    """First rows to use of each task (for blimp, of each subset); by default all."""
    batch_size: int = 8
    """Windows, or answers of a task, per forward pass."""
    out: Path | None = None
    """JSON file for all numbers; it must not exist yet."""

    def check(self) -> None:
        """Refuse what cannot be done, before anything is read or written."""
        for name in ("max_tokens", "stride", "limit"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, "at least 1", value)
        require(self.window is None or self.window >= 2, "window", "at least 2", self.window)
        require(self.batch_size >= 1, "batch-size", "at least 1", self.batch_size)
        if self.stride is not None and self.window is not None:
            require(self.stride <= self.window, "stride", f"at most the window of {self.window}", self.stride)
        if self.tasks and self.data_dir is None:
            raise UserError(f"--tasks {' '.join(self.tasks)} read local files; name their folder with --data-dir")
        if self.tokenizer is not None and not (self.tasks or self.data):
            raise UserError("--tokenizer is for --data or --tasks; give one of them, or drop --tokenizer")
        for name in ("data_dir", "limit"):
            if not self.tasks and getattr(self, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} is for --tasks; name some")
        for name in ("max_tokens", "stride"):
            if not self.measures_text and getattr(self, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} is for a text; give --data")
        if self.out is not None and self.out.exists():
            raise UserError(f"{self.out} exists already; choose another --out")
        if self.out is not None and not self.out.parent.is_dir():
            raise UserError(f"there is no folder {self.out.parent} for --out; make it, or choose another")

    @property
    def measures_text(self) -> bool:
        """Return whether losses on a text are asked for."""
        return self.data is not None or not self.tasks
