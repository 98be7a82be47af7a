"""MTP losses under a trainer that counts the next token's targets alone: a warning where that is not exact."""

from __future__ import annotations

import pytest
import torch

from tiny import build, token_ids, vwn_config


@pytest.mark.parametrize(
    ("modules", "masked", "counted", "warned"),
    [
        (1, True, lambda count: 2 * count, True),
        (1, True, lambda count: count, False),
        (1, False, lambda count: 2 * count, False),
        (1, True, lambda count: torch.stack([2 * count, 2 * count]), False),
    ],
    ids=["batches", "one-batch", "equal-rows", "each-head"],
)
def test_shares_of_the_targets_are_warned_of_once(caplog, modules, masked, counted, warned):
    model = build(vwn_config("llama", 2, 4, num_mtp_modules=modules)).train()
    ids, labels = token_ids(), token_ids().clone()
    if masked:
        labels[0, :3] = -100
    count = (labels[:, 1:] != -100).sum()
    for _ in range(2):
        model(ids, labels=labels, num_items_in_batch=counted(count))
    said = [record.message for record in caplog.records if "MultiTokenTrainerMixin" in record.message]
    assert len(said) == warned
