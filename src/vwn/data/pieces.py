"""Reading a part of a file, from any place in it: what a lane of streamed data does, and continues after a restart."""

from __future__ import annotations

import io
import lzma
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from vwn.common.errors import UserError
from vwn.data.reading import (
    SEPARATOR,
    _not_utf8,
    _parse_row,
    document,
    first_line,
    kind,
    string_columns,
    text_column,
)
from vwn.data.stream import safe_cut

PIECE = 1 << 15
"""Bytes of text, or characters of a row, that are tokenised at once; longer documents are cut at line ends."""
_SEPARATOR = SEPARATOR.encode()
_BATCH_BYTES = 1 << 20
_BUFFER = 1 << 18  # of packed bytes; without it a whole column of a row group is held


@dataclass(frozen=True)
class Unit:
    """What one lane reads before it goes on to another: a part of a file.

    ``start`` to ``stop`` are bytes of text and JSON lines, row groups of Parquet, and nothing where the file is packed
    (``stop`` 0 reads all). Of these every ``parts``-th is its own: of blocks of ``block`` bytes, or of rows.
    """

    path: Path
    start: int = 0
    stop: int = 0
    part: int = 0
    parts: int = 1
    block: int = PIECE

    def owns(self, offset: int) -> bool:
        """Whether what begins there, a byte or (with ``block`` 1) a row, belongs to this unit."""
        return offset // self.block % self.parts == self.part


Skipped = Callable[[str], None]
"""Told of a row that cannot be read, in a sentence; it is left out."""


class Piece(NamedTuple):
    """Text that begins at ``offset``, from where it can be read again; ``ends`` where a document ends with it."""

    offset: int
    text: str
    ends: bool


def read_pieces(unit: Unit, offset: int = 0, skipped: Skipped | None = None) -> Iterator[Piece]:
    """The unit's text in order from ``offset`` (of a piece that it gave, or 0) on. Empty documents are passed over.

    Every byte between documents belongs to exactly one of the units that share a file. A document that two of them
    share is cut at a line end and read as two. Raises ``UserError`` for a file that cannot be read, and for a row (of
    plain text: a piece) that cannot be read, unless ``skipped`` is there to be told.
    """
    suffix = kind(unit.path)
    read = _text if suffix in ("", ".txt", ".txt.xz") else _parquet if suffix == ".parquet" else _json_lines
    try:
        yield from read(unit, offset, skipped)
    except (lzma.LZMAError, EOFError) as error:
        raise UserError(f"{unit.path} is not a complete .xz file ({error}); pack it again with xz") from error
    except OSError as error:
        raise UserError(f"{unit.path} cannot be read: {error.strerror or error}") from error


def cut(text: str) -> list[tuple[str, bool]]:
    """A row's text in parts that are tokenised at once, each with whether a document ends with it."""
    parts: list[tuple[str, bool]] = []
    for document_ in text.split(SEPARATOR):
        start = 0
        while len(document_) - start > PIECE:
            stop = safe_cut(document_, start, start + PIECE)
            parts.append((document_[start:stop], False))
            start = stop
        if document_:
            parts.append((document_[start:], True))
    return parts


def row_text(find: Callable[[], str | None], skipped: Skipped | None) -> str | None:
    """A row's text by ``find``; none where it is empty, or left out as it cannot be read."""
    try:
        return find()
    except UserError as error:
        if skipped is None:
            raise UserError(f"{error}, or leave such rows out (--skip-bad-rows 100)") from error
        skipped(str(error))
        return None


def document_of(value: object, where: str) -> str | None:
    """A row's value as a document's text; none where it is empty."""
    return next(document(value, where), None)


class _Window:
    """A file read forwards, with a look ahead; ``offset`` is where the look begins."""

    def __init__(self, file: IO[bytes], offset: int, stop: int):
        self._file, self.offset, self._stop = file, offset, stop
        self._held, self._first = b"", 0
        file.seek(offset)

    def peek(self, count: int) -> bytes:
        if len(self._held) - self._first < count:
            have = len(self._held) - self._first
            wanted = max(count, 4 * PIECE) - have
            if self._stop:
                wanted = min(wanted, self._stop - self.offset - have)
            self._held, self._first = self._held[self._first :] + self._file.read(max(wanted, 0)), 0
        return self._held[self._first : self._first + count]

    def skip(self, count: int) -> None:
        self._first += count
        self.offset += count


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], lzma.open(path)) if kind(path).endswith(".xz") else open(path, "rb")


def _text(unit: Unit, offset: int, skipped: Skipped | None) -> Iterator[Piece]:
    with _open(unit.path) as file:
        start, stop = (_after_text(file, x) if unit.stop else 0 for x in (unit.start, unit.stop))
        if unit.stop and start >= stop:
            return
        window = _Window(file, max(start, offset), stop)
        while block := window.peek(PIECE + len(_SEPARATOR)):
            size, after, ends = _first_piece(block)
            begin = window.offset
            window.skip(after)
            if size and unit.owns(begin):
                text = row_text(partial(_utf8, block[:size], begin, unit.path), skipped)
                if text is not None:
                    yield Piece(begin, text, ends or not unit.owns(window.offset))


def _first_piece(block: bytes) -> tuple[int, int, bool]:
    """Bytes of the first piece, bytes to its successor, and whether a document ends with it."""
    found = block.find(_SEPARATOR)
    if found >= 0:
        return found, found + len(_SEPARATOR), True
    if len(block) <= PIECE:
        return len(block), len(block), True
    size = block.rfind(b"\n", 0, PIECE) + 1 or _character(block, PIECE)
    return size, size, False


def _character(block: bytes, limit: int) -> int:
    """The last place up to ``limit`` where a character of UTF-8 begins; ``limit`` where none does."""
    return next((i for i in range(limit, max(limit - 4, 0), -1) if block[i] & 0xC0 != 0x80), limit)


def _after_text(file: IO[bytes], offset: int) -> int:
    """The first place from ``offset`` on where a unit may begin: after a document, else a line, else a character."""
    size = file.seek(0, io.SEEK_END)
    if not 0 < offset < size:
        return min(max(offset, 0), size)
    first = max(offset - len(_SEPARATOR), 0)
    file.seek(first)
    block = file.read(PIECE + len(_SEPARATOR))
    for mark, reach in ((_SEPARATOR, len(_SEPARATOR)), (b"\n", 1)):
        found = block.find(mark, max(offset - reach - first, 0))
        if found >= 0:
            return first + found + len(mark)
    return next((first + i for i in range(offset - first, len(block)) if block[i] & 0xC0 != 0x80), size)


def _json_lines(unit: Unit, offset: int, skipped: Skipped | None) -> Iterator[Piece]:
    column = _json_column(unit.path)
    with _open(unit.path) as file:
        start, stop = (_after_line(file, x) if unit.stop else 0 for x in (unit.start, unit.stop))
        begin = max(start, offset)
        file.seek(begin)
        for line in file:
            if unit.stop and begin >= stop:
                return
            if unit.owns(begin) and line.strip():
                text = row_text(partial(_line_text, line, begin, unit.path, column), skipped)
                if text is not None:
                    yield Piece(begin, text, True)
            begin += len(line)


def _line_text(line: bytes, begin: int, path: Path, column: str) -> str | None:
    where = f"the line at byte {begin} of {path}"
    row = _parse_row(_decode(line, begin, path), where)
    if column not in row:
        raise UserError(f"{where} has no column {column!r}; give every line the columns of the first")
    return document_of(row[column], where)


def _after_line(file: IO[bytes], offset: int) -> int:
    if offset <= 0:
        return 0
    file.seek(offset - 1)
    return offset - 1 + len(file.readline())


@lru_cache(maxsize=1 << 14)
def _json_column(path: Path) -> str:
    """The column of a file, as its first line has it."""
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"line {number} of {path}"
                row = _parse_row(_decode(line, 0, path), where)
                return text_column({key: isinstance(value, str) for key, value in row.items()}, where)
    return "text"


def _decode(line: bytes, begin: int, path: Path) -> str:
    text = _utf8(line, begin, path)
    return text if begin else text.removeprefix("\ufeff")


def _utf8(block: bytes, begin: int, path: Path) -> str:
    try:
        return block.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, begin + error.start) from error


def _parquet(unit: Unit, offset: int, skipped: Skipped | None) -> Iterator[Piece]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(unit.path, buffer_size=_BUFFER, pre_buffer=False) as file:
            column = parquet_column(file, unit.path)
            row = 0
            for group in range(unit.start, unit.stop):
                rows = file.metadata.row_group(group).num_rows
                if row + rows <= offset:
                    row += rows
                    continue
                for value in _values(file, group, column):
                    if row >= offset and unit.owns(row):
                        where = f"row {row + 1} from row group {unit.start} of {unit.path}"
                        text = row_text(partial(document_of, value, where), skipped)
                        if text is not None:
                            yield Piece(row, text, True)
                    row += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{unit.path} is not a readable Parquet file ({first_line(error)}); write it again") from error


def parquet_column(file: Any, path: Path) -> str:
    """The column of text of an open Parquet file."""
    from datasets import Features

    return text_column(string_columns(Features.from_arrow_schema(file.schema_arrow)), str(path))


def _values(file: Any, group: int, column: str) -> Iterator[Any]:
    """The column's values in one row group, about a megabyte of them in memory at a time."""
    meta = file.metadata.row_group(group)
    at_once = min(max(_BATCH_BYTES * meta.num_rows // max(meta.total_byte_size, 1), 1), 1024)
    for batch in file.iter_batches(batch_size=at_once, row_groups=[group], columns=[column], use_threads=False):
        try:
            yield from batch.column(0).to_pylist()
        except UnicodeDecodeError:  # somewhere among them; what is not text is seen to row by row
            yield from map(_text_or_bytes, batch.column(0).cast("binary").to_pylist())


def _text_or_bytes(value: bytes | None) -> str | bytes | None:
    try:
        return value if value is None else value.decode("utf-8")
    except UnicodeDecodeError:
        return value
