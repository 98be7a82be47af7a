"""The training loss of a widened model is its backbone's own, with all that the backbone's causal LM adds to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import zoo
from vwn import UserError, widen

CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"z_loss_coefficient": 0.1},
    "doge": {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 4},
}


def ids_of() -> Tensor:
    return torch.randint(1, 90, (2, 9), generator=torch.Generator().manual_seed(3))


def outputs_of(model: torch.nn.Module, **options: Any) -> Any:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return model(ids_of(), labels=ids_of(), **options)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", zoo.CAUSAL_TYPES)
def test_it_is_the_plain_models_loss(model_type):
    model = zoo.tiny_causal_lm(model_type, **CHANGES.get(model_type, {})).train()
    coefficient = next((n for n in ("router_aux_loss_coef", "aux_loss_coef") if hasattr(model, n)), None)
    if coefficient is not None:  # large enough to show
        setattr(model, coefficient, 0.7)
        setattr(model.config, coefficient, 0.7)
    try:
        wide = widen(model, m=2, n=3)
    except UserError:
        pytest.skip("refused")
    mask = torch.ones_like(ids_of())
    mask[0, :3] = 0
    for options in ({}, {"output_router_logits": True}, {"output_router_logits": True, "attention_mask": mask}):
        plain, ours = outputs_of(model, **options), outputs_of(wide, **options)
        assert_close(ours.loss, plain.loss, rtol=1e-5, atol=1e-5)
        aux_loss = getattr(plain, "aux_loss", None)
        if aux_loss is not None:
            assert_close(ours.aux_loss, aux_loss, rtol=1e-5, atol=1e-5)
    if coefficient is not None and not model_type.startswith("llama4"):
        assert aux_loss is not None


def test_what_is_added_for_large_logits_shows_and_trains():
    losses = {}
    for weight in (0.0, 0.1):
        wide = widen(zoo.tiny_causal_lm("bamba", z_loss_coefficient=weight), m=2, n=3, num_mtp_modules=1).train()
        torch.manual_seed(0)
        losses[weight] = wide(ids_of(), labels=ids_of())
    assert losses[0.1].losses[0] == losses[0.0].losses[0]
    with torch.no_grad():
        added = 0.1 * wide(ids_of()).logits.exp().sum(-1).log().square().mean()
    head = losses[0.1].losses[0] + added
    assert_close(losses[0.1].loss - wide.config.mtp_loss_weight * losses[0.1].losses[1], head, rtol=1e-5, atol=1e-5)
