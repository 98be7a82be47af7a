"""`generate(use_mtp=True)`: the tokens of plain decoding whatever is accepted, and right drafts after rejections."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache, GPT2Config

import tiny
from conftest import perturb
from runs import run_vwn
from tiny import build, token_ids, vwn_config
from vwn import UserError
from vwn.hf import VirtualWidthConfig, VirtualWidthForCausalLM
from vwn.hf.decoding.mtp import MtpDrafts
from zoo import tiny_config

NEW = 20
ROOT = Path(__file__).parents[2]


generate = partial(tiny.generate, max_new_tokens=NEW)


@torch.no_grad()
def agreeing(config, noise: float = 0.03, seed: int = 0) -> VirtualWidthForCausalLM:
    """A model whose modules often predict what it does itself: each token almost follows from the last one alone."""
    torch.manual_seed(seed)
    model = VirtualWidthForCausalLM(config)
    for name, weight in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            weight.zero_()
        if "fuse" in name:
            width = weight.shape[0]
            weight[:, :width], weight[:, width:] = 0, torch.eye(width)
        if "embed_tokens.table" in name or "lm_head" in name:
            weight.normal_()
    return perturb(model, seed, noise).eval()  # pyright: ignore[reportReturnType]


class Script:
    """In place of a module's own choices: in round after round so many drafts that are right, and wrong ones behind.

    Args:
        wanted: the text that plain decoding gives, ``[1, T]``.
        modules: that draft.
    """

    RIGHT = (0, 2, 1, 3, 0, 0, 1, 2, 3, 3, 1)

    def __init__(self, wanted: Tensor, modules: int) -> None:
        self.wanted, self.modules = wanted[0].tolist(), modules
        self.rounds: list[tuple[int, int, list[Tensor]]] = []  # length, right drafts, the modules' own logits

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        before, _, own = self.rounds[-1] if self.rounds else (0, 0, [])
        if not self.rounds or len(own) == min(self.modules, len(self.wanted) - before - 1):
            right = min(self.RIGHT[len(self.rounds) % len(self.RIGHT)], self.modules)
            self.rounds.append((ids.shape[1], right, []))
        _, right, own = self.rounds[-1]
        own.append(logits)
        token = self.wanted[ids.shape[1]]
        token = token if len(own) <= right else (token + 1) % logits.shape[-1]
        return torch.nn.functional.one_hot(torch.tensor([token]), logits.shape[-1]).float()

    def accepted(self) -> int:
        return sum(min(right, len(own)) for _, right, own in self.rounds)


@pytest.fixture
def scripted(monkeypatch):
    """Have the drafts of the model's next calls follow a script."""

    def install(script: Script) -> list[Tensor]:
        drafted: list[Tensor] = []
        make, draft = MtpDrafts.__init__, MtpDrafts.get_candidates

        def init(self, *args):
            make(self, *args)
            self.logits_processor = script

        def get_candidates(self, *args, **kwargs):
            ids, logits = draft(self, *args, **kwargs)
            if logits is not None:
                drafted.append(ids)
            return ids, logits

        monkeypatch.setattr(MtpDrafts, "__init__", init)
        monkeypatch.setattr(MtpDrafts, "get_candidates", get_candidates)
        return drafted

    return install


CASES = [
    ("llama", 2, 3, 1, 0, {}),
    ("llama", 1, 1, 2, 0, {"connection": "residual", "table_factor": 2}),
    ("qwen3", 2, 3, 3, 2, {"ngram_order": 3, "ngram_buckets": 50, "embedding": "factorised"}),
    ("mixtral", 2, 3, 3, 0, {"backbone": {"sliding_window": 4}}),
]


@pytest.mark.parametrize(("kind", "m", "n", "modules", "padding", "fields"), CASES)
def test_the_tokens_are_those_of_greedy_decoding(scripted, kind, m, n, modules, padding, fields):
    """Whatever is accepted; and each draft is what the modules predict in a pass over the whole text."""
    check_against_greedy(build(vwn_config(kind, m, n, num_mtp_modules=modules, **fields)), scripted, padding)


def test_learned_positions(scripted):
    """They are the backbone's alone: a module has none."""
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}
    backbone = GPT2Config(vocab_size=61, bos_token_id=1, eos_token_id=2, **sizes)
    config = VirtualWidthConfig(backbone=backbone, m=2, n=4, embedding="replicated", num_mtp_modules=2)
    check_against_greedy(build(config), scripted, padding=2)


def check_against_greedy(model, scripted, padding: int) -> None:
    modules = model.config.num_mtp_modules
    ids = torch.cat([torch.zeros(1, padding, dtype=torch.long), token_ids(1, 5 - padding)], dim=1)
    mask = (torch.arange(ids.shape[1]) >= padding).long()[None]
    wanted = generate(model, ids, attention_mask=mask)
    assert torch.equal(generate(model, ids, attention_mask=mask, use_mtp=True), wanted)

    script = Script(wanted, modules)
    drafted = scripted(script)
    out = generate(model, ids, attention_mask=mask, use_mtp=True, return_dict_in_generate=True)
    assert torch.equal(out.sequences, wanted)
    assert out.past_key_values.get_seq_length() == wanted.shape[1] - 1
    assert sum(model.draft_counts.accepted) == script.accepted() > 0
    assert sum(model.draft_counts.drafted) == sum(len(own) for *_, own in script.rounds)
    assert model.draft_counts.new_tokens == NEW
    assert model.draft_counts.forward_passes == NEW - script.accepted() == 1 + len(script.rounds)
    for known, (length, _, own) in zip(drafted, script.rounds, strict=True):
        whole = torch.nn.functional.pad(mask, (0, known.shape[1] - mask.shape[1]), value=1)
        positions = (whole.cumsum(-1) - 1).clamp(min=0)
        further = model(known, attention_mask=whole, position_ids=positions, output_mtp_logits=True).mtp_logits
        for k, logits in enumerate(own):
            assert_close(logits, further[k][:, length - 2], rtol=1e-3, atol=1e-4)


def test_prompts_shorter_than_the_chain_of_modules(scripted):
    model = build(vwn_config("llama", 2, 3, num_mtp_modules=3))
    ids = token_ids(1, 1)
    wanted = generate(model, ids)
    scripted(Script(wanted, 3))
    assert torch.equal(generate(model, ids, use_mtp=True), wanted)


def test_most_drafts_are_accepted_where_the_modules_agree():
    model = agreeing(vwn_config("mixtral", 1, 1, num_mtp_modules=2), noise=0.01)
    ids = token_ids(1, 5)
    assert torch.equal(generate(model, ids, use_mtp=True), generate(model, ids))
    counts = model.draft_counts
    assert 0.5 < counts.acceptance_rate == sum(counts.accepted) / sum(counts.drafted)
    assert counts.tokens_per_pass == NEW / counts.forward_passes > 2


def test_a_call_that_begins_with_a_cache():
    model = agreeing(vwn_config("qwen3", 2, 3, num_mtp_modules=2, ngram_order=2, ngram_buckets=20))
    ids = token_ids(1, 9)

    def cached() -> DynamicCache:
        cache = DynamicCache(config=model.config)
        model(ids[:, :6], past_key_values=cache)
        return cache

    new = ids[:, 6:]
    options = {"preceding_ids": ids[:, :6], "attention_mask": torch.ones_like(ids)}
    wanted = generate(model, new, past_key_values=cached(), **options)
    assert torch.equal(wanted[:, 3:], generate(model, ids)[:, 9:])
    assert torch.equal(generate(model, new, past_key_values=cached(), use_mtp=True, **options), wanted)
    assert sum(model.draft_counts.accepted) > 0


def test_processors_act_on_drafts_and_choices():
    model = agreeing(vwn_config("llama", 2, 3, num_mtp_modules=2))
    ids = token_ids(1, 5)
    for options in ({"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}, {"suppress_tokens": list(range(40))}):
        wanted = generate(model, ids, **options)
        assert not torch.equal(wanted, generate(model, ids))
        assert torch.equal(generate(model, ids, use_mtp=True, **options), wanted)
    assert sum(model.draft_counts.accepted) > 0


def test_it_stops_at_the_end_token_and_at_the_length():
    model = agreeing(vwn_config("mixtral", 1, 1, num_mtp_modules=3), noise=0.01)
    ids = token_ids(1, 5)
    whole = generate(model, ids)
    for length in (1, 3, 6):
        assert torch.equal(generate(model, ids, use_mtp=True, max_new_tokens=length), whole[:, : 5 + length])
    for at in (5, 6, 8):
        end = int(whole[0, at])
        out = generate(model, ids, use_mtp=True, eos_token_id=end)
        assert torch.equal(out, generate(model, ids, eos_token_id=end))
        assert out[0, -1] == end


def test_drafts_are_sampled_from_the_logits_that_are_handed_over(monkeypatch):
    """Speculative sampling is exact for the distribution that the drafts were drawn from: the processed one."""
    model, ids = build(vwn_config("llama", 2, 3, num_mtp_modules=2)), token_ids(1, 5)
    seen: list[tuple[int, Tensor, Tensor]] = []
    draft = MtpDrafts.get_candidates

    def recording(self, input_ids, *args, **kwargs):
        known, logits = draft(self, input_ids, *args, **kwargs)
        if logits is not None:
            seen.append((input_ids.shape[1], known, logits))
        return known, logits

    monkeypatch.setattr(MtpDrafts, "get_candidates", recording)
    generate(model, ids, use_mtp=True, do_sample=True, temperature=3.0, top_k=5, max_new_tokens=12)
    assert len(seen) > 1
    drawn = []
    for length, known, logits in seen:
        further = model(known, output_mtp_logits=True).mtp_logits
        for k in range(logits.shape[1]):
            wanted = further[k][:, length - 2] / 3.0
            wanted = wanted.masked_fill(wanted < wanted.topk(5).values[:, -1:], -torch.inf)
            assert_close(logits[:, k], wanted, rtol=1e-3, atol=1e-4)
            assert logits[0, k, known[0, length + k]] > -torch.inf
            drawn.append(known[0, length + k] != logits[0, k].argmax())
    assert any(drawn)  # not the most likely ones


def test_refusals():
    model, ids = build(vwn_config(num_mtp_modules=1)), token_ids(1, 4)
    without = build(vwn_config())
    for options, expected in (
        ({"num_beams": 2}, "num_beams = 2"),
        ({"assistant_model": without}, "assistant_model"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
    ):
        with pytest.raises(UserError, match=expected):
            generate(model, ids, use_mtp=True, **options)
    with pytest.raises(ValueError, match="batch_size = 1"):
        generate(model, ids.repeat(2, 1), use_mtp=True)
    with pytest.raises(UserError, match="input_ids"):
        generate(model, None, inputs_embeds=model.model.embed_tokens(ids), use_mtp=True)
    with pytest.raises(UserError, match="num_mtp_modules = 0"):
        generate(without, ids, use_mtp=True)
    with pytest.raises(ValueError, match="use_cache"):
        generate(model, ids, use_mtp=True, use_cache=False)
    recorded = {"return_dict_in_generate": True, "output_attentions": True}
    model.set_attn_implementation("sdpa")
    with pytest.raises(UserError, match=r"'sdpa' does not give; call set_attn_implementation\('eager'\)"):
        generate(model, ids, use_mtp=True, **recorded)
    model.set_attn_implementation("eager")
    assert len(generate(model, ids, use_mtp=True, **recorded).attentions) > 0


def test_a_choice_of_keys_that_ties_is_refused():
    """Doge beyond its window: keys of equal tokens tie, and which are kept differs between one pass and several."""
    model = build(VirtualWidthConfig(backbone=tiny_config("doge", keep_window_size=9), m=2, n=3, num_mtp_modules=1))
    ids = token_ids(1, 4)
    assert torch.equal(generate(model, ids, use_mtp=True, max_new_tokens=5), generate(model, ids, max_new_tokens=5))
    with pytest.raises(UserError, match=r"keep_window_size = 9 .* here max_length is 10: ask for fewer tokens"):
        generate(model, ids, use_mtp=True, max_new_tokens=6)


@pytest.fixture
def checkpoints(tmp_path):
    """A run directory's worth of files: a model with MTP modules and one without, over bytes."""
    from vwn.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("bytes")
    folders = {}
    for modules in (0, 2):
        config = vwn_config("llama", 2, 3, {"vocab_size": len(tokenizer)}, num_mtp_modules=modules)
        folders[modules] = tmp_path / str(modules) / "checkpoint-1"
        agreeing(config).save_pretrained(folders[modules])
        tokenizer.save_pretrained(folders[modules])
    return folders


def test_the_command_line(capsys, monkeypatch, checkpoints):
    vwn = partial(run_vwn, capsys, monkeypatch)
    common = ("generate", checkpoints[2], "--prompt", "sea", "--max-new-tokens", "12")
    greedy = vwn(*common, "--temperature", "0")[1]
    code, out, err = vwn(*common, "--mtp")
    assert (code, out) == (0, greedy)
    assert "tokens per forward pass" in err
    found = json.loads(vwn(*common, "--mtp", "--temperature", "0", "--json")[1])
    assert found["text"] + "\n" == greedy
    assert found["new_tokens"] == 12
    assert found["acceptance_rate"] == found["accepted"] / found["drafted"]
    assert found["tokens_per_pass"] == 12 / found["forward_passes"]
    assert found["forward_passes"] == 12 - found["accepted"]
    assert found["seconds"] > 0
    assert found["greedy_seconds"] > 0
    assert found["equals_greedy"] is True
    assert json.loads(vwn(*common, "--temperature", "0", "--json")[1]) == {"text": found["text"]}
    for arguments, expected in (
        ((*common, "--mtp", "--temperature", "0.5"), "temperature 0"),
        (("generate", checkpoints[0], "--prompt", "sea", "--mtp"), "no MTP modules"),
        (("generate", checkpoints[2], "--prompt", "sea", "--mtp", "--max-new-tokens", "0"), "at least 1"),
        (("widen", "nosuch", "out"), "there is no checkpoint at 'nosuch'"),
    ):
        code, _, err = vwn(*arguments)
        assert code == 2
        assert expected in err


def test_paths_that_are_not_there_are_not_asked_of_the_hub(tmp_path, monkeypatch):
    from vwn.training.directory import locate

    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for mistyped in ("models/tiny", "./tiny", "runs/tiny", "~/tiny", "/tiny", "tiny", "a/b/c"):
        with pytest.raises(UserError, match="there is no checkpoint at"):
            locate(mistyped)
    with pytest.raises(UserError, match="holds no model"):
        locate("models")
    assert locate("owner/name") == "owner/name"
    (tmp_path / "models" / "config.json").write_text("{}")
    assert str(locate("models")) == "models"
