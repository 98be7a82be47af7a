"""Text from a trained checkpoint."""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor

from vwn.common.errors import UserError
from vwn.training.config import require
from vwn.training.directory import locate

WARM_UP_TOKENS = 4


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
    require(max_new_tokens >= 1, "max-new-tokens", "at least 1", max_new_tokens)
    require(0 <= temperature < inf, "temperature", "finite and 0 or more", temperature)
    require(0 < top_p <= 1, "top-p", "above 0 and at most 1", top_p)
    require(0 <= seed < 2**63, "seed", "from 0 to 2⁶³ - 1", seed)
    model, tokenizer, ids = _load(checkpoint, prompt)
    torch.manual_seed(seed)
    sampling = dict(do_sample=True, temperature=temperature, top_p=top_p) if temperature else dict(do_sample=False)
    out = model.generate(ids, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.eos_token_id, **sampling)
    return tokenizer.decode(out[0], skip_special_tokens=True)


@dataclass(frozen=True)
class DraftedText:
    """What :func:`generate_with_mtp` returns.

    Args:
        text: the prompt and its continuation.
        new_tokens: of the continuation.
        drafted: tokens that the MTP modules drafted.
        accepted: how many of them the main model kept.
        acceptance_rate: accepted over drafted; None where nothing was drafted.
        forward_passes: of the main model, the prompt's included.
        tokens_per_pass: new tokens per forward pass of the main model; plain decoding has 1.
        seconds: of decoding with the MTP modules, the prompt included.
        greedy_seconds: of plain greedy decoding, right before.
        equals_greedy: whether both gave the same tokens; in low precision, rounding may part them.
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
        """The numbers in one line."""
        rate = "" if self.acceptance_rate is None else f" ({self.acceptance_rate:.1%})"
        parts = (
            f"accepted {self.accepted} of {self.drafted} drafted tokens{rate}",
            f"{self.tokens_per_pass:.2f} tokens per forward pass of the main model",
            f"{self.seconds:.2f} s against {self.greedy_seconds:.2f} s of plain greedy decoding "
            f"({self.greedy_seconds / self.seconds:.2f} times as fast)",
        )
        warning = "" if self.equals_greedy else "; the tokens are not those of plain greedy decoding (rounding)"
        return ", ".join(parts) + warning


def generate_with_mtp(checkpoint: str, prompt: str, max_new_tokens: int = 100) -> DraftedText:
    """The greedy continuation by self-speculative decoding (:mod:`vwn.hf.decoding.mtp`), held against plain decoding.

    Args:
        checkpoint: a run directory, one of its checkpoints, or a hub id; a model with MTP modules.
        prompt: text to continue.
        max_new_tokens: tokens to add.

    Raises:
        UserError: no checkpoint there, a model without MTP modules, an empty prompt, or a number out of range.
    """
    require(max_new_tokens >= 1, "max-new-tokens", "at least 1", max_new_tokens)
    model, tokenizer, ids = _load(checkpoint, prompt)
    if not getattr(model.config, "num_mtp_modules", 0):
        raise UserError(f"{checkpoint} has no MTP modules to draft with; train with --mtp 1, or leave --mtp away")
    options = dict(do_sample=False, pad_token_id=tokenizer.eos_token_id)
    for use_mtp in (False, True):  # what is set up at the first call is on nobody's account
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
    """What ``model.generate`` gives, and its wall-clock seconds."""
    start = time.perf_counter()
    out = model.generate(ids, **options).cpu()  # which waits for the GPU
    return out, time.perf_counter() - start


def _load(checkpoint: str, prompt: str) -> tuple[Any, Any, Tensor]:
    """Model, tokenizer and the prompt's ids ``[1, T]``, on the GPU if there is one."""
    from vwn.data.tokenizer import load_checkpoint_tokenizer
    from vwn.hf.loading import load_model

    source = locate(checkpoint)
    tokenizer = load_checkpoint_tokenizer(source)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    if ids.shape[1] == 0:
        raise UserError("the --prompt is empty; give at least one character")
    model = load_model(source, tokenizer)
    return model, tokenizer, ids.to(model.device)
