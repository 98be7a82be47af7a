"""Readers: a fixed number, each with its own file ranges of every source."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import numpy as np

from vwn.common.errors import UserError
from vwn.data.reading import Chunk, FileRange, OnBadRow
from vwn.data.stream.source import StreamedSource

Position = tuple[int, int, int, int]
"""File ranges begun, offset in the range, number of the chunk from there, tokens of the chunk that are used up."""
START: Position = (0, 0, 0, 0)
_LEAST = 16
_logger = logging.getLogger(__name__)

Encode = Callable[[str], list[int]]


def reader_count(batch: int) -> int:
    """Return the smallest multiple of the global batch (in windows) that is at least 16."""
    return batch * -(-_LEAST // batch)


def reader_of(step: int, slot: int, batch: int) -> int:
    """Return the reader that fills a slot of a step's global batch."""
    return step % (reader_count(batch) // batch) * batch + slot


class Reader:
    """An endless row of tokens from one source, each document with its end of text.

    The n-th file range of reader `index` is number `index + n * readers` of the endless sequence of passes over the
    source: in a pass each range is read by one reader, and all readers begin a new pass at about the same time.
    """

    def __init__(
        self,
        source: StreamedSource,
        index: int,
        readers: int,
        encode: Encode,
        end: int,
        seed: int,
        position: Position,
        on_bad_row: OnBadRow | None = None,
    ):
        self._source, self._index, self._readers, self._seed = source, index, readers, seed
        self._encode, self._end, self._on_bad_row = encode, end, on_bad_row
        self._chunks, self._taken = self._read(*position[:3]), position[3]
        self._at, self._ids = next(self._chunks)  # to continue: the chunk again, without what is used up

    @property
    def position(self) -> Position:
        """Place of the next token; a new reader that starts there goes on with it."""
        return (*self._at, self._taken)

    def take(self, count: int) -> np.ndarray:
        """Return the next tokens, `[count]`."""
        taken = np.empty(count, dtype=np.int64)
        filled = 0
        while filled < count:
            if self._taken == len(self._ids):
                (self._at, self._ids), self._taken = next(self._chunks), 0
            size = min(count - filled, len(self._ids) - self._taken)
            taken[filled : filled + size] = self._ids[self._taken : self._taken + size]
            self._taken += size
            filled += size
        return taken

    def _read(self, count: int, offset: int, first: int) -> Iterator[tuple[tuple[int, int, int], np.ndarray]]:
        """Yield chunks as tokens, each with its place."""
        while True:
            part = self._source.range_at(self._index + count * self._readers, self._seed)
            for chunk in self._source.read(part, offset, self._on_bad_row):
                if (chunk.offset, chunk.number) >= (offset, first) and (ids := self._encoded(chunk, part)):
                    yield (count, chunk.offset, chunk.number), np.asarray(ids, dtype=np.int64)
            count, offset, first = count + 1, 0, 0
            if not self._index and self._pass(count) > self._pass(count - 1):
                _logger.info("%s has ended: pass %d of it begins", self._source.name, self._pass(count) + 1)

    def _pass(self, count: int) -> int:
        return (self._index + count * self._readers) // len(self._source.ranges)

    def _encoded(self, chunk: Chunk, part: FileRange) -> list[int]:
        """Return the chunk's tokens, with the end of text if it ends a document; none if it is left out."""
        try:
            ids = self._encode(chunk.text)
        except UserError as error:
            where = f"{part.path}, {'row' if part.block == 1 else 'byte'} {chunk.offset}"
            refusal = UserError(f"{where}: {error}")
            if self._on_bad_row is None:
                raise refusal from error
            self._on_bad_row(refusal)
            if not chunk.number:  # nothing of the document was given before
                return []
            ids = []
        return [*ids, self._end] if chunk.ends else ids
