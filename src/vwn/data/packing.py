"""Token ids on disk: a flat file of the smallest unsigned type, written once, read as windows through a memory map."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from vwn.data.reading import SEPARATOR

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CHUNKS_PER_BATCH = 16


class PackedWindows(Dataset[dict[str, torch.Tensor]]):
    """Consecutive windows of a file of token ids, without overlap; what is left at the end is dropped.

    Item `i` is `{"input_ids": LongTensor [window], "labels": the same}`, tokens `i * window` to `(i + 1) * window` of
    the stream; the model shifts the labels. The file stays on disk, also when the data set is sent to a worker.
    """

    def __init__(self, path: Path, dtype: str, window: int):
        self.path, self.dtype, self.window = path, dtype, window
        self._tokens = np.memmap(path, dtype=dtype, mode="r")

    def __len__(self) -> int:
        return len(self._tokens) // self.window

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"window {index} of {size}")
        start = index % size * self.window
        ids = torch.from_numpy(self._tokens[start : start + self.window].astype(np.int64))
        return {"input_ids": ids, "labels": ids.clone()}

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedWindows, (self.path, self.dtype, self.window)


class Digest(Protocol):
    """A hash of `hashlib`."""

    def update(self, data: bytes, /) -> None: ...


@dataclass(frozen=True)
class Written:
    """What `write_tokens` wrote: tokens, and the bytes of UTF-8 they stand for (ends of text stand for none)."""

    tokens: int
    bytes: int


def smallest_dtype(tokenizer: PreTrainedTokenizerFast) -> str:
    """The smallest unsigned NumPy type that holds every id of the tokeniser."""
    return np.min_scalar_type(max(tokenizer.get_vocab().values())).name


def write_tokens(
    chunks: Iterable[str], tokenizer: PreTrainedTokenizerFast, path: Path, dtype: str, digest: Digest
) -> Written:
    """Tokenise text whose documents end in `SEPARATOR`; each that is not empty ends in the end-of-text id."""
    tokens = size = 0
    with open(path, "wb") as file:
        for ids, read in _encode(chunks, tokenizer):
            data = np.asarray(ids, dtype=dtype).tobytes()
            file.write(data)
            digest.update(data)
            tokens += len(ids)
            size += read
        file.flush()
        os.fsync(file.fileno())
    return Written(tokens, size)


def _encode(chunks: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[list[int], int]]:
    """Batches of ids, each with the bytes of UTF-8 it stands for."""
    remaining = iter(chunks)
    end: Any = tokenizer.eos_token_id
    is_open = False
    while batch := list(islice(remaining, _CHUNKS_PER_BATCH)):
        parts = [chunk.split(SEPARATOR) for chunk in batch]
        texts = [text for part in parts for text in part if text]
        # The fast form keeps no character offsets, which would be most of the memory.
        encoded = iter(tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        ids: list[int] = []
        for part in parts:
            for number, text in enumerate(part):
                if number and is_open:
                    ids.append(end)
                    is_open = False
                if text:
                    ids.extend(next(encoded).ids)
                    is_open = True
        yield ids, sum(len(text.encode()) for text in texts)
