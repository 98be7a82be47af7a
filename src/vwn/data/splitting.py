"""A text that is prepared, and the end of it that becomes validation text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm.auto import tqdm

from vwn.common.errors import UserError
from vwn.data.reading import SEPARATOR, Chunk
from vwn.data.sources import VALID_SHARE, Source

_END = len(SEPARATOR)
"""Characters that the end of a document counts as; the place where a text is split depends on it."""


@dataclass(frozen=True)
class Text:
    """Characters `start` to `stop` of a source."""

    source: Source
    start: int
    stop: int

    def chunks(self, title: str) -> Iterator[tuple[str, Chunk]]:
        """Read in order, with a progress bar. A chunk that is cut at `stop` does not end its document."""
        with tqdm(total=self.stop - self.start, unit="char", unit_scale=True, desc=title) as bar:
            for begin, end, file, chunk in _places(self.source):
                if begin >= self.stop:
                    return
                if end > self.start:
                    text = chunk.text[max(self.start - begin, 0) : self.stop - begin]
                    yield file, chunk._replace(text=text, ends=chunk.ends and end <= self.stop)
                    bar.update(min(end, self.stop) - max(begin, self.start))


def _places(source: Source) -> Iterator[tuple[int, int, str, Chunk]]:
    """Read all chunks, each with its first character and the one behind its last."""
    end = 0
    for file, chunk in source.chunks():
        begin, end = end, end + len(chunk.text) + _END * chunk.ends
        yield begin, end, file, chunk


def whole(source: Source) -> Text:
    """Measure all of a source. Raises `UserError` if it has no text."""
    stop = 0
    with tqdm(unit="char", unit_scale=True, desc=f"reading {Path(source.name).name}") as bar:
        for begin, stop, _, _ in _places(source):
            bar.update(stop - begin)
    if not stop:
        raise UserError(f"{source.name} is empty; give a source with text in it")
    return Text(source, 0, stop)


def split_off_end(text: Text) -> tuple[Text, Text]:
    """Cut off the last `VALID_SHARE` of the characters as validation text; nothing is random.

    The cut is at the nearest end of a document; where that would leave less than half or more than twice as much
    (few, long documents), at the end of a line; where there are no lines either, at the character.
    """
    target = round(text.stop * (1 - VALID_SHARE))
    document, line = 0, target
    for begin, end, _, chunk in _places(text.source):
        if begin < target and (found := chunk.text.rfind("\n", 0, target - begin)) >= 0:
            line = begin + found + 1
        if chunk.ends and abs(end - target) < abs(document - target):
            document = end
        if chunk.ends and end >= target:
            break
    cut = next((cut for cut in (document, line) if VALID_SHARE / 2 <= 1 - cut / text.stop <= VALID_SHARE * 2), target)
    return replace(text, stop=cut), replace(text, start=cut)
