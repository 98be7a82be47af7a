"""Text to windows of token ids: every source, every tokeniser, and the cache."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import vwn.data
from texts import DOCUMENTS, WRITERS, packed, write_jsonl, write_txt
from vwn.data import Corpus, PackedWindows, corpus, load_tokenizer, prepare, sources
from vwn.data.reading import CHUNK, SEPARATOR

TRICKY = [
    "",
    " leading and trailing ",
    "tab\there\r\nand  two   three    spaces\n\n\n",
    "naïve 数学 🎈👩‍👩‍👧 \u0000 \ufeff é é",
    "don't I'll  they 've 1234567890 !?.,",
    "".join(map(chr, [*range(0xD800), *range(0xE000, 0xE100), 0x10FFFF])),
]
EOS = 256


def stream_of(windows: PackedWindows) -> np.ndarray:
    return np.fromfile(windows.path, dtype=windows.dtype)


def encoded(documents: Iterable[str]) -> list[int]:
    return [token for text in documents for token in [*text.encode(), EOS]]


def tokens_of(result: Corpus) -> list[int]:
    return [*stream_of(result.train).tolist(), *stream_of(result.valid).tolist()]


# Sources


@pytest.mark.parametrize("kind", WRITERS)
def test_every_source_gives_the_same_stream(kind: str, source: Path, cache: Path, capfd: pytest.CaptureFixture):
    result = prepare(str(WRITERS[kind](source, DOCUMENTS)), window=64, cache_dir=cache)
    assert tokens_of(result) == encoded(DOCUMENTS)
    assert stream_of(result.train).tolist() == encoded(DOCUMENTS[:36]), "the last tenth of the documents is validation"
    assert result.valid_bytes_per_token == pytest.approx(
        sum(len(text.encode()) for text in DOCUMENTS[36:]) / result.valid_tokens
    )
    assert capfd.readouterr().out == ""


def test_windows_are_the_stream_in_order(source: Path, cache: Path):
    result = prepare(str(write_txt(source, DOCUMENTS)), window=100, cache_dir=cache)
    windows = [result.train[i] for i in range(len(result.train))]
    joined = torch.cat([window["input_ids"] for window in windows])
    assert joined.dtype == torch.int64
    assert joined.tolist() == stream_of(result.train)[: len(joined)].tolist()
    assert 0 <= result.train_tokens - len(joined) < 100
    assert all(torch.equal(window["input_ids"], window["labels"]) for window in windows)
    assert torch.equal(result.train[-1]["labels"], windows[-1]["labels"])
    with pytest.raises(IndexError):
        result.train[len(windows)]


def test_windows_travel_by_path(source: Path, cache: Path):
    train = prepare(str(write_txt(source, DOCUMENTS)), window=64, cache_dir=cache).train
    sent = pickle.dumps(train)
    assert len(sent) < 1000
    assert torch.equal(pickle.loads(sent)[3]["input_ids"], train[3]["input_ids"])


def test_validation_text_of_its_own(source: Path, tmp_path: Path, cache: Path):
    valid = write_jsonl(tmp_path, DOCUMENTS[:5])
    result = prepare(str(write_txt(source, DOCUMENTS[5:])), valid=str(valid), window=64, cache_dir=cache)
    assert stream_of(result.train).tolist() == encoded(DOCUMENTS[5:])
    assert stream_of(result.valid).tolist() == encoded(DOCUMENTS[:5])


def test_stdlib_is_split_by_file(cache: Path):
    train, valid = sources.find_sources("stdlib", None)
    assert isinstance(train, sources.FileSource)
    assert isinstance(valid, sources.FileSource)
    sides = [set(source.paths) for source in (train, valid)]
    assert not sides[0] & sides[1]
    sizes = [sum(path.stat().st_size for path in source.paths) for source in (train, valid)]
    assert 0.03 < sizes[1] / sum(sizes) < 0.2
    assert not any({"test", "tests", "idlelib", "site-packages"} & set(path.parts) for path in sides[0] | sides[1])
    assert {"argparse.py", "base_events.py"} <= {path.name for path in sides[0] | sides[1]}
    assert list(train.paths) != sorted(train.paths), "neighbouring files are mixed"
    assert sources.find_sources("stdlib", "stdlib")[1] == valid


@pytest.mark.parametrize("own_valid", [True, False])
def test_hub_data_set(own_valid: bool, monkeypatch: pytest.MonkeyPatch, cache: Path):
    import datasets

    asked = []
    splits = {"train": datasets.Dataset.from_dict({"text": [*DOCUMENTS[:30], None, ""], "n": [0] * 32})}
    if own_valid:
        splits["validation"] = datasets.Dataset.from_dict({"text": DOCUMENTS[30:], "n": [0] * 10})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: asked.append(args) or splits)
    result = prepare("owner/name:small", window=64, cache_dir=cache)
    assert asked == [("owner/name", "small")]
    expected = (DOCUMENTS[:30], DOCUMENTS[30:]) if own_valid else (DOCUMENTS[:27], DOCUMENTS[27:30])
    assert stream_of(result.train).tolist() == encoded(expected[0])
    assert stream_of(result.valid).tolist() == encoded(expected[1])


# The stream of text


@pytest.mark.parametrize(
    "text", ["".join(f"line {i} of a play\n" for i in range(1000)), ("word " * 8000 + "\n") * 49], ids=["short", "long"]
)
def test_one_long_document_is_cut_at_a_line(text: str, source: Path, cache: Path):
    result = prepare(str(write_txt(source, [text])), window=64, cache_dir=cache)
    assert tokens_of(result) == encoded([text])
    assert stream_of(result.train)[-1] == ord("\n")
    assert result.valid_tokens / len(text) == pytest.approx(0.1, rel=0.03)


def test_text_without_lines_is_cut_anywhere(source: Path, cache: Path):
    text = "é" * 3000
    result = prepare(str(write_txt(source, [text])), window=64, cache_dir=cache)
    assert result.valid_tokens == pytest.approx(600, rel=0.05)
    assert tokens_of(result) == encoded([text])


def test_separators_make_no_empty_documents(source: Path, cache: Path):
    body = DOCUMENTS[0] * 5
    path = write_txt(source, ["", "", body, "", body, ""])
    assert tokens_of(prepare(str(path), window=64, cache_dir=cache)) == encoded([body, body])


def test_long_documents_keep_every_character(source: Path, cache: Path):
    text = "".join(chr(0x4E00 + i % 5000) for i in range(3 * CHUNK))
    result = prepare(str(write_txt(source, [text, text])), window=64, cache_dir=cache)
    assert tokens_of(result) == encoded([text, text])


# Tokenisers


@pytest.mark.parametrize("spec", ["bytes", "bpe:400"])
def test_round_trip(spec: str, tmp_path: Path):
    tokenizer = load_tokenizer(spec, DOCUMENTS)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "not registered"}')
    for it in (tokenizer, AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        for text in [*TRICKY, *DOCUMENTS[:2]]:
            ids = it.encode(text)
            assert it.decode(ids) == text
            assert it.eos_token_id not in ids
        assert it.eos_token == SEPARATOR
        assert it.encode(f"a{SEPARATOR}b")[1] == it.eos_token_id


def test_bytes_are_ids():
    tokenizer = load_tokenizer("bytes")
    assert [tokenizer.encode(text) for text in TRICKY] == [list(text.encode()) for text in TRICKY]
    assert (len(tokenizer), tokenizer.eos_token_id) == (257, EOS)


def test_bpe_is_trained_on_the_training_part_only(source: Path, cache: Path, capfd: pytest.CaptureFixture):
    train, valid = "the same words again. " * 300, "zyxwvut " * 100
    result = prepare(str(write_txt(source, [train, valid])), tokenizer="bpe:300", window=8, cache_dir=cache)
    vocabulary = result.tokenizer.get_vocab()
    assert "Ġwords" in vocabulary
    assert not [token for token in vocabulary if len(token) == 2 and set(token) & set("zyxvu")]
    assert result.tokenizer.decode(stream_of(result.valid)[:-1]) == valid
    assert capfd.readouterr().out == ""


# The cache

CHILD = """
import os, signal, sys
from pathlib import Path
from vwn.data import corpus
if sys.argv[3] == "kill":
    whole = corpus.write_tokens
    def killed(chunks, tokenizer, path, dtype, digest):
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    corpus.write_tokens = killed
print(corpus.prepare(sys.argv[1], tokenizer="bpe:500", window=64, cache_dir=Path(sys.argv[2])).fingerprint)
"""


def in_another_process(data: Path, cache: Path, what: str) -> subprocess.CompletedProcess[str]:
    root = Path(vwn.data.__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONHASHSEED": "5", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", CHILD, str(data), str(cache), what]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_another_process_and_cache_give_the_same_tokens(source: Path, tmp_path: Path, cache: Path):
    data = write_txt(source, DOCUMENTS)
    here = prepare(str(data), tokenizer="bpe:500", window=64, cache_dir=cache)
    there = in_another_process(packed(data), tmp_path / "other", "")
    assert there.stdout == here.fingerprint + "\n", there.stderr
    (other,) = (tmp_path / "other").glob("*/train.bin")
    assert other.read_bytes() == here.train.path.read_bytes()


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_that_is_used(source: Path, cache: Path):
    data = write_txt(source, DOCUMENTS)
    assert in_another_process(data, cache, "kill").returncode == -signal.SIGKILL
    assert len(list(cache.glob("*.partial/train.bin"))) == 1
    result = prepare(str(data), tokenizer="bpe:500", window=64, cache_dir=cache)
    assert result.tokenizer.decode(tokens_of(result)) == "".join(text + SEPARATOR for text in DOCUMENTS)
    assert sorted(path.name for path in result.train.path.parent.iterdir()) == [
        *("meta.json", "tokenizer.json", "train.bin", "valid.bin")
    ]
    assert not list(cache.glob("*.partial"))


@pytest.mark.parametrize("spec", ["bytes", "bpe:400"])
def test_second_call_does_not_read_or_tokenise(
    spec: str, source: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    data = write_txt(source, DOCUMENTS)
    first = prepare(str(data), tokenizer=spec, window=64, cache_dir=cache)

    class Tokenised(Exception):
        pass

    def refuse(*_, **__):
        raise Tokenised

    monkeypatch.setattr(corpus, "whole", refuse)
    monkeypatch.setattr(corpus, "write_tokens", refuse)
    moved = data.rename(tmp_path / "moved.txt")
    second = prepare(str(moved), tokenizer=spec, window=32, cache_dir=cache)
    assert (second.fingerprint, second.train_tokens) == (first.fingerprint, first.train_tokens)
    assert second.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    assert torch.equal(second.train[0]["input_ids"], first.train[0]["input_ids"][:32])

    for changed in ({"tokenizer": "bpe:401"}, {"valid": str(moved)}, {"cache_dir": source}):
        options: dict[str, Any] = {"tokenizer": spec, "window": 64, "cache_dir": cache} | changed
        with pytest.raises(Tokenised):
            prepare(str(moved), **options)
    moved.write_text(moved.read_text() + "x")
    with pytest.raises(Tokenised):
        prepare(str(moved), tokenizer=spec, window=64, cache_dir=cache)


def test_a_damaged_entry_is_built_again(source: Path, cache: Path):
    data = write_txt(source, DOCUMENTS)
    first = prepare(str(data), window=64, cache_dir=cache)
    for name in ("meta.json", "train.bin"):
        damaged = first.train.path.with_name(name)
        damaged.write_bytes(damaged.read_bytes()[:-3])
        again = prepare(str(data), window=64, cache_dir=cache)
        assert again.fingerprint == first.fingerprint
        assert tokens_of(again) == encoded(DOCUMENTS)
