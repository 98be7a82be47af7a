"""A corpus's documents in one file on disk, cut into chunks that are tokenised at once, and into two sides."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from vwn.common.errors import UserError
from vwn.data.reading import SEPARATOR, Chunk, line_end
from vwn.data.sources import Source

CHUNK_CHARACTERS = 1 << 16
_END = " " * len(SEPARATOR)
"""Stands for the end of a document where characters are counted. Its length decides where chunks and sides are cut."""
_ENCODING: Any = {"encoding": "utf-8", "errors": "surrogatepass"}  # names of files may be undecodable


class TextChunk(NamedTuple):
    """A document, or a part of a long one; the last part `ends` it. `file` is where it is from."""

    file: str
    text: str
    ends: bool


@dataclass(frozen=True)
class TextRange:
    """Characters `start` to `stop` of the corpus in the file `path`, which has a chunk in every line."""

    path: Path
    start: int
    stop: int

    def chunks(self) -> Iterator[TextChunk]:
        """Read the text in order. A chunk that is cut at `stop` does not end its document."""
        for begin, end, chunk in self.places():
            if begin >= self.stop:
                return
            if end > self.start:
                text = chunk.text[max(self.start - begin, 0) : self.stop - begin]
                yield TextChunk(chunk.file, text, chunk.ends and end <= self.stop)

    def places(self) -> Iterator[tuple[int, int, TextChunk]]:
        """Read all chunks of the file, each with its first character and the one behind its last."""
        end = 0
        with open(self.path, **_ENCODING) as file:
            for line in file:
                chunk = TextChunk(*json.loads(line))
                begin, end = end, end + _length(chunk)
                yield begin, end, chunk


def _length(chunk: TextChunk) -> int:
    return len(chunk.text) + (len(_END) if chunk.ends else 0)


def spool(source: Source, path: Path) -> TextRange:
    """Read `source` once into the file `path`. Raises `UserError` if it has no text."""
    title = f"reading {Path(source.name).name}"
    size = characters = 0
    with open(path, "w", **_ENCODING) as file, tqdm(unit="char", unit_scale=True, desc=title) as bar:
        for chunk in in_chunks(source.chunks()):
            file.write(json.dumps(chunk, ensure_ascii=False) + "\n")
            size += _length(chunk)
            characters += len(chunk.text)
            bar.update(len(chunk.text))
    if not characters:
        raise UserError(f"{source.name} is empty; give a source with text in it")
    return TextRange(path, 0, size)


def split_off_end(whole: TextRange, valid_fraction: float) -> tuple[TextRange, TextRange]:
    """Cut off the last `valid_fraction` of the characters as validation text; nothing is random.

    The cut is at the nearest end of a document; where that would leave less than half or more than twice the fraction
    (few, long documents), at the end of a line; where there are no lines either, at the character.
    """
    target = round(whole.stop * (1 - valid_fraction))
    document_ends = (end for _, end, chunk in whole.places() if chunk.ends)
    for cut in (min(document_ends, key=lambda end: abs(end - target)), _line_end(whole, target)):
        if valid_fraction / 2 <= 1 - cut / whole.stop <= valid_fraction * 2:
            break
    else:
        cut = target
    return replace(whole, stop=cut), replace(whole, start=cut)


def _line_end(whole: TextRange, target: int) -> int:
    begin, chunk = next((begin, chunk) for begin, end, chunk in whole.places() if end >= target)
    return begin + line_end(chunk.text, 0, target - begin)


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
    """Find the last line end within a chunk's length of `start`, else that length, or the document's end around it."""
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
