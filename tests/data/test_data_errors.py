"""Bad data, one sentence each, and nothing left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from texts import DOCUMENTS, packed, write_parquet, write_txt
from vwn.common.errors import UserError
from vwn.data import load_tokenizer, prepare
from vwn.data.reading import SEPARATOR


def refusal(data: object, cache: Path, **options) -> str:
    defaults: dict[str, Any] = {"window": 64, "cache_dir": cache}
    with pytest.raises(UserError) as caught:
        prepare(str(data), **(defaults | options))
    message = str(caught.value)
    assert "\n" not in message
    assert not list(cache.glob("*.partial"))
    assert not list(cache.glob("*/meta.json"))
    return message


@pytest.mark.parametrize("name", ["missing.txt", "./missing", "/nowhere/at/all", "a/b/c", "~/missing.parquet", ""])
def test_missing_path(name: str, cache: Path):
    assert f"{name!r} does not exist" in refusal(name, cache)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.txt", "", "text.txt is empty"),
        ("text.txt", SEPARATOR * 2, "text.txt is empty"),
        ("text.csv", "a,b", "text.csv is none of the supported kinds"),
        ("d/notes.md", "no text", "d holds no .txt, .jsonl (also .xz, .gz or .zst) or .parquet file"),
    ],
)
def test_nothing_to_read(name: str, content: str, message: str, source: Path, cache: Path):
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).write_text(content)
    assert message in refusal(source / name.split("/")[0], cache)


def test_shorter_than_a_window(source: Path, cache: Path):
    (source / "text.txt").write_text("x" * 50)
    (source / "valid.txt").write_text("y" * 500)
    data, valid = str(source / "text.txt"), str(source / "valid.txt")
    with pytest.raises(UserError, match=r"training text .* holds 51 tokens, .* window of 64; .* at most 51"):
        prepare(data, valid=valid, window=64, cache_dir=cache)
    with pytest.raises(UserError, match=r"validation text .*text.txt holds 51 tokens, .* at most 51"):
        prepare(valid, valid=data, window=64, cache_dir=cache)
    with pytest.raises(UserError, match=r"validation text \(the last 10% of .*valid.txt\) holds 39 tokens"):
        prepare(valid, window=64, cache_dir=cache)
    assert len(prepare(data, valid=valid, window=51, cache_dir=cache).train) == 1


@pytest.mark.parametrize("offset", [0, (1 << 20) - 1])
@pytest.mark.parametrize("pack", [False, True])
def test_not_utf8(offset: int, pack: bool, source: Path, cache: Path):
    path = source / "text.txt"
    path.write_bytes(b"x" * offset + b"\xe2\x82 and more")
    path = packed(path) if pack else path
    assert f"{path} is not UTF-8 text: byte {offset} " in refusal(path, cache)


def test_not_utf8_in_jsonl(source: Path, cache: Path):
    (source / "text.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    assert "byte 24 " in refusal(source / "text.jsonl", cache)


@pytest.mark.parametrize("damage", ["cut", "flipped", "not xz"])
def test_damaged_xz(damage: str, source: Path, cache: Path):
    path = packed(write_txt(source, DOCUMENTS))
    whole = path.read_bytes()
    flipped = whole[:100] + bytes([whole[100] ^ 255]) + whole[101:]
    path.write_bytes({"cut": whole[:-20], "flipped": flipped, "not xz": b"hello"}[damage])
    assert f"{path} is not a complete .xz file" in refusal(path, cache)


@pytest.mark.parametrize("damage", ["cut", "zeroed", "tiny"])
def test_damaged_parquet(damage: str, source: Path, cache: Path):
    path = write_parquet(source, DOCUMENTS)
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-50], "zeroed": whole[:8] + bytes(200) + whole[208:], "tiny": b"x"}[damage])
    assert f"{path} is not a readable Parquet file" in refusal(path, cache)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"text": "a"}\n{"text": "b"', "line 2 of {path} is not valid JSON"),
        ('{"text": "a"}\n\n["b"]', "line 3 of {path} is ['b'], not a JSON object"),
        ('{"text": "a"}\n{"txt": "b"}', "line 2 of {path} has no column 'text'"),
        ('{"text": "a"}\n{"text": 7}', "line 2 of {path} holds 7, not a string"),
        ('{"text": "\\ud800"}', "line 1 of {path} holds half a surrogate pair"),
        (
            '{"a": "x", "b": "y", "n": 1}',
            "has no column 'text' and 2 other columns of strings (columns: 'a', 'b', 'n')",
        ),
        ('{"n": 1}', "has no column 'text' and 0 other columns of strings (columns: 'n')"),
    ],
)
def test_bad_jsonl(lines: str, message: str, source: Path, cache: Path):
    path = source / "text.jsonl"
    path.write_text(lines)
    assert message.format(path=path) in refusal(path, cache)


def test_unreadable_and_unwritable(source: Path, cache: Path):
    (source / "folder.txt").mkdir()
    (source / "folder.txt" / "link.txt").symlink_to(source / "nowhere")
    assert "link.txt cannot be read: No such file" in refusal(source, cache)
    (source / "folder.txt" / "link.txt").unlink()
    data = write_txt(source, DOCUMENTS)
    assert "text.txt cannot be written" in refusal(data, data)


@pytest.mark.parametrize("spec", ["bpe", "bpe:abc", "bpe:10", "bpe:-5", "bpe:9999999"])
def test_bad_bpe_size(spec: str, cache: Path):
    assert f"{spec!r} has no usable size" in refusal("missing.txt", cache, tokenizer=spec)


def test_bad_tokenizer(source: Path, cache: Path):
    for spec in (str(source / "missing"), str(write_txt(source, DOCUMENTS)), ""):
        assert f"{spec!r} is not a folder" in refusal(source, cache, tokenizer=spec)
    assert "cannot be loaded" in refusal(source, cache, tokenizer=str(source))
    (source / "tokenizer.json").write_text("{damaged")
    assert "cannot be loaded" in refusal(source, cache, tokenizer=str(source))
    with pytest.raises(UserError, match="trained on text"):
        load_tokenizer("bpe:300")


def test_tokenizer_without_end_of_text(source: Path, tmp_path: Path, cache: Path):
    tokenizer = load_tokenizer("bytes")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    assert "has no end-of-text token" in refusal(source, cache, tokenizer=str(tmp_path / "endless"))


def test_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, cache: Path):
    import datasets

    def offline(*_):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    assert "the Hugging Face hub does not give it as a data set (Couldn't reach" in refusal("owner/name", cache)


def test_hub_without_a_training_split(monkeypatch: pytest.MonkeyPatch, cache: Path):
    import datasets

    splits = {"test": datasets.Dataset.from_dict({"text": DOCUMENTS})}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: splits)
    assert "has no split 'train' (it has test)" in refusal("owner/name", cache)


def test_a_window_of_one_token(source: Path, cache: Path):
    assert "a window of 1 tokens" in refusal(write_txt(source, DOCUMENTS), cache, window=1)
