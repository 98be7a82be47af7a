"""`generate()`: greedy, sampling, beams, batches with padding, caches, against hand-made loops and the stock model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tiny import BACKBONES, build, token_ids, vwn_config

KINDS = pytest.mark.parametrize("kind", BACKBONES)
NEW = 6


def generate(model, ids: Tensor, **options) -> Tensor:
    """Without an end token, so that all rows get the same number of new tokens."""
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    return model.generate(ids, **options)


def greedy_by_hand(model, ids: Tensor) -> Tensor:
    for _ in range(NEW):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@KINDS
def test_greedy_equals_a_loop_without_cache(kind):
    model = build(vwn_config(kind, 2, 3), seed=2)
    ids = token_ids(2, 5)
    wanted = greedy_by_hand(model, ids)
    assert torch.equal(generate(model, ids), wanted)
    assert torch.equal(generate(model, ids, use_cache=False), wanted)
    assert len(set(wanted[0, 5:].tolist())) > 1


def test_multi_token_modules_do_not_disturb_generation():
    with_mtp = build(vwn_config("llama", 2, 3, num_mtp_modules=2))
    without = build(vwn_config("llama", 2, 3))
    without.load_state_dict({k: v for k, v in with_mtp.state_dict().items() if ".mtp." not in k})
    assert torch.equal(generate(with_mtp, token_ids()), generate(without, token_ids()))


def test_seeded_sampling_is_the_same_with_and_without_cache():
    model = build(vwn_config("mixtral"))
    ids = token_ids(2, 5)
    runs = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        runs.append(generate(model, ids, do_sample=True, top_k=20, temperature=0.9, use_cache=use_cache))
    torch.manual_seed(4)
    other = generate(model, ids, do_sample=True, top_k=20, temperature=0.9)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], other)


def test_beam_search_is_the_same_with_and_without_cache():
    """Beams reorder the cache."""
    model = build(vwn_config("llama", 2, 4))
    ids = token_ids(2, 5)
    wanted = generate(model, ids, num_beams=3, use_cache=False)
    assert torch.equal(generate(model, ids, num_beams=3), wanted)


@pytest.mark.parametrize(("kind", "options"), [("llama", {}), ("mixtral", {"num_beams": 2})])
def test_a_left_padded_batch_generates_what_each_prompt_does_alone(kind, options):
    model = build(vwn_config(kind, 2, 3))
    long, short = token_ids(1, 7), token_ids(1, 4, seed=1)
    batch = torch.cat([long, torch.cat([torch.zeros(1, 3, dtype=torch.long), short], dim=1)])
    mask = torch.ones_like(batch)
    mask[1, :3] = 0
    together = generate(model, batch, attention_mask=mask, **options)
    assert torch.equal(together[:1, 7:], generate(model, long, **options)[:, 7:])
    assert torch.equal(together[1:, 7:], generate(model, short, **options)[:, 4:])


def test_a_static_cache_changes_nothing():
    model = build(vwn_config("mixtral", 2, 4))
    ids = token_ids(2, 5)
    assert torch.equal(generate(model, ids, cache_implementation="static"), generate(model, ids))


def test_assisted_and_prompt_lookup_decoding_equal_greedy():
    """Both crop the cache and hidden states, which a state of other rank would break."""
    model, assistant = build(vwn_config("llama", 2, 4)), build(vwn_config("llama", 1, 2), seed=1)
    ids = token_ids(1, 4).repeat(1, 2)
    wanted = generate(model, ids)
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=2), wanted)
    assert torch.equal(generate(model, ids, assistant_model=assistant), wanted)


def test_generation_stops_at_the_backbones_end_token():
    model = build(vwn_config("llama", 2, 4))
    ids = token_ids(1, 5)
    end = int(generate(model, ids)[0, 5 + 2])
    config = vwn_config("llama", 2, 4, {"eos_token_id": end})
    again = build(config)
    assert again.generation_config.eos_token_id == end
    out = again.generate(ids, max_new_tokens=NEW, do_sample=False)
    assert out[0, -1] == end
    assert end not in out[0, 5:-1].tolist()
    assert out.shape[1] <= 5 + 3


def test_outputs_of_generation():
    model = build(vwn_config("llama", 2, 4, attn_implementation="eager"))
    ids = token_ids(2, 5)
    out = generate(
        model, ids, return_dict_in_generate=True, output_hidden_states=True, output_attentions=True, output_logits=True
    )
    assert len(out.hidden_states) == len(out.attentions) == NEW
    assert out.hidden_states[0][0].shape == (2, 5, 24)
    assert out.hidden_states[1][-1].shape == (2, 1, 24)
    assert out.attentions[1][0].shape == (2, 4, 1, 6)
    wanted = model(out.sequences).logits[:, 4:-1]
    assert_close(torch.stack(out.logits, dim=1), wanted, rtol=1e-4, atol=1e-4)
