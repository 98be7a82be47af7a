"""`prepare`: make windows of token ids of the text that a name stands for, tokenised once and cached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers

from vwn.common.cache import default_cache_dir, load_or_build
from vwn.common.errors import UserError
from vwn.common.files import sync
from vwn.data.packing import PackedWindows, smallest_dtype, write_tokens
from vwn.data.sources import VALID_SHARE, Source, find, find_sources
from vwn.data.splitting import Text, split_off_end, whole
from vwn.data.tokenizer import BYTES, TextEncoder, bpe_size, load_tokenizer, wrap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from vwn.data.stream import TokenStream

_FORMAT = 2  # of the token stream and of the cache's files; a change of either makes old entries unused
_META, _TOKENIZER = "meta.json", "tokenizer.json"


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
    tokenizer: str | None = None,
    window: int,
    cache_dir: Path | None = None,
    control_tokens: bool = False,
) -> Corpus:
    """Read, split, tokenise and pack a text; a second call takes the token ids from the cache.

    `data`, `valid`: a file (`.txt`, `.jsonl`, either also packed as `.xz`, `.gz` or `.zst`, or `.parquet`), a folder or
    a pattern of such files (all of them, in the order of their paths), `stdlib` (the Python files of the running
    interpreter's standard library), or a data set of the Hugging Face hub (`owner/name`, `owner/name:configuration`).
    JSON lines, Parquet and hub rows are one document each, from the column `text` or else the only one of strings. A
    `.txt` is one document, or several separated by `<|endoftext|>`. Every document ends in the tokeniser's end-of-text
    id.

    Without `valid`, `stdlib` is split by file (by a hash of its path), a hub data set gives its validation split, and
    any other text loses its last tenth to validation: whole documents, or where these are too long, the end of the last
    one from the start of a line on. A `bpe:N` tokeniser is trained on the training part only.

    `window`: tokens per window. `cache_dir`: default `$VWN_CACHE`, else `~/.cache/vwn`. `control_tokens`: give control
    tokens that are written in the text (`<|im_start|>`) their ids; otherwise they are text like any other. Raises
    `UserError` for text that is missing, unreadable, empty, or on either side shorter than a window.
    """
    if window < 2:
        raise UserError(f"a window of {window} tokens predicts nothing; give a window of at least 2")
    tokenizer = BYTES if tokenizer is None else tokenizer
    ready = None if bpe_size(tokenizer) else load_tokenizer(tokenizer)
    train_source, valid_source = find_sources(data, valid)  # after the tokeniser, as it may ask the hub
    job = _Job(train_source, valid_source, tokenizer, ready, window, control_tokens)
    valid_name = valid_source.name if valid_source else f"(the last {100 * VALID_SHARE:g}% of {data})"
    return job.corpus(cache_dir, f"the training text {data}", f"the validation text {valid_name}")


def prepare_valid(
    valid: str,
    *,
    tokenizer: str | PreTrainedTokenizerFast,
    window: int,
    cache_dir: Path | None = None,
    control_tokens: bool = False,
) -> Corpus:
    """Prepare all of a validation text (its validation side, where it has one) with a tokeniser that exists.

    For training on streamed data, and for measuring a model: both sides of the corpus are this text, which is read and
    tokenised once. Otherwise as `prepare`.
    """
    ready = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    job = _Job(None, find(valid, "valid")[0], "", ready, window, control_tokens)
    return job.corpus(cache_dir, "", f"the validation text {valid}")


def prepare_run(settings: Mapping[str, Any], *, window: int) -> Corpus:
    """Prepare the text of a training run by the settings in its `run.json`; of a streamed run, the validation text.

    The corpus's fingerprint is the `text` of `run.json`, or the part of it in front of a `+`.
    """
    given: dict[str, Any] = {
        "tokenizer": settings["corpus.tokenizer"],
        "window": window,
        "control_tokens": bool(settings.get("corpus.control_tokens")),
    }
    if settings.get("corpus.stream"):
        return prepare_valid(settings["corpus.valid"], **given)
    return prepare(settings["corpus.data"], valid=settings["corpus.valid"], **given)


@dataclass(frozen=True)
class _Job:
    """The making of the token files, and all that determines them.

    Without `data` there is only a validation side, without `valid` it is split off. Without `tokenizer` one is trained,
    as `spec` says.
    """

    data: Source | None
    valid: Source | None
    spec: str
    tokenizer: PreTrainedTokenizerFast | None
    window: int
    control_tokens: bool

    def key(self) -> str:
        if self.tokenizer is None:
            ids = f"bpe:{bpe_size(self.spec)} tokenizers {tokenizers.__version__}"
        else:
            ids = f"{self.tokenizer.eos_token_id} {self.tokenizer.backend_tokenizer.to_str()}"
        data = None if self.data is None else self.data.key()
        parts = [_FORMAT, data, VALID_SHARE if self.valid is None else self.valid.key(), ids, self.control_tokens]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()

    def corpus(self, cache_dir: Path | None, train_name: str, valid_name: str) -> Corpus:
        """Load the corpus from the cache, after building it there if needed. The names are for messages."""
        folder = (cache_dir or default_cache_dir()) / self.key()
        meta = load_or_build(folder, _load_meta, self.build)

        def windows(side: str, name: str) -> PackedWindows:
            tokens = meta["sides"][side]["tokens"]
            if tokens < self.window:
                smaller = f"or a window of at most {tokens}" if tokens > 1 else "no window is small enough"
                raise UserError(
                    f"{name} holds {tokens} tokens, fewer than a window of {self.window}; give more text, {smaller}"
                )
            return PackedWindows(folder / f"{side}.bin", meta["dtype"], self.window)

        train = None if self.data is None else windows("train", train_name)
        valid, size = windows("valid", valid_name), meta["sides"]["valid"]
        return Corpus(
            train=train or valid,
            valid=valid,
            tokenizer=self.tokenizer or wrap(tokenizers.Tokenizer.from_file(str(folder / _TOKENIZER))),
            train_tokens=meta["sides"].get("train", size)["tokens"],
            valid_tokens=size["tokens"],
            valid_bytes_per_token=size["bytes"] / size["tokens"],
            fingerprint=meta["fingerprint"],
        )

    def build(self, folder: Path) -> None:
        sides: dict[str, Text] = {}
        if self.data is not None:
            sides["train"] = whole(self.data)
            if self.valid is None:
                sides["train"], sides["valid"] = split_off_end(sides["train"])
        if self.valid is not None:
            sides["valid"] = whole(self.valid)
        tokenizer = self.tokenizer
        if tokenizer is None:
            texts = (chunk.text for _, chunk in sides["train"].chunks(f"training {self.spec}") if chunk.text)
            tokenizer = load_tokenizer(self.spec, texts)
            tokenizer.backend_tokenizer.save(str(folder / _TOKENIZER))
        encoder = TextEncoder(tokenizer, self.control_tokens)
        dtype, digest = smallest_dtype(tokenizer), hashlib.blake2b(digest_size=16)
        sizes = {
            side: write_tokens(text.chunks(f"tokenising {side}"), encoder, folder / f"{side}.bin", dtype, digest)
            for side, text in sides.items()
        }
        (folder / _META).write_text(json.dumps({"dtype": dtype, "fingerprint": digest.hexdigest(), "sides": sizes}))
        sync(folder / _META)


def _load_meta(folder: Path) -> dict[str, Any] | None:
    """Read `{dtype, fingerprint, sides: {side: {tokens, bytes}}}`; None unless all files are there, and whole."""
    try:
        meta: dict[str, Any] = json.loads((folder / _META).read_text())
        sizes = {side: of["tokens"] * np.dtype(meta["dtype"]).itemsize for side, of in meta["sides"].items()}
        whole = all((folder / f"{side}.bin").stat().st_size == size for side, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return meta if whole and "fingerprint" in meta else None
