"""The trained model to look at, and the tokens to look at it with."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from vwn.common.errors import UserError
from vwn.hf import VirtualWidthForCausalLM

DEFAULT_WINDOW = 512


def load_model(source: Path | str) -> VirtualWidthForCausalLM:
    """A model with virtual width, in evaluation mode, on the GPU if there is one.

    Raises:
        UserError: it cannot be read, or it has no over-width stream to look at.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(source)
        if getattr(config, "connection", "residual") == "residual":
            raise UserError(
                f"{source} is a plain model ({config.model_type}): its residual connections have no routing to look "
                "at; give a checkpoint with a virtual width"
            )
        model = AutoModelForCausalLM.from_pretrained(source).eval()
    except SafetensorError as error:
        raise UserError(f"the weights in {source} are damaged ({error}); take another checkpoint of the run") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def load_tokens(
    source: Path | str, data: str | None, tokens: int, positions: int | None, tokenizer: str | None = None
) -> tuple[Tensor, str]:
    """Return windows of a text, spread evenly over it, and the text's name.

    Args:
        source: the checkpoint, whose run's validation text is taken where ``data`` is not given.
        data: name of a text, see :func:`vwn.data.prepare`; all of it, or its validation side if it has one.
        tokens: as many as the whole windows hold, if the text has them.
        positions: the longest window that the model knows, ``None`` for any.
        tokenizer: its name, by default that in the folder of the checkpoint.

    Returns:
        token ids ``[windows, window]``, the window being the run's.

    Raises:
        UserError: no text, or one of fewer than two tokens, or no longer the text of the run.
    """
    from vwn.data.corpus import prepare, prepare_run
    from vwn.data.packing import PackedWindows
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
        if tokenizer is None and isinstance(source, Path) and not list(source.glob("tokenizer*")):
            raise UserError(f"{source} holds no tokenizer; name one with --tokenizer")
        corpus = prepare(data, valid=data, window=2, tokenizer=tokenizer or str(source))
    if data is None and corpus.fingerprint != run.get("text", "").partition("+")[0]:
        raise UserError(f"the text {name} is not the one that {source} was trained on any more; give --data")
    window = stored.get("corpus.window", DEFAULT_WINDOW)
    window = min(window, positions or window, tokens, corpus.valid_tokens)
    windows = PackedWindows(corpus.valid.path, corpus.valid.dtype, window)
    count = min(len(windows), max(1, tokens // window))
    ids = [windows[i * len(windows) // count]["input_ids"] for i in range(count)]
    return torch.stack(ids), valid or f"{name} (held-out part)"
