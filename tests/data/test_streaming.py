"""Streamed data: every text once in a pass, and the same batches whatever reads them, also after a restart."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from texts import WRITERS, packed, write_jsonl, write_parquet, write_txt
from vwn.common.errors import UserError
from vwn.data import load_tokenizer, reading
from vwn.data.reading import FileRange, read_range
from vwn.data.stream import StreamLoader, TokenStream, prepare_stream
from vwn.data.stream import source as streamed_source
from vwn.data.stream.reader import START, Reader, reader_of
from vwn.data.stream.source import StreamedSource, open_source, parse_sources, sources_of_step

EOS = 256


def documents(count: int, seed: int = 0, longest: int = 400) -> list[str]:
    draw = random.Random(seed)
    words = ["one", "zwei", "數", "🎈", "\n", "and\r\n", "<|end", "of|>", "tail "]
    return [f"{seed}:{i} " + " ".join(draw.choices(words, k=draw.randint(1, longest))) for i in range(count)]


def encode(text: str) -> list[int]:
    return list(text.encode())


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(reading, "CHUNK", 300)  # so that documents are cut, also in small files


def stream_of(*sources: StreamedSource, weights=None, window=16, batch=4, seed=3) -> TokenStream:
    shares = weights or [1 / len(sources)] * len(sources)
    return TokenStream(sources, tuple(shares), load_tokenizer("bytes"), window, batch, seed)


@pytest.fixture
def sources(tmp_path: Path) -> tuple[StreamedSource, ...]:
    """Three sources: files of three kinds, one packed file, two row groups; all end and begin again in the tests."""
    (tmp_path / "a").mkdir()
    made = documents(60)
    write_jsonl(tmp_path / "a", made[:20])
    write_txt(tmp_path / "a", made[20:40])
    write_parquet(tmp_path / "a", made[40:])
    (tmp_path / "b").mkdir()
    packed(write_jsonl(tmp_path / "b", documents(25, seed=1)))
    (tmp_path / "c").mkdir()
    write_parquet(tmp_path / "c", documents(30, seed=2))
    return tuple(open_source(str(tmp_path / name), 16) for name in "abc")


# Units


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("readers", [1, 3, 64])
def test_the_ranges_of_a_source_hold_all_of_it_once(tmp_path, kind, readers):
    made = [f"{text}#" for text in documents(30, seed=readers)]  # a part that is cut off has no mark at its end
    source = open_source(str(WRITERS[kind](tmp_path, made)), readers)
    assert len(source.ranges) >= readers
    whole: dict[Path, list[tuple[int, int, str]]] = {}
    for part in source.ranges:
        for chunk in read_range(part):
            shift = 1_000_000 * part.start if part.path.suffix == ".parquet" else 0  # rows count from the row group
            whole.setdefault(part.path, []).append((shift + chunk.offset, chunk.number, chunk.text))
    parts = [text for path in sorted(whole) for *_, text in sorted(whole[path])]
    assert "".join(sorted("".join(parts))) == "".join(sorted("".join(made)))
    assert sorted("".join(parts).split("#")) == sorted("".join(made).split("#"))


def test_a_text_without_lines_is_cut_between_characters(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("數🎈é" * 2000)
    source = open_source(str(path), 50)
    assert len({part.start for part in source.ranges}) >= 50
    assert "".join(chunk.text for part in source.ranges for chunk in read_range(part)) == "數🎈é" * 2000


def test_a_parquet_file_is_cut_between_its_row_groups(tmp_path):
    import pyarrow
    import pyarrow.parquet

    made = documents(40)
    pyarrow.parquet.write_table(pyarrow.table({"text": made}), tmp_path / "a.parquet", row_group_size=3)
    source = open_source(str(tmp_path / "a.parquet"), 5)
    assert {part.shares for part in source.ranges} == {1}
    chunks = [chunk for part in source.ranges for chunk in read_range(part)]
    assert "".join(chunk.text + "#" * chunk.ends for chunk in chunks) == "".join(f"{text}#" for text in made)


def test_each_pass_has_every_range_once_in_another_order(sources):
    source = sources[0]
    size = len(source.ranges)
    passes = [[source.range_at(number * size + i, 7) for i in range(size)] for number in range(12)]
    assert all(sorted(map(repr, ranges)) == sorted(map(repr, source.ranges)) for ranges in passes)
    assert passes[0] != passes[1]
    assert passes[0] == [source.range_at(i, 7) for i in range(size)]
    assert passes[0] != [source.range_at(i, 8) for i in range(size)]


# Readers


def test_a_reader_reads_its_ranges_document_by_document(tmp_path):
    source = open_source(str(write_jsonl(tmp_path, ["first", "", "second", "x" * 700])), 1)
    reader = Reader(source, 0, 1, encode, EOS, 0, START)
    order = [source.range_at(i, 0) for i in range(len(source.ranges))]
    chunks = [chunk for part in order for chunk in read_range(part)]
    expected = [token for chunk in chunks for token in [*chunk.text.encode(), *[EOS] * chunk.ends]]
    assert sorted(bytes(b if b < EOS else 10 for b in expected).decode().split()) == ["first", "second", "x" * 700]
    assert reader.take(len(expected)).tolist() == expected


def test_a_reader_goes_on_from_any_position(sources):
    draw = random.Random(0)
    for source in sources:
        reader = Reader(source, 1, 16, encode, EOS, 5, START)
        passed, tokens = [START], []
        for _ in range(150):
            tokens.append(reader.take(draw.randint(1, 90)))
            passed.append(reader.position)
        assert passed[-1][0] >= 2  # several ranges
        for number in draw.sample(range(150), 25):
            again = Reader(source, 1, 16, encode, EOS, 5, passed[number])
            for before, place in zip(tokens[number : number + 8], passed[number + 1 :], strict=False):
                assert np.array_equal(again.take(len(before)), before)
                assert again.position == place


# The mixture


def test_weights_are_shares_of_the_tokens():
    assert parse_sources(["a=3", "b"]) == {"a": 0.75, "b": 0.25}
    assert parse_sources(["d/lang=en/*.jsonl", "d/lang=de/*.jsonl=3"]) == {
        "d/lang=en/*.jsonl": 0.25,
        "d/lang=de/*.jsonl": 0.75,
    }
    weights, batch = (0.5, 0.3, 0.2), 7
    drawn = np.stack([sources_of_step(weights, batch, step, 1) for step in range(2000)])
    for source, weight in enumerate(weights):
        each = (drawn == source).sum(1)
        assert {int(np.floor(weight * batch)), int(np.ceil(weight * batch))} >= set(each.tolist())
        assert abs(each.sum() - weight * drawn.size) < 10  # a drawing at random would be 50 off
        assert np.all(abs((drawn == source).mean(0) - weight) < 0.05)  # every slot has its share of all
    assert not np.array_equal(drawn, np.stack([sources_of_step(weights, batch, step, 2) for step in range(2000)]))


@pytest.mark.parametrize("specs", [["a=0"], ["a=-1"], ["a=x"], ["=2"], ["a=nan"], ["a=inf"], ["a", "a=2"]])
def test_a_useless_weight_is_refused(specs):
    with pytest.raises(UserError, match="--stream"):
        parse_sources(specs)


# Batches


def global_batches(stream: TokenStream, steps: int, world=1, accumulation=1, workers=0, state: Any = None):
    """The batches of all processes put together, and their common state after each step."""
    loaders = [StreamLoader(stream, rank, world, accumulation, workers) for rank in range(world)]
    if state:
        for loader in loaders:
            loader.load_state_dict(json.loads(json.dumps(state)))
    iterators = [iter(loader) for loader in loaders]
    for _ in range(steps):
        parts = [next(iterator) for iterator in iterators for _ in range(accumulation)]
        assert all(torch.equal(part["input_ids"], part["labels"]) for part in parts)
        yield torch.cat([part["input_ids"] for part in parts]), together(loaders)


def together(loaders: list[StreamLoader]) -> dict[str, Any]:
    """What `state_dict` gathers from the processes."""
    whole = StreamLoader(loaders[0].stream)
    whole.step = loaders[0].step
    assert all(loader.step == whole.step for loader in loaders)
    for loader in loaders:
        assert not whole.positions.keys() & loader.positions.keys(), "two processes read one reader"
        whole.positions |= loader.positions
    return whole.state_dict()


def test_batches_hold_what_their_readers_read(sources):
    """Against a reading of the readers that knows nothing of steps, processes or workers."""
    weights = (0.5, 0.3, 0.2)
    stream = stream_of(*sources, weights=weights)
    readers = {
        (k, i): Reader(source, k, 16, encode, EOS, stream.seed + i, START)
        for k in range(16)
        for i, source in enumerate(sources)
    }
    for step, (batch, _) in enumerate(global_batches(stream, 40)):
        chosen = sources_of_step(weights, 4, step, stream.seed)
        for slot in range(4):
            assert batch[slot].tolist() == readers[step % 4 * 4 + slot, int(chosen[slot])].take(16).tolist()


def test_nothing_of_a_pass_is_lost_or_read_twice(tmp_path):
    made = [f"<{i}>" for i in range(4000)]
    source = open_source(str(write_jsonl(tmp_path, made)), 16)
    stream = stream_of(source, window=64)
    seen: dict[str, int] = {}
    ids = [[] for _ in range(16)]
    for step, (batch, state) in enumerate(global_batches(stream, 250)):
        for slot in range(4):
            ids[reader_of(step, slot, 4)].extend(batch[slot].tolist())
        ranges = [int(place.split()[0]) for place in state["sources"][0]["positions"]]
        if min(k + 16 * part for k, part in enumerate(ranges)) >= len(source.ranges):
            break
    else:
        pytest.fail("a pass did not end")
    for reader in ids:
        for text in bytes(b if b < 256 else 10 for b in reader).decode().split("\n")[:-1]:
            seen[text] = seen.get(text, 0) + 1
    assert seen.keys() == set(made)
    assert max(seen.values()) <= 2  # the second pass has begun in some readers


@pytest.mark.parametrize(("world", "accumulation", "workers"), [(4, 1, 0), (2, 2, 0), (1, 4, 3), (2, 1, 5)])
def test_batches_do_not_depend_on_processes_accumulation_or_workers(sources, world, accumulation, workers):
    stream = stream_of(*sources, weights=(0.5, 0.3, 0.2))
    one = list(global_batches(stream, 12))
    other = list(global_batches(stream, 12, world, accumulation, workers))
    for (batch, state), (batch2, state2) in zip(one, other, strict=True):
        assert torch.equal(batch, batch2)
        assert state == state2  # although the workers have read on


@pytest.mark.parametrize(("before", "after"), [((2, 1, 0), (1, 1, 0)), ((1, 1, 2), (4, 1, 0)), ((2, 2, 0), (1, 1, 3))])
def test_a_restart_goes_on_with_any_number_of_processes_and_workers(sources, before, after):
    stream = stream_of(*sources, weights=(0.5, 0.3, 0.2))
    whole = list(global_batches(stream, 20))
    for stop in (1, 7):
        first = list(global_batches(stream, stop, *before))
        rest = list(global_batches(stream, 20 - stop, *after, state=first[-1][1]))
        for (batch, state), (batch2, state2) in zip(whole, [*first, *rest], strict=True):
            assert torch.equal(batch, batch2)
            assert state == state2


def test_a_restart_does_not_read_what_was_used_up(tmp_path, monkeypatch):
    stream = stream_of(open_source(str(write_jsonl(tmp_path, documents(300))), 16), batch=1, window=200)
    *_, (_, state) = global_batches(stream, 160)
    read: list[tuple[FileRange, int]] = []
    monkeypatch.setattr(
        streamed_source,
        "read_range",
        lambda part, offset, on_bad_row=None: read.append((part, offset)) or read_range(part, offset),
    )
    next(global_batches(stream, 1, state=state))
    assert len(read) == 1
    assert read[0][1] > 0


# What is refused


def test_a_state_of_other_data_is_refused(tmp_path, sources):
    stream = stream_of(*sources)
    *_, (_, state) = global_batches(stream, 2)
    with pytest.raises(UserError, match="readers"):
        StreamLoader(stream_of(*sources[:2])).load_state_dict(state)
    with pytest.raises(UserError, match="readers"):
        StreamLoader(stream_of(*sources, batch=20)).load_state_dict(state)
    with pytest.raises(UserError, match="cannot be read"):
        StreamLoader(stream).load_state_dict(state | {"format": 1})
    path = tmp_path / "a" / "text.txt"
    path.write_bytes(path.read_bytes() + b".")
    with pytest.raises(UserError, match=r"files of .*a are not those"):
        StreamLoader(stream_of(open_source(str(tmp_path / "a"), 16), *sources[1:])).load_state_dict(state)


def test_a_moved_copy_of_the_same_age_or_not_is_the_same_data(tmp_path, sources):
    (tmp_path / "a").rename(tmp_path / "moved")
    (tmp_path / "moved" / "text.txt").touch()
    assert open_source(str(tmp_path / "moved"), 16).fingerprint == sources[0].fingerprint


def test_a_pattern_and_a_batch_that_cannot_be_divided(tmp_path, sources):
    assert open_source(f"{tmp_path}/a/*.jsonl", 1).ranges[0].path.name == "text.jsonl"
    with pytest.raises(UserError, match="holds no"):
        open_source(f"{tmp_path}/a/*.xz", 1)
    with pytest.raises(UserError, match="multiple of 3"):
        StreamLoader(stream_of(*sources), world=3)


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_is_one_sentence_also_from_a_worker(tmp_path, workers):
    path = write_jsonl(tmp_path, documents(40))
    source = open_source(str(path), 1)
    path.write_bytes(path.read_bytes()[:-40] + b"\n{broken\n")
    with pytest.raises(UserError, match=r"^the line at byte \d+ of .*text.jsonl is not valid JSON[^\n]*$"):
        list(global_batches(stream_of(source, window=512), 200, workers=workers))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_stopped_by_a_broken_row_goes_on_without_it(tmp_path, caplog, workers):
    lines = [json.dumps({"text": text}) for text in documents(300, longest=20)]
    broken = lines[150].replace("{", "[", 1)
    blank = " " * len(broken.encode())  # what is left out leaves no trace: as if the line were empty

    def loader(name: str, line: str, allowed: int) -> StreamLoader:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join([*lines[:150], line, *lines[151:]]))
        stream = dataclasses.replace(stream_of(open_source(str(path), 16)), skip_bad_rows=allowed)
        return StreamLoader(stream, workers=workers)

    strict = loader("a", broken, 0)
    states = [strict.state_dict()]
    with pytest.raises(UserError, match=r"the line at byte \d+ .* is not valid JSON.*--skip-bad-rows"):
        states.extend(strict.state_dict() for _ in strict)
    stop = len(states) + 200
    whole = [batch["input_ids"] for _, batch in zip(range(stop), loader("b", blank, 0), strict=False)]
    tolerant = loader("a", broken, 4)
    tolerant.load_state_dict(states[-1])
    with caplog.at_level("ERROR"):
        rest = [batch["input_ids"] for _, batch in zip(range(len(states) - 1, stop), tolerant, strict=False)]
    assert all(torch.equal(a, b) for a, b in zip(whole[len(states) - 1 :], rest, strict=True))
    if not workers:  # a worker's lines go to standard error
        assert 1 <= sum("is not valid JSON" in line and "skipped" in line for line in caplog.messages) <= 4


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
def test_more_broken_rows_than_allowed_stop_it(tmp_path, kind):
    if kind == "jsonl":
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "first"}\n' + '{"text": 1}\n' * 500)
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        path, bad = tmp_path / "a.parquet", pyarrow.array([b"first"] + [b"\xff"] * 500).cast(pyarrow.binary())
        bad = pyarrow.Array.from_buffers(pyarrow.string(), len(bad), bad.buffers())  # not UTF-8, as a fault writes it
        pyarrow.parquet.write_table(pyarrow.table({"text": bad}), path)
    else:
        path = tmp_path / "a.txt"
        path.write_bytes(b"first\n" + b"\xff" * 20_000)
    stream = dataclasses.replace(stream_of(open_source(str(path), 16)), skip_bad_rows=3)
    with pytest.raises(UserError, match="more than 3 rows cannot be read"):
        list(StreamLoader(stream))


def test_empty_sources_and_missing_options_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n')
    (tmp_path / "v.txt").write_text("some words\n" * 50)
    (tmp_path / "c.jsonl").write_text("{broken\n")
    for name, why in (("a.txt", "is empty"), ("b.jsonl", "is empty"), ("c.jsonl", "is not valid JSON")):
        with pytest.raises(UserError, match=why):
            open_source(str(tmp_path / name), 4)
    given = dict(window=8, batch_size=2)
    with pytest.raises(UserError, match="needs --valid"):
        prepare_stream([str(tmp_path / "v.txt")], valid=None, tokenizer="bytes", **given)
    with pytest.raises(UserError, match="tokenizer that exists"):
        prepare_stream([str(tmp_path / "v.txt")], valid=str(tmp_path / "v.txt"), tokenizer="bpe:300", **given)


def test_the_end_of_a_source_is_said(tmp_path, caplog):
    caplog.set_level("INFO", "vwn")
    list(global_batches(stream_of(open_source(str(write_txt(tmp_path, documents(5))), 16)), 100))
    assert "pass 2 of it begins" in caplog.text


# The hub


def test_rows_of_a_hub_data_set_are_streamed(tmp_path, monkeypatch):
    import datasets

    made = documents(30)
    for i in range(3):
        write_parquet(tmp_path, made[10 * i : 10 * i + 10]).rename(tmp_path / f"{i}.parquet")
    local = datasets.load_dataset_builder("parquet", data_files={"train": sorted(map(str, tmp_path.glob("*.parquet")))})
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, configuration: local)
    source = open_source("owner/name", 7)
    found = [chunk for part in source.ranges for chunk in source.read(part, 0)]
    assert "".join(chunk.text + "#" * chunk.ends for chunk in found).count("#") == len(made)
    assert sorted("".join(chunk.text + "#" * chunk.ends for chunk in found)) == sorted("".join(f"{t}#" for t in made))
    assert len(source.ranges) >= 7
    reader = Reader(source, 2, 7, encode, EOS, 0, START)
    first, place = reader.take(300), reader.position
    assert np.array_equal(Reader(source, 2, 7, encode, EOS, 0, place).take(500), reader.take(500))
    assert len(first) == 300
