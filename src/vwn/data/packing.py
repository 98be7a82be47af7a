"""Token ids on disk: a flat file of the smallest unsigned type, written once, read as windows through a memory map."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from vwn.common.errors import UserError
from vwn.common.files import sync

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from vwn.data.reading import Chunk
    from vwn.data.tokenizer import TextEncoder

_BATCH_CHARACTERS = 1 << 20


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


def spread(dataset: Any, count: int) -> Any:
    """Choose at most ``count`` items (at least one), evenly spread, always the same."""
    count = max(1, min(count, len(dataset)))
    return Subset(dataset, [i * len(dataset) // count for i in range(count)])


def smallest_dtype(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the smallest unsigned NumPy type that holds every id of the tokeniser."""
    return np.min_scalar_type(max(tokenizer.get_vocab().values())).name


def write_tokens(
    chunks: Iterable[tuple[str, Chunk]], encoder: TextEncoder, path: Path, dtype: str, digest: Any
) -> dict[str, int]:
    """Tokenise documents to a file; each that is not empty ends in the end-of-text id. `digest` is of `hashlib`.

    Returns the numbers of `tokens` written and of the `bytes` of UTF-8 they stand for (ends of text stand for none).
    Raises `UserError`, which names the file, for text that the tokeniser cannot encode.
    """
    tokens = size = 0
    is_open = False
    with open(path, "wb") as file:
        for batch in _batches(chunks):
            for (_, chunk), ids in zip(batch, _encode(batch, encoder), strict=True):
                is_open = is_open or bool(chunk.text)
                if chunk.ends and is_open:
                    ids = [*ids, encoder.end]
                    is_open = False
                data = np.asarray(ids, dtype=dtype).tobytes()
                file.write(data)
                digest.update(data)
                tokens += len(ids)
                size += len(chunk.text.encode())
    sync(path)
    return {"tokens": tokens, "bytes": size}


def _batches(chunks: Iterable[tuple[str, Chunk]]) -> Iterator[list[tuple[str, Chunk]]]:
    """Group the chunks that are tokenised in one call, which runs on all cores."""
    batch: list[tuple[str, Chunk]] = []
    size = 0
    for file, chunk in chunks:
        batch.append((file, chunk))
        size += len(chunk.text) + 1
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(batch: list[tuple[str, Chunk]], encoder: TextEncoder) -> list[list[int]]:
    try:
        return encoder([chunk.text for _, chunk in batch])
    except UserError:
        for file, chunk in batch:
            try:
                encoder([chunk.text])
            except UserError as error:
                raise UserError(f"{file}: {error}") from error
        raise
