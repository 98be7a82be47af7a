"""The checkpoint to measure, of ours or any other causal language model, and the record of the run that left it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from vwn.common.errors import UserError


def load_model(source: Path | str) -> Any:
    """A causal language model in evaluation mode, on the GPU if there is one, in the number format it is stored in.

    Raises:
        UserError: its weights are damaged, or not all there.
        OSError: there is none.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as hf_logging

    import vwn.hf  # noqa: F401 - registers the Auto classes

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            source, use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
    except SafetensorError as error:
        raise UserError(f"the weights in {source} are damaged ({error}); take another checkpoint of the run") from error
    if absent := sorted(found["missing_keys"]):
        raise UserError(
            f"{len(absent)} weights of the model are not in {source} ({absent[0]} is one), and would be random; "
            "restore the checkpoint"
        )
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def positions_of(model: Any) -> tuple[int | None, bool]:
    """How many positions a model was made for, None for any; and whether it can compute more (rotary ones)."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    return limit, limit is None or bool(getattr(config, "rope_parameters", None))


def check_positions(model: Any, window: int) -> None:
    """Refuse a window that the model cannot read."""
    limit, can_exceed = positions_of(model)
    if limit is not None and window > limit and not can_exceed:
        raise UserError(f"the model has {limit} positions, --window is {window}; lower --window")
