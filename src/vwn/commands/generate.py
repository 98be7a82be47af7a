"""Text from a trained checkpoint."""

from __future__ import annotations

import time
from dataclasses import dataclass
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


@dataclass(frozen=True)
class DraftedText:
    """A prompt continued with drafts of the MTP modules, and how well that went.

    Args:
        text: the prompt and its continuation.
        new_tokens: number of tokens in the continuation.
        drafted: number of tokens that the MTP modules drafted.
        accepted: number of drafted tokens that the main model kept.
        acceptance_rate: accepted over drafted; None where nothing was drafted.
        forward_passes: forward passes of the main model, the prompt's included.
        tokens_per_pass: new tokens per forward pass of the main model; plain decoding has 1.
        seconds: time of decoding with the MTP modules, the prompt included.
        greedy_seconds: time of plain greedy decoding, right before.
        equals_greedy: whether both gave the same tokens; in low precision, rounding can make them differ.
    """

    text: str
    new_tokens: int
    drafted: int
    accepted: int
    acceptance_rate: float | None
    forward_passes: int
    tokens_per_pass: float
    seconds: float
    greedy_seconds: float
    equals_greedy: bool

    def summary(self) -> str:
        """Return the numbers in one line."""
        rate = "" if self.acceptance_rate is None else f" ({self.acceptance_rate:.1%})"
        parts = (
            f"accepted {self.accepted} of {self.drafted} drafted tokens{rate}",
            f"{self.tokens_per_pass:.2f} tokens per forward pass of the main model",
            f"{self.seconds:.2f} s against {self.greedy_seconds:.2f} s of plain greedy decoding "
            f"({self.greedy_seconds / self.seconds:.2f} times as fast)",
        )
        warning = "" if self.equals_greedy else "; the tokens are not those of plain greedy decoding (rounding)"
        return ", ".join(parts) + warning


def continue_with_mtp(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> DraftedText:
    """Decode greedily with drafts of the MTP modules (:mod:`vwn.hf.decoding.mtp`), and compare with plain decoding.

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
    return DraftedText(
        text=tokenizer.decode(drafted[0], skip_special_tokens=True),
        new_tokens=counts.new_tokens,
        drafted=sum(counts.drafted),
        accepted=sum(counts.accepted),
        acceptance_rate=counts.acceptance_rate,
        forward_passes=counts.forward_passes,
        tokens_per_pass=counts.tokens_per_pass,
        seconds=seconds,
        greedy_seconds=greedy_seconds,
        equals_greedy=torch.equal(greedy, drafted),
    )


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
