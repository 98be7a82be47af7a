"""`prepare`: from the name of a text to windows of token ids, tokenised once and cached."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tqdm.auto import tqdm

from vwn.common.cache import default_cache_dir, load_or_build
from vwn.common.errors import UserError
from vwn.data.packing import PackedWindows, Written, smallest_dtype, write_tokens
from vwn.data.sources import Source, resolve, resolve_valid
from vwn.data.tokenizer import bpe_size, load_tokenizer, wrap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from vwn.data.stream import TextStream
    from vwn.data.streaming import TokenStream

_FORMAT = 1  # of the token stream and of the cache's files; a change of either makes old entries unused
_TRAIN, _VALID, _META, _TOKENIZER = "train.bin", "valid.bin", "meta.json", "tokenizer.json"


@dataclass(frozen=True)
class Corpus:
    """A text ready for training.

    `train_tokens` and `valid_tokens` count the whole streams, the dropped remainder of a window included;
    `train_tokens` is None, and `train` a `TokenStream`, where the text is streamed.
    `valid_bytes_per_token` is bytes of UTF-8 per token of the validation stream, so that bits per byte are
    `loss / (ln 2 * valid_bytes_per_token)`. `fingerprint` is a hash of both token streams: equal text, split and
    tokeniser give an equal one on any machine.
    """

    train: PackedWindows | TokenStream
    valid: PackedWindows
    tokenizer: PreTrainedTokenizerFast
    train_tokens: int | None
    valid_tokens: int
    valid_bytes_per_token: float
    fingerprint: str


def prepare(
    data: str,
    *,
    valid: str | None = None,
    tokenizer: str = "bytes",
    window: int,
    cache_dir: Path | None = None,
    valid_fraction: float = 0.1,
) -> Corpus:
    """Read, split, tokenise and pack a text; a second call takes the token ids from the cache.

    `data`, `valid`: a file (`.txt`, `.jsonl`, either also `.xz`, `.parquet`), a folder of such files (all of them, in
    the order of their paths), `stdlib` (the Python files of the running interpreter's standard library), or a data set
    of the Hugging Face hub (`owner/name`, or `owner/name:configuration`). JSON lines, Parquet and hub rows are one
    document each, from the column `text` or else the only one of strings; a text file is one document, or several
    where it holds `<|endoftext|>`. Every document ends in the tokeniser's end-of-text id.

    Without `valid`, `stdlib` is split by file (by a hash of its path), a hub data set gives its validation split, and
    any other text loses its last `valid_fraction` to validation: whole documents, or where these are too long, the end
    of the last one from the start of a line on. A `bpe:N` tokeniser is trained on the training part only.

    `window`: tokens per window. `cache_dir`: default `$VWN_CACHE`, else `~/.cache/vwn`. Raises `UserError` for text
    that is missing, unreadable, empty, or on either side shorter than a window.
    """
    if window < 2:
        raise UserError(f"a window of {window} tokens predicts nothing; give a window of at least 2")
    if not 0 < valid_fraction < 1:
        raise UserError(f"a validation fraction of {valid_fraction} is not between 0 and 1; give for example 0.1")
    return _prepared(lambda: resolve(data, valid, valid_fraction), data, tokenizer, window, cache_dir, valid_fraction)


def prepare_valid(valid: str, *, tokenizer: str, window: int, cache_dir: Path | None = None) -> Corpus:
    """All of a validation text (its validation side, where it has one), with a tokeniser that exists.

    For training on streamed data, and for reading such a run's validation text again: both sides of the corpus are
    this text. Otherwise as `prepare`.
    """
    return _prepared(lambda: (resolve_valid(valid),) * 2, valid, tokenizer, window, cache_dir, 0.1)


def prepare_run(settings: Mapping[str, Any], *, window: int) -> Corpus:
    """The text of a training run by the settings in its `run.json`; of one on streamed data, only what it validated on.

    The corpus's fingerprint is the `text` of `run.json`, or the part of it in front of a `+`.
    """
    tokenizer, valid = settings["corpus.tokenizer"], settings["corpus.valid"]
    if settings.get("corpus.stream"):
        return prepare_valid(valid, tokenizer=tokenizer, window=window)
    return prepare(settings["corpus.data"], valid=valid, tokenizer=tokenizer, window=window)


def _prepared(
    find_sources: Callable[[], tuple[Source, Source | None]],
    data: str,
    tokenizer: str,
    window: int,
    cache_dir: Path | None,
    valid_fraction: float,
) -> Corpus:
    ready = None if bpe_size(tokenizer) else load_tokenizer(tokenizer, max_length=window)
    sources = find_sources()  # only now: it may ask the hub, and a bad tokeniser is known at once
    job = _Job(*sources, tokenizer, ready, window, valid_fraction)
    entry = load_or_build((cache_dir or default_cache_dir()) / job.key(), _load_entry, job.build)
    valid_name = sources[1].name if sources[1] else f"(the last {100 * valid_fraction:g}% of {data})"
    return Corpus(
        train=_windows(entry, _TRAIN, window, f"the training text {data}"),
        valid=_windows(entry, _VALID, window, f"the validation text {valid_name}"),
        tokenizer=ready or wrap(tokenizers.Tokenizer.from_file(str(entry.folder / _TOKENIZER)), window),
        train_tokens=entry.train.tokens,
        valid_tokens=entry.valid.tokens,
        valid_bytes_per_token=entry.valid.bytes / entry.valid.tokens,
        fingerprint=entry.fingerprint,
    )


@dataclass(frozen=True)
class _Entry:
    """One folder of the cache, complete."""

    folder: Path
    dtype: str
    train: Written
    valid: Written
    fingerprint: str


@dataclass(frozen=True)
class _Job:
    """What determines the token streams, and how they are made. `tokenizer` is None where it is to be trained."""

    data: Source
    valid: Source | None
    spec: str
    tokenizer: PreTrainedTokenizerFast | None
    window: int
    valid_fraction: float

    def key(self) -> str:
        if self.tokenizer is None:
            ids = f"bpe:{bpe_size(self.spec)} tokenizers {tokenizers.__version__}"
        else:
            ids = f"{self.tokenizer.eos_token_id} {self.tokenizer.backend_tokenizer.to_str()}"
        split = self.valid_fraction if self.valid is None else self.valid.key()
        return hashlib.blake2b(json.dumps([_FORMAT, self.data.key(), split, ids]).encode(), digest_size=16).hexdigest()

    def build(self, folder: Path) -> None:
        text = folder / "text"
        train, valid = self._streams(text)
        tokenizer = self.tokenizer
        if tokenizer is None:
            texts = _with_bar(train.segments(), train, f"training {self.spec}")
            tokenizer = load_tokenizer(self.spec, texts, max_length=self.window)
            tokenizer.backend_tokenizer.save(str(folder / _TOKENIZER))
        dtype, digest = smallest_dtype(tokenizer), hashlib.blake2b(digest_size=16)
        written: dict[str, Written] = {}
        for side, stream in (("train", train), ("valid", valid)):
            chunks = _with_bar(stream.chunks(), stream, f"tokenising {side}")
            written[side] = write_tokens(chunks, tokenizer, folder / f"{side}.bin", dtype, digest)
        shutil.rmtree(text)
        meta = {"dtype": dtype, "fingerprint": digest.hexdigest()} | {side: asdict(it) for side, it in written.items()}
        with open(folder / _META, "w") as file:
            json.dump(meta, file)
            file.flush()
            os.fsync(file.fileno())

    def _streams(self, folder: Path) -> tuple[TextStream, TextStream]:
        from vwn.data.stream import split_off_end, spool  # brings `datasets`, which a cached text does not need

        whole = spool(self.data, folder / "train")
        if self.valid is None:
            return split_off_end(whole, self.valid_fraction)
        return whole, spool(self.valid, folder / "valid")


def _with_bar(texts: Iterator[str], stream: TextStream, title: str) -> Iterator[str]:
    with tqdm(total=stream.stop - stream.start, unit="char", unit_scale=True, desc=title) as bar:
        for text in texts:
            yield text
            bar.update(len(text))


def _load_entry(folder: Path) -> _Entry | None:
    """The entry, or None where a file is missing or not as long as it was written."""
    try:
        meta: dict[str, Any] = json.loads((folder / _META).read_text())
        train, valid = Written(**meta["train"]), Written(**meta["valid"])
        width = int(meta["dtype"].removeprefix("uint")) // 8
        sizes = [(folder / name).stat().st_size for name in (_TRAIN, _VALID)]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if sizes != [train.tokens * width, valid.tokens * width]:
        return None
    return _Entry(folder, meta["dtype"], train, valid, meta["fingerprint"])


def _windows(entry: _Entry, name: str, window: int, what: str) -> PackedWindows:
    tokens = (entry.train if name == _TRAIN else entry.valid).tokens
    if tokens < window:
        smaller = f"or a window of at most {tokens}" if tokens > 1 else "no window is small enough"
        raise UserError(f"{what} holds {tokens} tokens, fewer than a window of {window}; give more text, {smaller}")
    return PackedWindows(entry.folder / name, entry.dtype, window)
