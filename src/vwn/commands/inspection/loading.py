"""The checks of a model and the tokens of an inspection."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vwn.common.errors import UserError

DEFAULT_WINDOW = 512


def refuse_plain(source: Path | str) -> None:
    """Refuse a model without an over-width state."""
    from transformers import AutoConfig

    import vwn.hf  # noqa: F401 - registers the Auto classes

    config = AutoConfig.from_pretrained(source)
    if getattr(config, "connection", "residual") == "residual":
        raise UserError(
            f"{source} is a plain model ({config.model_type}): its residual connections have no routing to "
            "inspect; give a checkpoint with a virtual width"
        )


def load_tokens(
    source: Path | str, data: str | None, tokens: int, positions: int | None, tokenizer: str | None = None
) -> tuple[Tensor, str]:
    """Return windows ``[windows, window]`` of a text, spread evenly over it, and the text's name.

    ``data`` and ``tokenizer`` are as in :func:`vwn.commands.evaluation.text.load_text`; ``positions`` is the longest
    window that the model knows, ``None`` for any. The window is the run's.

    Raises:
        UserError: no text, or one of fewer than two tokens, or no longer the text of the run.
    """
    from vwn.commands.evaluation.text import load_text
    from vwn.data.tokenizer import load_checkpoint_tokenizer
    from vwn.training.directory import run_record

    record = run_record(source)
    text = load_text(source, data, record, load_checkpoint_tokenizer(source, tokenizer) if data else None)
    window = record.get("config", {}).get("corpus.window", DEFAULT_WINDOW)
    window = min(window, positions or window, tokens, len(text.tokens))
    windows = text.tokens[: len(text.tokens) // window * window].reshape(-1, window)
    count = min(len(windows), max(1, tokens // window))
    chosen = windows[[i * len(windows) // count for i in range(count)]]
    return torch.from_numpy(chosen.astype(np.int64)), text.name
