"""Odd files that people have: packed in parts, control tokens in the text, strange columns, names and machines."""

from __future__ import annotations

import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vwn.commands.evaluation.rows import load_rows
from vwn.common.cache import default_cache_dir
from vwn.common.errors import UserError
from vwn.data import load_tokenizer, prepare
from vwn.data.corpus import prepare_valid
from vwn.data.reading import SEPARATOR, FileRange, read_range
from vwn.data.stream import StreamLoader, prepare_stream
from vwn.data.stream.reader import START, Reader
from vwn.data.stream.source import open_source
from vwn.data.tokenizer import TextEncoder, load_checkpoint_tokenizer

EOS = 256


def ids_of(*documents: str) -> list[int]:
    return [i for text in documents for i in [*text.encode(), EOS]]


def prepared(path: Path | str, cache: Path, **options) -> list[int]:
    """All tokens of a text, as `--data`, `--valid` and `vwn eval` prepare it."""
    corpus = prepare_valid(str(path), **{"tokenizer": "bytes", "window": 2, "cache_dir": cache} | options)
    return np.fromfile(corpus.valid.path, dtype=corpus.valid.dtype).tolist()


def streamed(path: Path | str, count: int, skip: int = 0, tokenizer=None, control_tokens: bool = False) -> list[int]:
    """The first tokens of a streamed source with one reader."""
    encoder = TextEncoder(tokenizer or load_tokenizer("bytes"), control_tokens)
    on_bad_row = (lambda _: None) if skip else None
    source = open_source(str(path), 1)
    reader = Reader(source, 0, 1, lambda text: encoder([text])[0], encoder.end, 0, START, on_bad_row)
    return reader.take(count).tolist()


def zstd(data: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(data, asbytes=True)


PACKERS: dict[str, Callable[[bytes], bytes]] = {"xz": lzma.compress, "gz": gzip.compress, "zst": zstd}
JOINTS = [("xz", b""), ("xz", bytes(4)), ("xz", bytes(8)), ("gz", b""), ("gz", bytes(3)), ("zst", b"")]
A, B = "the first part of it\n" * 30, "the second part, which is another\n" * 20


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


# Packed files of several streams


@pytest.mark.parametrize(("packer", "between"), JOINTS)
def test_every_stream_of_a_packed_file_is_read(packer: str, between: bytes, tmp_path: Path):
    pack = PACKERS[packer]
    text, rows = tmp_path / f"a.txt.{packer}", tmp_path / f"a.jsonl.{packer}"
    text.write_bytes(pack(A.encode()) + between + pack(B.encode()) + between)
    rows.write_bytes(pack(lines(A)) + between + pack(lines(B)) + between)
    assert prepared(text, tmp_path / "cache") == ids_of(A + B)
    assert prepared(rows, tmp_path / "cache") == ids_of(A, B)
    assert streamed(text, len(ids_of(A + B))) == ids_of(A + B)
    assert streamed(rows, len(ids_of(A, B))) == ids_of(A, B)


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("damage", ["header", "block", "end", "rubbish"])
def test_damage_in_a_later_stream_is_refused(packer: str, damage: str, tmp_path: Path):
    pack = PACKERS[packer]
    first, later = pack(A.encode()), bytearray(pack(np.random.default_rng(0).bytes(3000).hex().encode()))
    if damage == "header":
        later[1] ^= 255
    elif damage == "block":
        later[len(later) // 2 : len(later) // 2 + 8] = bytes(8)
        later[-12:] = bytes(12)
    elif damage == "end":
        later = later[:-5]
    else:
        later = bytearray(b"no packed data")
    path = tmp_path / f"a.txt.{packer}"
    path.write_bytes(first + bytes(later))
    with pytest.raises(UserError, match=rf"a\.txt\.{packer} is not a complete \.{packer} file"):
        prepared(path, tmp_path / "cache")
    with pytest.raises(UserError, match=rf"a\.txt\.{packer} is not a complete \.{packer} file"):
        streamed(path, 5000)


def test_padding_that_is_no_multiple_of_four_is_refused(tmp_path: Path):
    path = tmp_path / "a.txt.xz"
    path.write_bytes(lzma.compress(A.encode()) + bytes(3) + lzma.compress(B.encode()))
    with pytest.raises(UserError, match="not a complete"):
        prepared(path, tmp_path / "cache")


def test_evaluation_rows_of_several_streams(tmp_path: Path):
    row = {"query": "q", "choices": ["a", "b"], "gold": 1}
    one = (json.dumps(row | {"n": 10**18}) + "\n").encode()
    other = one.replace(b'"q"', b'"r"').replace(b'"n": 1', b'"n": ' + b"1" * 4301)
    file = tmp_path / "piqa.jsonl.xz"
    fields = ("query", "choices", "gold")
    file.write_bytes(lzma.compress(b"\xef\xbb\xbf" + one) + bytes(4) + lzma.compress(other))
    assert load_rows("piqa", fields, tmp_path)["test"]["query"] == ["q", "r"]
    file.write_bytes(lzma.compress(one) + bytes(4) + b"\xfd7zXZ\0 damaged")
    with pytest.raises(UserError, match=r"piqa\.jsonl\.xz is not a complete \.xz file"):
        load_rows("piqa", fields, tmp_path)


def test_a_packed_file_is_continued_where_it_was_left(tmp_path: Path):
    for packer, pack in PACKERS.items():
        path = tmp_path / f"a.jsonl.{packer}"
        path.write_bytes(pack(lines(*(f"row {i} " * 40 for i in range(50)))) + pack(lines("last")))
        chunks = list(read_range(FileRange(path)))
        assert len(chunks) == 51
        assert list(read_range(FileRange(path), chunks[37].offset)) == chunks[37:]


# What is written in a text stays text


def control_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = load_tokenizer("bytes")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "</s>"]})
    return tokenizer


UNTRUSTED = f"he said {SEPARATOR} and <|im_start|>system</s> to me"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_control_tokens_in_a_row_are_text(kind: str, tmp_path: Path):
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_bytes(lines(UNTRUSTED, "more"))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": [UNTRUSTED, "more"]}), path)
    expected, tokenizer = ids_of(UNTRUSTED, "more"), control_tokenizer()
    assert prepared(path, tmp_path / "cache", tokenizer=tokenizer) == expected
    assert streamed(path, len(expected), tokenizer=tokenizer) == expected
    meant = tokenizer(UNTRUSTED, add_special_tokens=False).input_ids
    assert {EOS, 257, 258} <= set(meant)
    assert prepared(path, tmp_path / "cache", tokenizer=tokenizer, control_tokens=True) == [*meant, *ids_of("", "more")]
    assert streamed(path, 9, tokenizer=tokenizer, control_tokens=True) == meant[:9]


def test_a_txt_file_is_separated_and_its_other_control_tokens_are_text(tmp_path: Path):
    (tmp_path / "a.txt").write_text(f"one <|im_start|>{SEPARATOR}two{SEPARATOR}{SEPARATOR}three{SEPARATOR}")
    expected = ids_of("one <|im_start|>", "two", "three")
    assert prepared(tmp_path / "a.txt", tmp_path / "cache", tokenizer=control_tokenizer()) == expected
    assert streamed(tmp_path / "a.txt", len(expected), tokenizer=control_tokenizer()) == expected


def test_the_batches_of_a_run_follow_the_option(tmp_path: Path):
    (tmp_path / "v.txt").write_text(A)
    (tmp_path / "a.jsonl").write_bytes(lines(*[f"a{SEPARATOR}"] * 60))
    fingerprints = set()
    for control_tokens, expected in ((False, ids_of(f"a{SEPARATOR}")), (True, [ord("a"), EOS, EOS])):
        corpus = prepare_stream(
            [str(tmp_path / "a.jsonl")],
            valid=str(tmp_path / "v.txt"),
            tokenizer="bytes",
            window=len(expected),
            batch_size=1,
            control_tokens=control_tokens,
        )
        fingerprints.add(corpus.fingerprint)
        for workers in (0, 1):
            assert next(iter(StreamLoader(corpus.train, workers=workers)))["input_ids"].tolist() == [expected]
    assert len(fingerprints) == 2


def unigram(unk: bool = True) -> PreTrainedTokenizerFast:
    """Has its control tokens in the model's own vocabulary, as T5's and XLM-R's have."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((c, -3.0) for c in "▁ab</s>")]
    model = Tokenizer(models.Unigram(pieces, unk_id=0 if unk else None))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>", **({"unk_token": "<unk>"} if unk else {}))


def test_control_tokens_that_the_model_has_as_words_stay_text():
    tokenizer, text = unigram(), "a</s>b" * 200
    encoder = TextEncoder(tokenizer)
    (ids,) = encoder([text])
    assert encoder.end not in ids
    assert tokenizer.decode(ids).replace("▁", "").replace(" ", "") == text
    assert encoder(["abba"]) == [tokenizer.encode("abba", add_special_tokens=False)]
    assert 0 in encoder(["a🎈"])[0]  # unknown is not control
    short = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"§": 0, "x": 1}, unk_token="x")), eos_token="§"
    )
    with pytest.raises(UserError, match="'§' as a control token"):
        TextEncoder(short)(["§"])


# Files as they are


@pytest.mark.parametrize("packer", [None, "xz"])
def test_a_byte_order_mark_is_no_text(packer: str | None, tmp_path: Path):
    data = b"\xef\xbb\xbf" + A.encode()
    path = tmp_path / ("a.txt" if packer is None else f"a.txt.{packer}")
    path.write_bytes(data if packer is None else lzma.compress(data))
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + lines(A))
    for file in (path, tmp_path / "b.jsonl"):
        assert prepared(file, tmp_path / "cache") == ids_of(A)
        chunks = [chunk for part in open_source(str(file), 1).ranges for chunk in read_range(part)]
        assert "".join(chunk.text for chunk in chunks) == A


def test_a_folder_reads_all_packings_and_says_what_it_leaves_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    (folder / "b.txt.gz").write_bytes(gzip.compress(b"bb"))
    (folder / "c.jsonl.zst").write_bytes(zstd(lines("ccc")))
    (folder / "d.json").write_text('[{"text": "dddd"}]')
    (folder / "e.bz2").write_bytes(b"")
    assert prepared(folder, tmp_path / "cache") == ids_of("a", "bb", "ccc")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "2 of 5 files" in caplog.text
    assert "d.json, e.bz2" in caplog.text
    caplog.clear()
    found = streamed(folder, 3 * len(ids_of("a", "bb", "ccc")))
    assert set(bytes(i if i < EOS else 32 for i in found).decode().split()) == {"a", "bb", "ccc"}
    assert "d.json" in caplog.text
    caplog.clear()
    streamed(f"{folder}/*", 4)
    assert "d.json" in caplog.text


def test_parquet_columns_of_odd_types_are_neighbours_only(tmp_path: Path):
    text = pyarrow.array(["one", "two"])
    columns = {
        "a map": pyarrow.array([[("k", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "uuid": pyarrow.ExtensionArray.from_storage(pyarrow.uuid(), pyarrow.array([bytes(16)] * 2, pyarrow.binary(16))),
    }
    for name, column in (("text", text), ("only", text), ("text", text.dictionary_encode())):
        table = pyarrow.table(columns | {name: column}).replace_schema_metadata(
            {"huggingface": '{"info": {"features": 7}}'}
        )
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        assert prepared(tmp_path / "a.parquet", tmp_path / "cache") == ids_of("one", "two")
        assert streamed(tmp_path / "a.parquet", 8) == ids_of("one", "two")


def test_a_json_integer_of_any_length_is_read(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": %s, "text": "one"}\n{"id": 1, "text": "two"}\n' % ("9" * 4301))
    assert prepared(path, tmp_path / "cache") == ids_of("one", "two")
    assert sorted(streamed(path, 8)) == sorted(ids_of("one", "two"))
    path.write_text('{"id": 1, "text": "one"}\n{"id": 1, "text": %s}\n' % ("9" * 4301))
    with pytest.raises(UserError, match=r"line 2 of .*a\.jsonl holds inf, not a string"):
        prepared(path, tmp_path / "cache")
    assert streamed(path, 8, skip=9) == ids_of("one", "one")


def test_a_first_row_that_cannot_be_read_can_be_skipped(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{broken\n{"body": "two"}\n')
    assert streamed(path, 4, skip=9) == ids_of("two")
    with pytest.raises(UserError, match=r"line 1 of .* is not valid JSON"):
        prepared(path, tmp_path / "cache")


def test_text_that_the_tokenizer_does_not_know_is_one_sentence_and_can_be_skipped(tmp_path: Path):
    tokenizer = unigram(unk=False)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.jsonl").write_bytes(lines("aa", "bb"))
    (tmp_path / "d" / "b.jsonl").write_bytes(lines("a🎈", "ab"))
    with pytest.raises(UserError, match=r"^\S*b\.jsonl: the tokenizer cannot encode the text \(.*\); give one that"):
        prepared(tmp_path / "d", tmp_path / "cache", tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"b\.jsonl, byte 0: the tokenizer cannot encode the text"):
        streamed(tmp_path / "d" / "b.jsonl", 8, tokenizer=tokenizer)
    (known,) = TextEncoder(tokenizer)(["ab"])
    whole = [*known, tokenizer.eos_token_id]
    assert streamed(tmp_path / "d" / "b.jsonl", 2 * len(whole), tokenizer=tokenizer, skip=9) == 2 * whole


def test_a_name_that_is_not_utf8_is_refused_at_once(tmp_path: Path):
    name = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / name).write_text(A)
    (tmp_path / "v.txt").write_text(A)
    for spec in (str(tmp_path / name), f"{tmp_path}/caf\udce9*"):
        with pytest.raises(UserError, match=r"caf\\udce9.* is not UTF-8; rename"):
            prepare_stream([spec], valid=str(tmp_path / "v.txt"), tokenizer="bytes", window=4, batch_size=1)
    with pytest.raises(UserError, match="is not UTF-8"):
        prepare(str(tmp_path / name), window=4, cache_dir=tmp_path / "cache")
    with pytest.raises(UserError, match="is not UTF-8"):
        load_tokenizer(str(tmp_path / name))
    assert len(streamed(tmp_path, 2 * len(ids_of(A)))) > len(A)  # in a folder such names do not matter
    assert prepared(tmp_path, tmp_path / "cache") == ids_of(A, A)


def test_without_a_home_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("VWN_CACHE", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(UserError, match="environment variable VWN_CACHE"):
        default_cache_dir()
    monkeypatch.setenv("VWN_CACHE", "/somewhere")
    assert default_cache_dir() == Path("/somewhere")


# One text, read once


def test_a_text_to_measure_is_tokenised_once(tmp_path: Path, capfd: pytest.CaptureFixture):
    (tmp_path / "a.txt").write_text(A)
    corpus = prepare_valid(str(tmp_path / "a.txt"), tokenizer="bytes", window=4, cache_dir=tmp_path / "cache")
    assert corpus.train is corpus.valid
    assert "tokenising train" not in capfd.readouterr().err
    assert [path.name for path in sorted(corpus.valid.path.parent.iterdir())] == ["meta.json", "valid.bin"]


def test_a_checkpoint_without_a_tokenizer_takes_another(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match=r"holds no tokenizer; name .* --tokenizer FOLDER_OR_ID$"):
        load_checkpoint_tokenizer(tmp_path)
    assert load_checkpoint_tokenizer(tmp_path, "bytes").eos_token_id == EOS
    with pytest.raises(UserError, match="bpe:300 would be trained anew"):
        load_checkpoint_tokenizer(tmp_path, "bpe:300")


def test_torchtitan_reads_the_same_documents_and_continues(tmp_path: Path):
    pytest.importorskip("torchtitan")
    from torchtitan.components.tokenizer import HuggingFaceTokenizer

    from vwn.titan.data import DATASETS, keep_control_tokens_text

    long = "a long row\n" * 10_000
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(lines(A, UNTRUSTED)) + bytes(4) + lzma.compress(lines(B, long)))
    (tmp_path / "b.jsonl").write_bytes(lines("last"))
    (tmp_path / "c.txt").write_text("another kind")
    entry = DATASETS["jsonl"]
    rows = entry.loader(f"{tmp_path}/*")
    found = []
    for number, row in enumerate(rows):
        found.append(entry.sample_processor(row))
        if number == 1:
            state = rows.state_dict()
    assert found == [A, UNTRUSTED, B, long, "last"]
    again = entry.loader(f"{tmp_path}/*")
    again.load_state_dict(state)
    assert [row["text"] for row in again] == found[2:]
    load_tokenizer("bytes").save_pretrained(tmp_path / "tokenizer")
    tokenizer = HuggingFaceTokenizer(tokenizer_path=str(tmp_path / "tokenizer"))
    keep_control_tokens_text(tokenizer)
    assert tokenizer.encode(UNTRUSTED, add_bos=True, add_eos=True) == ids_of(UNTRUSTED)
    with pytest.raises(UserError, match="no parquet file matches"):
        DATASETS["parquet"].loader(f"{tmp_path}/*")
