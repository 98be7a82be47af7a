"""Text from a trained checkpoint."""

from __future__ import annotations

from math import inf
from pathlib import Path

import torch
from safetensors import SafetensorError

from vwn.errors import UserError
from vwn.training.config import require


def generate(
    checkpoint: str,
    prompt: str,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> str:
    """The prompt and its continuation.

    Args:
        checkpoint: a run directory, one of its checkpoints, or a hub id.
        prompt: text to continue.
        max_new_tokens: tokens to add.
        temperature: of the sampling; 0 takes the likeliest token each time.
        top_p: nucleus sampling, the smallest set of tokens with this probability.
        seed: of the sampling.

    Raises:
        UserError: no checkpoint there, an empty prompt, or a number out of range.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as hf_logging

    import vwn.hf  # noqa: F401 - registers the Auto classes

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    path = Path(checkpoint)
    if path.is_dir() and not (path / "config.json").exists():
        from vwn.training.directory import last_checkpoint

        path = last_checkpoint(path) or path
    if not path.exists() and checkpoint.count("/") != 1:
        raise UserError(f"there is no checkpoint at {checkpoint!r}; give a run directory or a hub id owner/name")
    if path.exists() and not (path / "config.json").exists():
        raise UserError(
            f"{path} holds no model (no config.json); give the --out of a training run or a checkpoint-N in it"
        )
    require(max_new_tokens >= 1, "max-new-tokens", "at least 1", max_new_tokens)
    require(0 <= temperature < inf, "temperature", "finite and 0 or more", temperature)
    require(0 < top_p <= 1, "top-p", "above 0 and at most 1", top_p)
    require(0 <= seed < 2**63, "seed", "from 0 to 2⁶³ - 1", seed)
    source = path if path.exists() else checkpoint
    tokenizer = AutoTokenizer.from_pretrained(source)
    try:
        model = AutoModelForCausalLM.from_pretrained(source).eval()
    except SafetensorError as error:
        raise UserError(f"the weights in {source} are damaged ({error}); take another checkpoint of the run") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    if ids.shape[1] == 0:
        raise UserError("the --prompt is empty; give at least one character")
    torch.manual_seed(seed)
    sampling = dict(do_sample=True, temperature=temperature, top_p=top_p) if temperature else dict(do_sample=False)
    out = model.to(device).generate(
        ids.to(device), max_new_tokens=max_new_tokens, pad_token_id=tokenizer.eos_token_id, **sampling
    )
    return tokenizer.decode(out[0], skip_special_tokens=True)
