"""A corpus's documents in one file on disk, cut into chunks that are tokenised at once, and into two sides."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import NamedTuple

from tqdm.auto import tqdm

from vwn.common.errors import UserError
from vwn.data.reading import SEPARATOR, Chunk, line_end
from vwn.data.sources import Source

CHUNK_CHARACTERS = 1 << 16
_END = " " * len(SEPARATOR)
"""Stands for the end of a document where characters are counted. Its length decides where chunks and sides are cut."""


class TextChunk(NamedTuple):
    """A document, or a part of a long one; the last part `ends` it. `file` is where it is from."""

    file: str
    text: str
    ends: bool


@dataclass(frozen=True)
class Spool:
    """Chunks of text on disk, in order: for each its end in bytes of the file and in characters of the corpus, whether
    it ends a document, and the number of its file among `files`."""

    path: Path
    byte_ends: array[int]
    ends: array[int]
    is_last: bytearray
    file_numbers: array[int]
    files: list[str]

    def read(self, first: int) -> Iterator[TextChunk]:
        """Read the chunks from number `first` on."""
        with open(self.path, "rb") as file:
            begin = file.seek(self.byte_ends[first - 1] if first else 0)
            for number in range(first, len(self.ends)):
                text = file.read(self.byte_ends[number] - begin).decode()
                begin = self.byte_ends[number]
                yield TextChunk(self.files[self.file_numbers[number]], text, bool(self.is_last[number]))


@dataclass(frozen=True)
class TextRange:
    """Characters `start` to `stop` of a corpus."""

    spool: Spool
    start: int
    stop: int

    def chunks(self) -> Iterator[TextChunk]:
        """Read the text in order. A chunk that is cut at `stop` does not end its document."""
        ends = self.spool.ends
        first = bisect_right(ends, self.start)
        begin = ends[first - 1] if first else 0
        for end, chunk in zip(ends[first:], self.spool.read(first), strict=True):
            if begin >= self.stop:
                return
            text = chunk.text[max(self.start - begin, 0) : self.stop - begin]
            yield TextChunk(chunk.file, text, chunk.ends and end <= self.stop)
            begin = end


def spool(source: Source, path: Path) -> TextRange:
    """Read `source` once into the file `path`. Raises `UserError` if it has no text."""
    result = Spool(path, array("q"), array("q"), bytearray(), array("q"), [])
    title = f"reading {Path(source.name).name}"
    position = size = 0
    with open(path, "wb") as file, tqdm(unit="char", unit_scale=True, desc=title) as bar:
        for name, text, ends in in_chunks(source.chunks()):
            if name not in result.files[-1:]:
                result.files.append(name)
            result.file_numbers.append(len(result.files) - 1)
            size += file.write(text.encode())
            position += len(text) + (len(_END) if ends else 0)
            result.byte_ends.append(size)
            result.ends.append(position)
            result.is_last.append(ends)
            bar.update(len(text))
    if not size:
        raise UserError(f"{source.name} is empty; give a source with text in it")
    return TextRange(result, 0, position)


def split_off_end(whole: TextRange, valid_fraction: float) -> tuple[TextRange, TextRange]:
    """Cut off the last `valid_fraction` of the characters as validation text; nothing is random.

    The cut is at the nearest end of a document; where that would leave less than half or more than twice the fraction
    (few, long documents), at the end of a line; where there are no lines either, at the character.
    """
    target = round(whole.stop * (1 - valid_fraction))
    document_ends = compress(whole.spool.ends, whole.spool.is_last)
    for cut in (min(document_ends, key=lambda end: abs(end - target)), _line_end(whole.spool, target)):
        if valid_fraction / 2 <= 1 - cut / whole.stop <= valid_fraction * 2:
            break
    else:
        cut = target
    return replace(whole, stop=cut), replace(whole, start=cut)


def _line_end(corpus: Spool, target: int) -> int:
    number = bisect_left(corpus.ends, target)
    begin = corpus.ends[number - 1] if number else 0
    return begin + line_end(next(corpus.read(number)).text, 0, target - begin)


def in_chunks(chunks: Iterable[tuple[str, Chunk]]) -> Iterator[TextChunk]:
    """Cut the documents into chunks of about `CHUNK_CHARACTERS`, whatever the chunks they came in.

    Cuts are at the last line end in every `CHUNK_CHARACTERS` of the whole text, and at every end of a document.
    """
    held: list[str] = []
    ends: list[tuple[int, str]] = []  # of documents in what is held, each with its file
    size, file = 0, ""
    for file, chunk in chunks:
        held.append(chunk.text)
        size += len(chunk.text)
        if chunk.ends:
            ends.append((size, file))
            held.append(_END)
            size += len(_END)
        if size >= 2 * CHUNK_CHARACTERS:
            joined, start = "".join(held), 0
            while size - start >= 2 * CHUNK_CHARACTERS:
                stop = _cut(joined, ends, start)
                yield from _between(joined, ends, start, stop, file)
                start = stop
            held, size = [joined[start:]], size - start
            ends = [(end - start, name) for end, name in ends if end >= start]
    yield from _between("".join(held), ends, 0, size, file)


def _cut(joined: str, ends: list[tuple[int, str]], start: int) -> int:
    """The last line end within a chunk's length of `start`, else that length, or the end of a document around it."""
    limit = start + CHUNK_CHARACTERS
    found = line_end(joined, start, limit)
    if found < limit:
        return found
    return next((end for end, _ in ends if start < end < limit < end + len(_END)), limit)


def _between(joined: str, ends: list[tuple[int, str]], start: int, stop: int, file: str) -> Iterator[TextChunk]:
    """Yield the documents between two places, and the beginning of one that ends behind them."""
    for end, name in ends:
        if start <= end < stop:
            yield TextChunk(name, joined[start:end], ends=True)
            start = end + len(_END)
    if start < stop:
        yield TextChunk(file, joined[start:stop], ends=False)
