"""``generate()`` of a widened model gives its plain model's tokens: greedy, padded batches, beams, caches, drafts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from vwn import UserError, widen

NEW = 4
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "beams": {"num_beams": 2},
    "fixed cache": {"cache_implementation": "static", "disable_compile": True},
    "drafts": {"prompt_lookup_num_tokens": 2},
}


def prompt_of(rows: int) -> Tensor:
    ids = torch.randint(3, 90, (rows, 7), generator=torch.Generator().manual_seed(3))
    ids[:, 4:] = ids[:, 1:4]  # repeats itself, so that a look-up in the prompt finds drafts
    return ids


def generated(model: Any, ids: Tensor, **options: Any) -> Tensor | str:
    """The new tokens, or the kind of error."""
    common = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    try:
        return model.generate(ids, **common | options)[:, ids.shape[1] :]
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", zoo.CAUSAL_TYPES)
def test_the_tokens_are_the_plain_models(model_type):
    model = zoo.tiny_causal_lm(model_type)
    try:
        wide = widen(model, m=2, n=3)
    except UserError:
        pytest.skip("refused")
    mask = torch.ones_like(prompt_of(2))
    mask[0, :3] = 0
    runs = [(name, prompt_of(1), options) for name, options in WAYS.items()]
    runs.append(("padded", prompt_of(2), {"attention_mask": mask}))
    runs.append(("padded beams", prompt_of(2), {"attention_mask": mask, "num_beams": 2}))
    failed = []
    for name, ids, options in runs:
        plain, ours = generated(model, ids, **options), generated(wide, ids, **options)
        if isinstance(plain, str):
            failed.append(f"{name}: {plain}")  # what transformers cannot do, it need not do for us
        else:
            assert isinstance(ours, Tensor), f"{name}: {ours}"
            assert torch.equal(ours, plain), name
    assert not any(line.startswith(("greedy", "padded:")) for line in failed), failed
