"""`vwn eval` on a text: the training run's own losses, sums by hand, exact bytes, sliding windows, refusals."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from texts import DOCUMENTS
from tiny import build, stock, vwn_config
from vwn.cli import main
from vwn.commands.evaluation.config import EvalConfig
from vwn.commands.evaluation.run import evaluate_checkpoint
from vwn.commands.evaluation.text import EvaluationText, byte_lengths, load_text, measure_text
from vwn.common.errors import UserError
from vwn.data import load_tokenizer, prepare
from vwn.data.reading import SEPARATOR
from vwn.hf.loading import load_model

BYTES = load_tokenizer("bytes")


def text_of(tokens, tokenizer=BYTES, size=None, name="some text") -> EvaluationText:
    tokens = np.asarray(tokens)
    size = int(byte_lengths(tokenizer)[tokens].sum()) if size is None else size
    return EvaluationText(name, tokens, size, tokenizer, None)


def some_tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 257, count)


def saved_stock(folder, tokenizer=BYTES, **fields):
    """A plain llama and its tokenizer in a folder."""
    model = stock(vocab_size=len(tokenizer), **fields)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@torch.no_grad()
def by_hand(model, tokens, window, stride, head=0):
    """Losses of a head, one forward pass per target: ``{position: nats}``; a position counted twice is a failure."""
    found = {}
    for start in range(0, len(tokens) - window + 1, stride):
        ids = torch.from_numpy(tokens[start : start + window])[None]
        out = model(input_ids=ids, **({"output_mtp_logits": True} if head else {}))
        logits = (out.logits, *((out.mtp_logits or ()) if head else ()))[head][0].double()
        for i in range(head + 1, window):
            if start == 0 or i >= window - stride:
                assert start + i not in found
                found[start + i] = -logits[i - 1 - head].log_softmax(-1)[ids[0, i]].item()
    return found


def test_losses_are_those_of_the_runs_last_validation(finished) -> None:
    run, result = finished
    found = evaluate_checkpoint(EvalConfig(str(run.out)))["text"]
    last = result.curve[-1]
    assert found["loss"] == pytest.approx(last["loss"], rel=1e-6)
    assert found["loss_2"] == pytest.approx(last["loss_2"], rel=1e-6)
    assert (found["windows"], found["window"], found["tokens"]) == (16, 32, 16 * 31)
    earlier = evaluate_checkpoint(EvalConfig(str(run.out / "checkpoint-16")))["text"]
    assert earlier["loss"] == pytest.approx(result.curve[-2]["loss"], rel=1e-6)
    assert earlier["loss"] != pytest.approx(found["loss"], rel=1e-6)


def test_the_same_text_from_a_file_gives_the_same_losses(finished, text, tmp_path) -> None:
    run, result = finished
    corpus = prepare(str(text), window=32)
    tokens = np.memmap(corpus.valid.path, dtype=corpus.valid.dtype, mode="r")
    file = tmp_path / "valid.txt"
    file.write_bytes(bytes(tokens[:-1].tolist()))  # without the end of text
    found = evaluate_checkpoint(EvalConfig(str(run.out), data=str(file), max_tokens=512))["text"]
    assert found["loss"] == pytest.approx(result.curve[-1]["loss"], rel=1e-6)
    assert found["loss_2"] == pytest.approx(result.curve[-1]["loss_2"], rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2))  # one token is one byte
    whole = evaluate_checkpoint(EvalConfig(str(run.out), data=str(file)))["text"]
    assert whole["windows"] == len(tokens) // 32
    assert whole["loss"] != pytest.approx(found["loss"], rel=1e-6)


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 5), (16, 1)])
def test_sums_by_hand(window: int, stride: int) -> None:
    """Every head, with and without overlap; with overlap every target of the windows is counted exactly once."""
    model, tokens = build(vwn_config(backbone={"vocab_size": 300}, num_mtp_modules=2)), some_tokens(45)
    tokens[[3, 30]] = 256
    found = measure_text(model, text_of(tokens), window, stride, batch_size=3)
    for head, name in enumerate(("loss", "loss_2", "loss_3")):
        expected = by_hand(model, tokens, window, stride, head)
        assert found[name] == pytest.approx(np.mean(list(expected.values())), rel=1e-5)
        if head == 0:
            assert found["tokens"] == len(expected)
            assert found["bytes"] == sum(tokens[i] < 256 for i in expected)
            nats = sum(expected.values())
            assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / found["bytes"], rel=1e-5)
            assert found["perplexity"] == pytest.approx(math.exp(nats / len(expected)), rel=1e-4)
    if stride == 1:
        assert found["tokens"] == len(tokens) - 1


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_plain_model_needs_nothing_of_ours(kind: str) -> None:
    """Nor is the auxiliary loss of its router counted."""
    model, tokens = stock(kind, vocab_size=257), some_tokens(50)
    found = measure_text(model, text_of(tokens), 20)
    assert found["loss"] == pytest.approx(np.mean(list(by_hand(model, tokens, 20, 20).values())), rel=1e-5)
    assert "loss_2" not in found


def test_windows_are_spread_over_the_text() -> None:
    model, tokens = stock(vocab_size=257), some_tokens(100)
    found = measure_text(model, text_of(tokens), 10, max_tokens=35)
    expected = [loss for i, loss in by_hand(model, tokens, 10, 10).items() if i // 10 in (0, 3, 6)]
    assert found["windows"] == 3
    assert found["loss"] == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.mark.parametrize("spec", ["bytes", "bpe:300"])
def test_bytes_are_those_of_the_counted_tokens(tmp_path, spec: str) -> None:
    """Also where a token is a part of a character; the ends of documents stand for no bytes."""
    file, documents = tmp_path / "text.txt", [*DOCUMENTS, "狐 or 🦊, which the tokenizer has not seen"]
    file.write_bytes(SEPARATOR.join(documents).encode())
    tokenizer = load_tokenizer(spec, DOCUMENTS)
    model = saved_stock(tmp_path / "model", tokenizer)
    source = load_text(tmp_path / "model", str(file), {})
    lengths = byte_lengths(tokenizer)
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    written = [
        b"" if token == tokenizer.eos_token_id else bytes(byte_of[c] for c in tokenizer.convert_ids_to_tokens(token))
        for token in source.tokens.tolist()
    ]
    assert b"".join(written) == "".join(documents).encode()
    assert list(map(len, written)) == lengths[source.tokens].tolist()
    assert any(piece == "狐".encode()[:1] for piece in written)  # a split character
    found = measure_text(model, source, 50, max_tokens=1000)
    starts = [i * (len(source.tokens) // 50) // 20 * 50 for i in range(20)]
    covered = sum(len(piece) for start in starts for piece in written[start + 1 : start + 50])
    assert (found["bytes"], found["bytes_exact"]) == (covered, True)
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * found["tokens"] / math.log(2) / covered)


def test_bytes_of_a_tokenizer_that_changes_the_text_are_apportioned(tmp_path) -> None:
    """Unknown words are one piece, spaces none: what the pieces hold is not what was written, and that is said."""
    sentence = "The cat, Quite Unknown, sat on the mat. " * 30
    words = Counter(sentence.lower().replace(",", " ,").replace(".", " .").split())
    vocabulary = {"<unk>": 0, "</s>": 1} | {w: i for i, w in enumerate((w for w in words if w != "unknown"), 2)}
    words_tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words_tokenizer.normalizer = normalizers.Lowercase()
    words_tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words_tokenizer, eos_token="</s>", unk_token="<unk>")
    model = saved_stock(tmp_path / "model", tokenizer)
    (tmp_path / "text.txt").write_text(sentence)
    source = load_text(tmp_path / "model", str(tmp_path / "text.txt"), {})
    assert source.bytes == len(sentence)
    found = measure_text(model, source, len(source.tokens))
    first = len("the") * len(sentence) / byte_lengths(tokenizer)[source.tokens].sum()
    assert not found["bytes_exact"]
    assert found["bytes"] == round(len(sentence) - first)


def test_written_and_printed(finished, tmp_path, capsys, monkeypatch) -> None:
    run, _ = finished
    out = tmp_path / "eval.json"
    monkeypatch.setattr(sys, "argv", ["vwn", "eval", str(run.out), "--batch-size", "5", "--out", str(out)])
    main()
    printed = capsys.readouterr().out
    written = json.loads(out.read_text())
    assert printed.count("\n") == 1
    assert f"loss {written['text']['loss']:.4f} nats per token" in printed
    assert f"next-2-token {written['text']['loss_2']:.4f}" in printed
    assert written["command"].startswith("vwn eval ")
    assert written["checkpoint"] == str(run.out)
    assert "tasks" not in written


def test_the_text_must_still_be_the_runs(finished, text, tmp_path) -> None:
    run, _ = finished
    record = json.loads((run.out / "run.json").read_text())
    with pytest.raises(UserError, match="not the one"):
        load_text(run.out, None, {**record, "text": "another"})
    with pytest.raises(UserError, match=r"no run\.json"):
        load_text(run.out, None, {})


def test_texts_that_do_not_fit_the_model() -> None:
    model = stock(vocab_size=200)
    with pytest.raises(UserError, match=r"holds 50 tokens, fewer than a window of 51"):
        measure_text(model, text_of(some_tokens(50)), 51)
    with pytest.raises(UserError, match=r"the model knows 200 tokens"):
        measure_text(model, text_of([256, *range(150)]), 10)
    with pytest.raises(UserError, match=r"--stride must be at most the window of 10, got 11"):
        measure_text(model, text_of(range(50)), 10, 11)
    with pytest.raises(UserError, match="predicts nothing 2 tokens ahead"):
        measure_text(build(vwn_config(num_mtp_modules=1)), text_of(range(50)), 2)
    learned = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(UserError, match=r"has 16 positions, --window is 17"):
        measure_text(learned, text_of(some_tokens(50)), 17)
    assert measure_text(learned, text_of(some_tokens(50)))["window"] == 16
    with torch.no_grad():
        model.lm_head.weight[0] = math.inf
    with pytest.raises(UserError, match="diverged"):
        measure_text(model, text_of(range(50)), 10)


def test_a_rotary_model_reads_beyond_its_positions_when_told_to() -> None:
    model, text = stock(vocab_size=257), text_of(some_tokens(200))
    assert measure_text(model, text)["window"] == 64
    assert measure_text(model, text, 100)["window"] == 100


def test_a_checkpoint_without_a_tokenizer_is_measured_with_another(tmp_path) -> None:
    folder, file = tmp_path / "model", tmp_path / "text.txt"
    stock(vocab_size=300).save_pretrained(folder)
    file.write_text(DOCUMENTS[0])
    with pytest.raises(UserError, match=r"holds no tokenizer; .* --tokenizer FOLDER_OR_ID"):
        evaluate_checkpoint(EvalConfig(str(folder), data=str(file)))
    found = evaluate_checkpoint(EvalConfig(str(folder), data=str(file), tokenizer="bytes", window=16))["text"]
    assert found["windows"] == (len(DOCUMENTS[0].encode()) + 1) // 16
    larger = load_tokenizer("bytes")
    larger.add_tokens([f"word{i}" for i in range(100)])
    larger.save_pretrained(tmp_path / "larger")
    with pytest.raises(UserError, match=r"has ids up to 356, the model in .* knows 300 tokens"):
        evaluate_checkpoint(EvalConfig(str(folder), data=str(file), tokenizer=str(tmp_path / "larger")))


def test_missing_or_damaged_weights_are_refused(tmp_path) -> None:
    model = saved_stock(tmp_path)
    assert torch.equal(load_model(tmp_path).lm_head.weight, model.lm_head.weight)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    assert weights.pop("model.layers.1.mlp.up_proj.weight").numel()
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(tmp_path)
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match="damaged"):
        load_model(tmp_path)


BAD = {
    "no checkpoint": (["nowhere"], "nowhere"),
    "window": (["run", "--window", "1"], "--window must be at least 2, got 1"),
    "batch size": (["run", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
    "max tokens": (["run", "--max-tokens", "0"], "--max-tokens must be at least 1, got 0"),
    "stride": (["run", "--window", "8", "--stride", "9"], "--stride must be at most the window of 8, got 9"),
    "limit without tasks": (["run", "--limit", "3"], "--limit is for --tasks"),
    "tasks without a folder": (["run", "--tasks", "piqa"], "--data-dir"),
    "tokenizer without a text": (["run", "--tokenizer", "bytes"], "--tokenizer is for --data or --tasks"),
    "stride without a text": (["run", "--tasks", "piqa", "--data-dir", ".", "--stride", "3"], "--stride is for a text"),
    "out exists": (["run", "--out", __file__], "exists already"),
    "out in no folder": (["run", "--out", "nowhere/eval.json"], "there is no folder nowhere"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_done_is_one_sentence(case: str, capsys, monkeypatch) -> None:
    arguments, sentence = BAD[case]
    monkeypatch.setattr(sys, "argv", ["vwn", "eval", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert sentence in error
