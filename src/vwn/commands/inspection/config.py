"""The options of `vwn inspect`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vwn.common.errors import UserError, require


@dataclass(frozen=True)
class InspectConfig:
    """Look inside a trained model."""

    checkpoint: str
    """A run directory, one of its checkpoints, or a hub id."""
    out: Path
    """Directory for numbers and figures; it must be new or empty."""
    data: str | None = None
    """Text to run the model on, as in `vwn train`; by default the validation text of the run."""
    tokens: int = 2048
    """Tokens to run it on, in windows spread evenly over the text."""
    tokenizer: str | None = None
    """Tokenizer of --data, where the checkpoint's folder has none: bytes, a folder, or a hub id."""

    def check(self) -> None:
        """Refuse what cannot be done, before anything is read or written."""
        if self.tokenizer is not None and self.data is None:
            raise UserError(f"--tokenizer {self.tokenizer} is for --data; give a text")
        require(self.tokens >= 2, "tokens", "at least 2", self.tokens)
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise UserError(f"{self.out} exists already; choose another --out")
