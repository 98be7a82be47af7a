"""A corpus as one stream of text: chunks on disk as a data set of `datasets`, cut into training and validation."""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from tqdm.auto import tqdm

from vwn.common.errors import UserError
from vwn.data.reading import SEPARATOR
from vwn.data.sources import Source, quiet

if TYPE_CHECKING:
    from datasets import Dataset

CHUNK_CHARACTERS = 1 << 16


@dataclass(frozen=True)
class TextStream:
    """Characters `start` to `stop` of a corpus on disk, every document of which ends in `SEPARATOR`.

    `row_ends` and `document_ends` are positions in the corpus, in characters, increasing.
    """

    rows: Dataset
    row_ends: array[int]
    document_ends: array[int]
    start: int
    stop: int

    def chunks(self) -> Iterator[str]:
        """The text in order, in chunks of some 64 Ki characters, no separator astride two of them."""
        for index in range(bisect_right(self.row_ends, self.start), len(self.row_ends)):
            text: str = self.rows[index]["text"]
            begin = self.row_ends[index] - len(text)
            if begin >= self.stop:
                return
            yield text[max(self.start - begin, 0) : self.stop - begin]

    def segments(self) -> Iterator[str]:
        """The text without its separators, in pieces that never span two documents."""
        return (segment for chunk in self.chunks() for segment in chunk.split(SEPARATOR) if segment)


def spool(source: Source, folder: Path) -> TextStream:
    """Read `source` once into a memory-mapped data set in `folder`, a new one. Raises `UserError` if it has no text."""
    import datasets
    from datasets.exceptions import DatasetGenerationError

    try:
        with quiet(bars=False):
            data = datasets.Dataset.from_generator(
                _rows,
                gen_kwargs={"source": source},
                features=datasets.Features({"text": datasets.Value("string")}),
                cache_dir=str(folder),
                writer_batch_size=64,
            )
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None
    return _whole(data)


def _rows(source: Source) -> Iterator[dict[str, str]]:
    title = f"reading {Path(source.name).name}"
    with tqdm(total=source.size, unit=source.unit, unit_scale=True, desc=title) as bar:
        is_empty = True
        for chunk in chunked(source.texts(bar.update)):
            is_empty = is_empty and not chunk.replace(SEPARATOR, "")
            yield {"text": chunk}
    if is_empty:
        raise UserError(f"{source.name} is empty; give a source with text in it")


def _whole(rows: Dataset) -> TextStream:
    row_ends, document_ends = array("q"), array("q")
    position = 0
    for row in cast("Iterable[dict[str, str]]", rows):
        text = row["text"]
        document_ends.extend(position + match.end() for match in re.finditer(re.escape(SEPARATOR), text))
        position += len(text)
        row_ends.append(position)
    return TextStream(rows, row_ends, document_ends, 0, position)


def split_off_end(whole: TextStream, valid_fraction: float) -> tuple[TextStream, TextStream]:
    """Cut off the last `valid_fraction` of the characters as validation text; nothing is random.

    The cut is at the nearest end of a document; where that would leave less than half or more than twice the fraction
    (few, long documents), at the end of a line; where there are no lines either, at the character.
    """
    target = round(whole.stop * (1 - valid_fraction))
    for cut in (_nearest(whole.document_ends, target), _line_end(whole, target)):
        if valid_fraction / 2 <= 1 - cut / whole.stop <= valid_fraction * 2:
            break
    else:
        cut = target
    return replace(whole, stop=cut), replace(whole, start=cut)


def _nearest(positions: array[int], target: int) -> int:
    after = bisect_left(positions, target)
    return min(positions[max(after - 1, 0) : after + 1], key=lambda position: abs(position - target))


def _line_end(whole: TextStream, target: int) -> int:
    index = bisect_left(whole.row_ends, target)
    text: str = whole.rows[index]["text"]
    begin = whole.row_ends[index] - len(text)
    return begin + safe_cut(text, 0, target - begin)


def chunked(texts: Iterable[str]) -> Iterator[str]:
    """The same text in chunks of about `CHUNK_CHARACTERS`, cut as `safe_cut` does whatever the pieces it came in."""
    held: list[str] = []
    size = 0
    for text in texts:
        held.append(text)
        size += len(text)
        if size >= 2 * CHUNK_CHARACTERS:
            joined, start = "".join(held), 0
            while len(joined) - start >= 2 * CHUNK_CHARACTERS:
                stop = safe_cut(joined, start, start + CHUNK_CHARACTERS)
                yield joined[start:stop]
                start = stop
            held = [joined[start:]]
            size = len(held[0])
    if size:
        yield "".join(held)


def safe_cut(text: str, start: int, limit: int) -> int:
    """The last line end in `(start, limit]`, else `limit`, or just before it where a separator would be cut in two."""
    line = text.rfind("\n", start, limit) + 1
    if line > start:
        return line
    reach = len(SEPARATOR) - 1
    separator = text.find(SEPARATOR, max(limit - reach, start), limit + reach)
    return separator if start < separator < limit else limit
