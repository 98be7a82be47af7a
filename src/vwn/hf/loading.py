"""`load_model`: the model of a checkpoint, for every command that reads one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from vwn.common.errors import UserError


def load_whole(checkpoint: Path | str, dtype: str = "auto") -> Any:
    """Load a causal language model from safetensors; a ``UserError`` if its weights are damaged or not all there."""
    from transformers import AutoModelForCausalLM

    import vwn.hf  # noqa: F401 - registers the Auto classes

    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            checkpoint,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # refused below, by name
        )
    except SafetensorError as error:
        raise UserError(f"the weights in {checkpoint} are damaged ({error}); use another checkpoint") from error
    if absent := sorted([*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])]):
        raise UserError(
            f"{len(absent)} weights of the model are not in {checkpoint}, or of another shape, and would be random "
            f"({absent[0]} is one); restore the checkpoint"
        )
    return model


def load_model(checkpoint: Path | str, tokenizer: Any = None) -> Any:
    """Load a causal language model in evaluation mode, on the GPU if there is one, in the dtype it is stored in.

    Args:
        checkpoint: a folder or a hub id; with virtual width or without.
        tokenizer: the loaded tokenizer that it will be used with, see :func:`vwn.data.load_checkpoint_tokenizer`.

    Raises:
        UserError: its weights are damaged or not all there, or the tokenizer has ids that the model does not know.
    """
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    model = load_whole(checkpoint)
    if tokenizer is not None:
        _check_tokenizer(model, tokenizer, checkpoint)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def positions_of(model: Any) -> tuple[int | None, bool]:
    """Return the positions a model was made for, None for any; and whether it can compute more (rotary ones)."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    return limit, limit is None or bool(getattr(config, "rope_parameters", None))


def check_positions(model: Any, window: int) -> None:
    """Refuse a window that the model cannot read."""
    limit, can_exceed = positions_of(model)
    if limit is not None and window > limit and not can_exceed:
        raise UserError(f"the model has {limit} positions, --window is {window}; lower --window")


def _check_tokenizer(model: Any, tokenizer: Any, checkpoint: Path | str) -> None:
    largest, vocabulary = max(tokenizer.get_vocab().values()), model.config.get_text_config().vocab_size
    if largest >= vocabulary:
        raise UserError(
            f"the tokenizer has ids up to {largest}, the model in {checkpoint} knows {vocabulary} tokens; name the one "
            "it was trained with (--tokenizer)"
        )
