"""The model that can be looked at, and the tokens to look at it with."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vwn.common.errors import UserError

DEFAULT_WINDOW = 512


def refuse_plain(source: Path | str) -> None:
    """Refuse a model without an over-width state to look at."""
    from transformers import AutoConfig

    import vwn.hf  # noqa: F401 - registers the Auto classes

    config = AutoConfig.from_pretrained(source)
    if getattr(config, "connection", "residual") == "residual":
        raise UserError(
            f"{source} is a plain model ({config.model_type}): its residual connections have no routing to look "
            "at; give a checkpoint with a virtual width"
        )


def load_tokens(
    source: Path | str, data: str | None, tokens: int, positions: int | None, tokenizer: str | None = None
) -> tuple[Tensor, str]:
    """Windows of a text, spread evenly over it, and the text's name.

    Args:
        source: the checkpoint, whose run's validation text is taken where ``data`` is not given.
        data: name of a text, see :func:`vwn.data.prepare`; all of it, or its validation side if it has one.
        tokens: as many as the whole windows hold, if the text has them.
        positions: the longest window that the model knows, ``None`` for any.
        tokenizer: name of the tokenizer for ``data``; by default the checkpoint's own.

    Returns:
        token ids ``[windows, window]``, the window being the run's.

    Raises:
        UserError: no text, or one of fewer than two tokens, or no longer the text of the run.
    """
    from vwn.data.corpus import prepare_run, prepare_valid
    from vwn.data.packing import PackedWindows
    from vwn.data.tokenizer import load_checkpoint_tokenizer
    from vwn.training.directory import run_record

    run = run_record(source)
    stored = run.get("config", {})
    if data is None:
        if "corpus.data" not in stored:
            raise UserError(f"{source} does not say what text it was trained on (it has no run.json); give --data")
        name, valid = stored["corpus.data"], stored["corpus.valid"]
        corpus = prepare_run(stored, window=2)
    else:
        name = valid = data
        corpus = prepare_valid(data, tokenizer=load_checkpoint_tokenizer(source, tokenizer), window=2)
    if data is None and corpus.fingerprint != run.get("text", "").partition("+")[0]:
        raise UserError(f"the text {name} is not the one that {source} was trained on any more; give --data")
    window = stored.get("corpus.window", DEFAULT_WINDOW)
    window = min(window, positions or window, tokens, corpus.valid_tokens)
    windows = PackedWindows(corpus.valid.path, corpus.valid.dtype, window)
    count = min(len(windows), max(1, tokens // window))
    ids = [windows[i * len(windows) // count]["input_ids"] for i in range(count)]
    return torch.stack(ids), valid or f"{name} (held-out part)"
