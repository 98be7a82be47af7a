"""Tokenisers: bytes, a byte-level BPE trained on the corpus, or any saved or hub tokeniser with a fast form."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vwn.common.errors import UserError
from vwn.data.reading import SEPARATOR, first_line
from vwn.data.sources import quiet, refuse_undecodable

BYTES = "bytes"
_SMALLEST_BPE = 257  # 256 bytes and the end of text
_LARGEST_BPE = 1_000_000

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(spec: str, texts: Iterable[str] | None = None) -> PreTrainedTokenizerFast:
    """Load the tokeniser that `spec` names, with an end-of-text token; it decodes what it encodes to the same text.

    `bytes`: ids 0..255 are the bytes of UTF-8, 256 is `<|endoftext|>`. `bpe:N`: a byte-level BPE of at most `N` ids,
    trained on `texts` (fewer where the text has no more pairs that occur twice); on one machine always the same.
    Anything else is a folder or hub id for `AutoTokenizer`. Raises `UserError` for a spec that cannot be met.
    """
    if spec == BYTES:
        return wrap(_bytes())
    if (size := bpe_size(spec)) is not None:
        if texts is None:
            raise UserError(f"the tokenizer {spec!r} is trained on text; give the text, or a saved tokenizer")
        return wrap(_train_bpe(size, texts))
    return _load(spec)


def load_checkpoint_tokenizer(checkpoint: Path | str, spec: str | None = None) -> PreTrainedTokenizerFast:
    """Load the tokeniser that a checkpoint was saved with, or the one that `--tokenizer` names.

    Raises `UserError` where there is none, or it is yet to be trained.
    """
    if spec is not None:
        if bpe_size(spec):
            raise UserError(f"--tokenizer {spec} would be trained anew; give bytes, or a folder or hub id with one")
        return load_tokenizer(spec)
    folder = Path(checkpoint)
    if folder.is_dir() and not any((folder / name).exists() for name in _TOKENIZER_FILES):
        raise UserError(f"{checkpoint} holds no tokenizer; name the one it was trained with: --tokenizer FOLDER_OR_ID")
    try:
        return load_tokenizer(str(checkpoint))
    except UserError as error:
        raise UserError(
            f"{checkpoint} holds no tokenizer that can be used ({error.__cause__ or error}); name the one it was "
            "trained with: --tokenizer FOLDER_OR_ID"
        ) from error


class TextEncoder:
    """Encodes text to ids, without special tokens around it.

    Control tokens that are written in the text (`<s>`, `<|im_start|>`, all that the tokeniser marks as special) are
    text like any other, unless `control_tokens` asks for their ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, control_tokens: bool = False):
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # a copy: prompts keep their tokens
        self._backend.encode_special_tokens = not control_tokens
        self.end: Any = tokenizer.eos_token_id
        self._is_control = np.zeros(max(tokenizer.get_vocab().values()) + 1, dtype=bool)
        if not control_tokens:
            special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
            self._is_control[[*special, *tokenizer.all_special_ids]] = True
            if tokenizer.unk_token_id not in (None, self.end):
                self._is_control[tokenizer.unk_token_id] = False

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """Encode each text. Raises `UserError` for what the tokeniser does not know."""
        try:
            # The fast form keeps no character offsets, which would be most of the memory.
            encoded = [each.ids for each in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        except Exception as error:  # `tokenizers` raises nothing more special
            raise UserError(
                f"the tokenizer cannot encode the text ({first_line(error)}); give one that has an unknown token, or "
                "that knows every byte"
            ) from error
        return [
            self._encode_cut(text) if self._is_control[ids].any() else ids
            for text, ids in zip(texts, encoded, strict=True)
        ]

    def _encode_cut(self, text: str) -> list[int]:
        """Encode a text whose control tokens the tokeniser's model has as words of its own: cut each of them in two."""
        encoded = self._backend.encode(text, add_special_tokens=False)
        spans = [span for i, span in zip(encoded.ids, encoded.offsets, strict=True) if self._is_control[i]]
        if any(stop - start < 2 for start, stop in spans):
            start, stop = next(span for span in spans if span[1] - span[0] < 2)
            raise UserError(
                f"the tokenizer encodes {text[start:stop]!r} as a control token; replace it in the text, or allow it "
                "(--control-tokens)"
            )
        parts = [text[start:stop] for start, stop in pairwise([0, *(start + 1 for start, _ in spans), len(text)])]
        return [i for ids in self(parts) for i in ids]


def bpe_size(spec: str) -> int | None:
    """Parse the `N` of `bpe:N`; None for any other spec. Raises `UserError` where `N` is no usable size."""
    if spec.partition(":")[0] != "bpe":
        return None
    digits = re.fullmatch(r"bpe:(\d{1,7})", spec, re.ASCII)
    if digits is None or not _SMALLEST_BPE <= int(digits[1]) <= _LARGEST_BPE:
        raise UserError(
            f"the tokenizer {spec!r} has no usable size; give bpe:SIZE with a whole number from {_SMALLEST_BPE} to "
            f"{_LARGEST_BPE}, such as bpe:8192"
        )
    return int(digits[1])


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Wrap a tokeniser of `tokenizers` for transformers; `AutoTokenizer` loads what it saves."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SEPARATOR, clean_up_tokenization_spaces=False)


def _bytes() -> Tokenizer:
    # ByteLevel writes a byte as the character of that number where it is printable, the others in order from 256 on.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: ord(character) for character in alphabet if ord(character) < 256}
    unprintable = sorted(set(range(256)) - set(vocabulary.values()))
    vocabulary.update(zip(alphabet[len(vocabulary) :], unprintable, strict=True))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([SEPARATOR])
    return tokenizer


def _train_bpe(size: int, texts: Iterable[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,  # its bars write to standard output
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _load(spec: str) -> PreTrainedTokenizerFast:
    refuse_undecodable(spec)
    folder = Path(os.path.expanduser(spec))
    looks_local = spec.startswith((".", "/", "~")) or os.path.exists(folder)
    if not spec or (looks_local and not os.path.isdir(folder)):
        raise UserError(f"the tokenizer {spec!r} is not a folder; give {BYTES!r}, 'bpe:8192', a folder or a hub id")
    import vwn.hf  # noqa: F401  a run's folder says of what type its model is: known here, or its code would be asked for

    try:
        with quiet():
            path = str(folder) if os.path.isdir(folder) else spec
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)  # refuses where it would ask
    except Exception as error:  # `tokenizers` raises bare Exception for a damaged file
        raise UserError(
            f"the tokenizer {spec!r} cannot be loaded ({first_line(error)}); give {BYTES!r}, 'bpe:8192', a folder that "
            "save_pretrained wrote, or a hub id"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"the tokenizer {spec!r} has no fast form (tokenizer.json); convert it, or give another")
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer {spec!r} has no end-of-text token; set its eos_token and save it again")
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer
