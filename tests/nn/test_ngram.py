"""Hashed n-gram embeddings: the hash, the sum against Python integers, and models that have them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import reference
from conftest import perturb
from tiny import build, generate, greedy_by_hand, token_ids, vwn_config
from vwn import Geometry, OverWidthEmbedding
from vwn.common.errors import UserError
from vwn.hf import VirtualWidthForCausalLM
from vwn.nn.ngram import NO_TOKEN, NgramEmbedding, hash_ngrams, with_context

GOLDEN = [[[910060, 916760], [253507, 605688], [378809, 782473], [956610, 858037]]]
FORMS = pytest.mark.parametrize("form", ["direct", "factorised", "replicated"])
NGRAMS = {"ngram_order": 3, "ngram_buckets": 37}


# An independent computation: Python's integers, one position at a time


def mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def bucket(gram: list[int], buckets: int) -> int:
    """Of one n-gram, oldest id first, -1 for none."""
    state = 0
    for token in reversed(gram):
        state = mix(state ^ token % 2**64)
    return state % 2**63 % buckets


def looked_up(ids: list[int], weight: Tensor, order: int, buckets: int) -> Tensor:
    """Sum of the rows of all orders, ``[S, width]``."""
    ids = [NO_TOKEN] * (order - 1) + ids
    sums = []
    for t in range(order - 1, len(ids)):
        rows = [(k - 2) * buckets + bucket(ids[t - k + 1 : t + 1], buckets) for k in range(2, order + 1)]
        sums.append(torch.stack([weight[r] for r in rows]).sum(0))
    return torch.stack(sums)


@pytest.mark.parametrize(("order", "buckets"), [(2, 5), (3, 1), (4, 1009)])
@FORMS
def test_the_embedding_is_the_tables_row_and_the_hashed_rows_expanded(form, order, buckets):
    geometry = Geometry(6, 3, 7)
    embedding = perturb(OverWidthEmbedding(geometry, 61, form, ngram_order=order, ngram_buckets=buckets))
    width = geometry.over_width if form == "direct" else geometry.hidden_size
    assert embedding.ngram.weight.shape == ((order - 1) * buckets, width)
    copies = {k: p.detach().double().requires_grad_() for k, p in embedding.named_parameters()}
    ids = token_ids(3, 7)
    rows = torch.stack([looked_up(r, copies["ngram.weight"], order, buckets) for r in ids.tolist()])
    rows = copies["table.weight"][ids] + rows
    if form == "factorised":
        wanted = rows @ copies["expand_weight"].T
    else:
        wanted = reference.replicate(rows, geometry.m, geometry.n) if form == "replicated" else rows
    out = embedding(ids)
    assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    direction = torch.randn(out.shape, dtype=torch.float64)
    (out * direction.float()).sum().backward()
    (wanted * direction).sum().backward()
    for name, parameter in embedding.named_parameters():
        assert_close(parameter.grad.double(), copies[name].grad, rtol=1e-4, atol=1e-4)
    assert embedding.ngram.weight.grad.any()


# The hash


def test_the_hash_is_what_it_was():
    """A trained table is worth nothing under another hash."""
    ids = torch.tensor([[NO_TOKEN, NO_TOKEN, 0, 1, 50256, 2**31 - 1]])
    assert hash_ngrams(ids, 3, 1_000_003).tolist() == GOLDEN
    assert hash_ngrams(ids.int(), 3, 1_000_003).tolist() == GOLDEN


def test_the_hash_does_not_depend_on_the_batch():
    ids = token_ids(4, 11)
    together = hash_ngrams(ids, 4, 1009)
    for row in range(4):
        assert torch.equal(hash_ngrams(ids[row], 4, 1009), together[row])
    assert torch.equal(hash_ngrams(ids[:, 3:], 4, 1009), together[:, 3:])
    assert hash_ngrams(ids[:, :3], 4, 1009).shape == (4, 0, 3)
    assert hash_ngrams(ids.view(2, 2, 11), 4, 1009).shape == (2, 2, 8, 3)
    assert torch.equal(hash_ngrams(ids, 4, 1009, torch.full((4, 8), 7)), together)  # one document, whatever its number


# Context and padding


def test_an_id_reaches_its_own_position_and_the_next_ones_only():
    embedding = perturb(NgramEmbedding(3, 1009, 4))
    ids = token_ids(1, 9)
    other = ids.clone()
    other[0, 4] += 1
    assert (embedding(ids) != embedding(other)).any(-1)[0].tolist() == [t in (4, 5, 6) for t in range(9)]


def test_context_is_what_precedes():
    ids = token_ids(2, 6)
    assert with_context(ids, 3)[:, :2].unique().tolist() == [NO_TOKEN]
    assert torch.equal(with_context(ids[:, 2:], 3, ids[:, :2]), ids)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    padded = with_context(ids[:, 2:], 3, ids[:, :2], mask)
    assert padded[0].tolist() == [-1, -1, *ids[0, 2:].tolist()]
    assert torch.equal(padded[1], ids[1])
    assert torch.equal(with_context(ids[:, 2:], 3, ids[:, :2], mask[:, 3:]), ids)  # columns of the last ids
    longer = torch.cat([torch.zeros(2, 5, dtype=torch.long), mask], dim=1)
    assert torch.equal(with_context(ids[:, 2:], 3, ids[:, :2], longer), padded)
    for wrong in (ids[:, :1], ids[:1, :2], ids[:, :3]):
        with pytest.raises(ValueError, match=r"last 2 ids before input_ids, of shape \(2, 2\)"):
            with_context(ids[:, 2:], 3, wrong)


# Models


def ngram_model(form: str = "direct", m: int = 2, n: int = 4, **fields) -> VirtualWidthForCausalLM:
    return build(vwn_config("llama", m, n, embedding=form, **NGRAMS | fields))


@FORMS
def test_a_model_starts_as_without_ngrams_and_learns_them(form):
    torch.manual_seed(0)
    plain = perturb(VirtualWidthForCausalLM(vwn_config(embedding=form)))
    model = VirtualWidthForCausalLM(vwn_config(embedding=form, **NGRAMS))
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert (missing, unexpected) == (["model.embed_tokens.ngram.weight"], [])
    ids = token_ids()
    assert torch.equal(model(ids).logits, plain(ids).logits)
    model(ids, labels=ids).loss.backward()
    grad = model.model.embed_tokens.ngram.weight.grad
    used = (hash_ngrams(with_context(ids[:, :-1], 3), 3, 37) + torch.tensor([0, 37])).flatten().unique()
    assert grad[used].abs().amax(-1).min() > 0
    assert grad.abs().amax(-1).count_nonzero() == len(used)


@pytest.mark.parametrize(
    ("form", "length", "options"),  # a prompt may be shorter than the n-grams
    [("direct", 5, {"cache_implementation": "static"}), ("factorised", 1, {}), ("replicated", 2, {})],
)
def test_greedy_equals_a_loop_over_full_passes(form, length, options):
    model = ngram_model(form, ngram_order=4)
    ids = token_ids(2, length)
    wanted = greedy_by_hand(model, ids)
    assert torch.equal(generate(model, ids, **options), wanted)
    model.model.embed_tokens.ngram.weight.data.zero_()
    assert not torch.equal(generate(model, ids, **options), wanted)


def test_a_filled_cache_without_the_ids_before_is_refused():
    model, ids = ngram_model(), token_ids()
    cache = model(ids[:, :5], use_cache=True).past_key_values
    with pytest.raises(UserError, match=r"the cache holds 5 tokens, .* last 2 of them .* preceding_ids"):
        model(ids[:, 5:], past_key_values=cache)


def test_beam_search_is_the_same_with_and_without_cache():
    model, ids = ngram_model(), token_ids(2, 5)
    model.lm_head.weight.data *= 0.1  # so that beams overtake each other
    wanted = generate(model, ids, num_beams=3, use_cache=False)
    assert torch.equal(generate(model, ids, num_beams=3), wanted)
    assert not torch.equal(wanted, generate(model, ids))


def left_padded() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    long, short = token_ids(1, 7), token_ids(1, 4, seed=1)
    batch = torch.cat([long, torch.cat([torch.full((1, 3), 5), short], dim=1)])  # 5 is a token like any other
    mask = torch.ones_like(batch)
    mask[1, :3] = 0
    return long, short, batch, mask


def test_left_padding_changes_no_logits():
    model = ngram_model(num_mtp_modules=1)
    long, short, batch, mask = left_padded()
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    out = model(batch, attention_mask=mask, position_ids=position_ids, output_mtp_logits=True)
    for row, alone in ((0, long), (1, short)):
        wanted = model(alone, output_mtp_logits=True)
        start = 7 - alone.shape[1]
        assert_close(out.logits[row, start:], wanted.logits[0], rtol=1e-4, atol=1e-4)
        assert_close(out.mtp_logits[0][row, start:-1], wanted.mtp_logits[0][0, :-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_a_left_padded_batch_generates_what_each_prompt_does_alone(options):
    model = ngram_model()
    long, short, batch, mask = left_padded()
    together = generate(model, batch, attention_mask=mask, **options)
    assert torch.equal(together[:1, 7:], generate(model, long, **options)[:, 7:])
    assert torch.equal(together[1:, 7:], generate(model, short, **options)[:, 4:])


def test_going_on_from_a_cache():
    model, ids = ngram_model(), token_ids(2, 8)
    wanted = generate(model, ids)

    def cache():
        return model(ids[:, :5], use_cache=True).past_key_values

    assert torch.equal(generate(model, ids, past_key_values=cache()), wanted)
    mask = torch.ones_like(ids)
    new = generate(model, ids[:, 5:], past_key_values=cache(), attention_mask=mask, preceding_ids=ids[:, 3:5])
    assert torch.equal(new, wanted[:, 5:])
    with pytest.raises(UserError, match="holds 5 tokens whose ids"):
        generate(model, ids[:, 5:], past_key_values=cache(), attention_mask=mask)
    with pytest.raises(UserError, match="no prefill_chunk_size"):
        generate(model, ids, prefill_chunk_size=4)


def test_assisted_and_prompt_lookup_decoding_equal_greedy():
    model, assistant = ngram_model(), build(vwn_config("llama", 1, 2, **NGRAMS), seed=1)
    ids = token_ids(1, 4).repeat(1, 2)
    wanted = generate(model, ids)
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=2), wanted)
    assert torch.equal(generate(model, ids, assistant_model=assistant), wanted)


def test_multi_token_modules_see_the_ngram_of_the_token_ahead_and_nothing_later():
    model, ids = ngram_model(num_mtp_modules=2), token_ids(1, 9)
    other = ids.clone()
    other[0, 5] = (other[0, 5] + 1) % 50 + 3
    one, two = (model(x, output_mtp_logits=True) for x in (ids, other))
    assert torch.equal(one.logits[:, :5], two.logits[:, :5])
    for k, (a, b) in enumerate(zip(one.mtp_logits, two.mtp_logits, strict=True), start=1):
        assert_close(a[:, : 5 - k], b[:, : 5 - k], rtol=0, atol=0)
        assert not torch.allclose(a[:, 5 - k], b[:, 5 - k])
    model(ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.ngram.weight.grad.any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ngram_order": 0}, r"ngram_order must be 1 \(no n-grams\) or more, got 0"),
        ({"ngram_order": 3}, r"ngram_order = 3 needs ngram_buckets.*got 0"),
        ({"ngram_order": 2, "ngram_buckets": -1}, r"needs ngram_buckets.*got -1"),
        ({"ngram_buckets": 9}, r"ngram_buckets = 9 needs ngram_order = 2 or more"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        vwn_config(**fields)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):
        OverWidthEmbedding(Geometry(6, 2, 3), 11, **fields)
