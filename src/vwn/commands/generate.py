"""Text from a trained checkpoint."""

from __future__ import annotations

import time
from math import inf
from typing import Any

import torch
from torch import Tensor

from vwn.common.errors import UserError, require
from vwn.data import load_checkpoint_tokenizer
from vwn.hf.loading import load_model
from vwn.training.directory import locate

WARM_UP_TOKENS = 4


def load(checkpoint: str, tokenizer: str | None = None) -> tuple[Any, Any]:
    """Load a model, on the GPU if there is one, and its tokenizer or, where its folder has none, the one named.

    Raises:
        UserError: there is no checkpoint or no tokenizer.
    """
    source = locate(checkpoint)
    loaded = load_checkpoint_tokenizer(source, tokenizer)
    return load_model(source, loaded), loaded


def continuation(
    model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, temperature: float, top_p: float, seed: int
) -> str:
    """Return the prompt with its continuation by sampling; at temperature 0 the likeliest token is taken each time.

    Raises:
        UserError: an empty prompt, or a number out of range.
    """
    require(max_new_tokens >= 1, "max-new-tokens", "at least 1", max_new_tokens)
    require(0 <= temperature < inf, "temperature", "finite and 0 or more", temperature)
    require(0 < top_p <= 1, "top-p", "above 0 and at most 1", top_p)
    require(0 <= seed < 2**63, "seed", "from 0 to 2⁶³ - 1", seed)
    ids = _encode(model, tokenizer, prompt)
    torch.manual_seed(seed)
    sampling = dict(do_sample=True, temperature=temperature, top_p=top_p) if temperature else dict(do_sample=False)
    out = model.generate(ids, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.eos_token_id, **sampling)
    return tokenizer.decode(out[0], skip_special_tokens=True)


def continue_with_mtp(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> dict[str, Any]:
    """Decode greedily with drafts of the MTP modules (:mod:`vwn.hf.decoding.mtp`), and compare with plain decoding.

    Returns:
        ``text``, the prompt and its continuation; ``new_tokens``; of the MTP modules ``drafted``, ``accepted`` and
        ``acceptance_rate`` (None where nothing was drafted); of the main model ``forward_passes``, the prompt's
        included, and ``tokens_per_pass``, which is 1 in plain decoding; ``seconds`` with the MTP modules, and
        ``greedy_seconds`` of plain greedy decoding right before; ``equals_greedy``, whether both gave the same tokens,
        which rounding can prevent in low precision.

    Raises:
        UserError: a model without MTP modules, an empty prompt, or a number out of range.
    """
    require(max_new_tokens >= 1, "max-new-tokens", "at least 1", max_new_tokens)
    if not getattr(model.config, "num_mtp_modules", 0):
        raise UserError("the model has no MTP modules to draft with; train with --mtp 1, or drop --mtp")
    ids = _encode(model, tokenizer, prompt)
    options = dict(do_sample=False, pad_token_id=tokenizer.eos_token_id)
    for use_mtp in (False, True):  # the first call of each sets things up, which is not timed
        model.generate(ids, max_new_tokens=WARM_UP_TOKENS, use_mtp=use_mtp, **options)
    greedy, greedy_seconds = timed(model, ids, max_new_tokens=max_new_tokens, **options)
    drafted, seconds = timed(model, ids, max_new_tokens=max_new_tokens, use_mtp=True, **options)
    counts = model.draft_counts
    return {
        "text": tokenizer.decode(drafted[0], skip_special_tokens=True),
        "new_tokens": counts.new_tokens,
        "drafted": sum(counts.drafted),
        "accepted": sum(counts.accepted),
        "acceptance_rate": counts.acceptance_rate,
        "forward_passes": counts.forward_passes,
        "tokens_per_pass": counts.tokens_per_pass,
        "seconds": seconds,
        "greedy_seconds": greedy_seconds,
        "equals_greedy": torch.equal(greedy, drafted),
    }


def drafting_line(result: dict[str, Any]) -> str:
    """Say in one line how well :func:`continue_with_mtp` went."""
    rate = "" if result["acceptance_rate"] is None else f" ({result['acceptance_rate']:.1%})"
    seconds, greedy = result["seconds"], result["greedy_seconds"]
    return (
        f"accepted {result['accepted']} of {result['drafted']} drafted tokens{rate}, {result['tokens_per_pass']:.2f} "
        f"tokens per forward pass of the main model, {seconds:.2f} s against {greedy:.2f} s of plain greedy decoding "
        f"({greedy / seconds:.2f} times as fast)"
    ) + ("" if result["equals_greedy"] else "; the tokens are not those of plain greedy decoding (rounding)")


def timed(model: Any, ids: Tensor, **options: Any) -> tuple[Tensor, float]:
    """Run ``model.generate``; return its tokens and the wall-clock seconds."""
    start = time.perf_counter()
    out = model.generate(ids, **options).cpu()  # which waits for the GPU
    return out, time.perf_counter() - start


def _encode(model: Any, tokenizer: Any, prompt: str) -> Tensor:
    """Return the prompt's token ids, ``[1, T]``, on the model's device."""
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    if ids.shape[1] == 0:
        raise UserError("the --prompt is empty; give at least one character")
    return ids.to(model.device)
