"""Reading documents from a file of text, JSON lines or Parquet: all of it, or a range of it from any place on.

A file is a sequence of documents: the rows of JSON lines and Parquet, and what `SEPARATOR` separates in a `.txt`. Any
other text, and text inside a row, is never split. Long documents come in chunks, in which they are tokenised.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from vwn.common.errors import UserError
from vwn.common.extras import require_packages
from vwn.data.unpacking import PACKINGS, move_to, open_unpacked, packing, refuse_unreadable

SEPARATOR = "<|endoftext|>"
SUFFIXES = (*(kind + pack for kind in (".txt", ".jsonl") for pack in ("", *PACKINGS)), ".parquet")
KINDS = ".txt, .jsonl (also .xz, .gz or .zst) or .parquet"
"""`SUFFIXES` for messages."""
CHUNK = 1 << 15
"""Most bytes of a text file, or characters of a row, in one chunk."""
_BATCH_BYTES = 1 << 20
_BUFFER = 1 << 18  # of packed bytes; without it a whole column of a row group is held


@dataclass(frozen=True)
class FileRange:
    """A part of a file that one reader of a stream reads before it goes on to another.

    `start` to `stop` are bytes of text and JSON lines, and row groups of Parquet. Packed files have neither: `stop` 0
    reads all. Of a range that `shares` readers share, each takes every `shares`-th block of `block` bytes or rows.
    """

    path: Path
    start: int = 0
    stop: int = 0
    share: int = 0
    shares: int = 1
    block: int = CHUNK

    def owns(self, offset: int) -> bool:
        """Return whether what begins there, a byte or (with `block` 1) a row, belongs to this share."""
        return offset // self.block % self.shares == self.share


class Chunk(NamedTuple):
    """A document, or a part of a long one; the last part `ends` it.

    `offset`, a byte or a row of the range, and `number`, counted from that offset, are where it can be read again.
    """

    offset: int
    number: int
    text: str
    ends: bool


OnBadRow = Callable[[UserError], None]
"""Called with the error of a row that cannot be read; by returning it leaves the row out."""


def kind(path: Path) -> str:
    """Find the one of `SUFFIXES` that a file's name ends in, in any case; empty if the file is of no supported kind."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), "")


def read_range(part: FileRange, offset: int = 0, on_bad_row: OnBadRow | None = None) -> Iterator[Chunk]:
    """Read the documents of a range in order, from `offset` (of a chunk that it gave, or 0) on.

    A file of none of the `SUFFIXES` is read as one document of text.

    Every byte between documents belongs to exactly one of the ranges that a file is cut into. A text document that two
    of them share is cut at a line end and read as two. Raises `UserError` for a file that cannot be read, and for a row
    (of text: a chunk) that cannot be read, unless `on_bad_row` returns.
    """
    suffix = kind(part.path)
    read = _read_parquet if suffix == ".parquet" else _read_json_lines if ".jsonl" in suffix else _read_text
    with refuse_unreadable(part.path):
        yield from read(part, offset, on_bad_row)


def row_chunks(offset: int, find: Callable[[], str | None], on_bad_row: OnBadRow | None) -> Iterator[Chunk]:
    """Yield the chunks of the row whose text `find` returns; none if it is empty, or cannot be read and is left out."""
    try:
        text = find() or ""
    except UserError as error:
        if on_bad_row is None:
            raise
        on_bad_row(error)
        return
    start = number = 0
    while len(text) - start > CHUNK:
        stop = line_end(text, start, start + CHUNK)
        yield Chunk(offset, number, text[start:stop], ends=False)
        start, number = stop, number + 1
    if text:
        yield Chunk(offset, number, text[start:], ends=True)


def line_end(text: str, start: int, limit: int) -> int:
    """Return the last line end in `(start, limit]`, else `limit`."""
    found = text.rfind("\n", start, limit) + 1
    return found if found > start else limit


# Text


def _read_text(part: FileRange, offset: int, on_bad_row: OnBadRow | None) -> Iterator[Chunk]:
    mark = SEPARATOR.encode() if kind(part.path) else b""
    enough = CHUNK + max(len(mark), 1)  # one byte more shows that the text goes on
    with open_unpacked(part.path) as file:
        start, stop = (_text_boundary(file, x, mark) if part.stop else 0 for x in (part.start, part.stop))
        begin = max(start, offset)
        move_to(file, begin)
        held, first = b"", 0  # what has been read, and the place in it that is byte `begin` of the file
        while True:
            have = len(held) - first
            if have < enough:
                wanted = min(4 * CHUNK, stop - begin - have) if part.stop else 4 * CHUNK
                held, first = held[first:] + file.read(max(wanted, 0)), 0
            if not (block := held[first : first + enough]):
                return
            size, following, ends = _first_chunk(block, mark)
            after = begin + following
            if size and part.owns(begin):
                find = partial(_decode, block[:size], begin, part.path)
                for chunk in row_chunks(begin, find, on_bad_row):
                    yield chunk._replace(ends=ends or not part.owns(after))
            first, begin = first + following, after


def _first_chunk(block: bytes, mark: bytes) -> tuple[int, int, bool]:
    """Return bytes of the first chunk, bytes to the next, and whether the document ends between them."""
    found = block.find(mark) if mark else -1
    if found >= 0:
        return found, found + len(mark), True
    if len(block) <= CHUNK:
        return len(block), len(block), True
    size = block.rfind(b"\n", 0, CHUNK) + 1 or _character_start(block, CHUNK)
    return size, size, False


def _character_start(block: bytes, limit: int) -> int:
    """Return the last place up to `limit` where a character of UTF-8 begins; `limit` where none does."""
    return next((i for i in range(limit, max(limit - 4, 0), -1) if block[i] & 0xC0 != 0x80), limit)


def _text_boundary(file: IO[bytes], offset: int, mark: bytes) -> int:
    """Find the first place from `offset` on where a range may begin: after a document, else a line or a character."""
    size = file.seek(0, io.SEEK_END)
    if not 0 < offset < size:
        return min(max(offset, 0), size)
    first = max(offset - len(mark), 0)
    file.seek(first)
    block = file.read(CHUNK + len(mark))
    for end in filter(None, (mark, b"\n")):
        found = block.find(end, max(offset - len(end) - first, 0))
        if found >= 0:
            return first + found + len(end)
    return next((first + i for i in range(offset - first, len(block)) if block[i] & 0xC0 != 0x80), size)


# JSON lines


def _read_json_lines(part: FileRange, offset: int, on_bad_row: OnBadRow | None) -> Iterator[Chunk]:
    column = _json_column(part.path, part.path.stat().st_mtime_ns)
    with open_unpacked(part.path) as file:
        start, stop = (_line_boundary(file, x) if part.stop else 0 for x in (part.start, part.stop))
        begin = max(start, offset)
        move_to(file, begin)
        for number, line in enumerate(file, 1):
            if part.stop and begin >= stop:
                return
            if part.owns(begin) and line.strip():
                place = f"the line at byte {begin}" if part.stop or offset else f"line {number}"
                yield from row_chunks(begin, partial(_line_text, line, begin, part.path, place, column), on_bad_row)
            begin += len(line)


def _line_text(line: bytes, begin: int, path: Path, place: str, column: str) -> str | None:
    where = f"{place} of {path}"
    row = parse_row(_decode(line, begin, path), where)
    if column not in row:
        raise UserError(f"{where} has no column {column!r}; give every line the columns of the first")
    if column != "text" and "text" in row:
        raise UserError(f"{where} has a column 'text', which the first line lacks; give it to every line")
    return document(row[column], where)


def _line_boundary(file: IO[bytes], offset: int) -> int:
    if offset <= 0:
        return 0
    file.seek(offset - 1)
    return offset - 1 + len(file.readline())


@lru_cache(maxsize=1 << 14)
def _json_column(path: Path, _modified: int) -> str:
    """Return the column of a file, as the first line that can be read has it."""
    with open_unpacked(path) as file:
        for number, line in enumerate(islice(file, 1000), 1):
            where = f"line {number} of {path}"
            with suppress(UserError):  # whoever reads the line raises it, or leaves the line out
                row = parse_row(_decode(line, 0, path), where)
                break
        else:
            return "text"
    return text_column({key: isinstance(value, str) for key, value in row.items()}, where)


def parse_row(line: str, where: str) -> dict[str, Any]:
    """Parse a line that holds one JSON object."""
    try:  # Python's `int` refuses more than 4,300 digits
        row = json.loads(line, parse_int=lambda digits: int(digits) if len(digits) < 1000 else float(digits))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error}); give one object per line") from error
    if not isinstance(row, dict):
        raise UserError(f"{where} is {row!r:.40}, not a JSON object; give one object per line")
    return row


# Parquet


def _read_parquet(part: FileRange, offset: int, on_bad_row: OnBadRow | None) -> Iterator[Chunk]:
    with open_parquet(part.path) as file:
        column = parquet_column(file, part.path)
        groups = range(part.start, part.stop or file.num_row_groups)
        row = 0
        from_where = f" from row group {part.start}" if part.start else ""
        for group in groups:
            rows = file.metadata.row_group(group).num_rows
            if row + rows <= offset:
                row += rows
                continue
            for value in _values(file, group, column):
                if row >= offset and part.owns(row):
                    where = f"row {row + 1}{from_where} of {part.path}"
                    yield from row_chunks(row, partial(document, value, where), on_bad_row)
                row += 1


@contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """Open a Parquet file. Raises `UserError` in place of pyarrow's exceptions while it is open."""
    require_packages("reading a .parquet file", "pyarrow")
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
            yield file
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file ({first_line(error)}); write it again") from error


def parquet_column(file: Any, path: Path) -> str:
    """Find the column of text of an open Parquet file. Types of other columns do not matter."""
    import pyarrow.types

    def is_text(of: Any) -> bool:
        of = of.value_type if pyarrow.types.is_dictionary(of) else of
        return str(of) in ("string", "large_string", "string_view")

    return text_column({field.name: is_text(field.type) for field in file.schema_arrow}, str(path))


def _values(file: Any, group: int, column: str) -> Iterator[bytes | None]:
    """Yield the column's values in one row group as bytes, about a megabyte of them in memory at a time."""
    meta = file.metadata.row_group(group)
    at_once = min(max(_BATCH_BYTES * meta.num_rows // max(meta.total_byte_size, 1), 1), 1024)
    for batch in file.iter_batches(batch_size=at_once, row_groups=[group], columns=[column], use_threads=False):
        yield from batch.column(0).cast("binary").to_pylist()


# Rows


def text_column(columns: Mapping[str, bool], where: str) -> str:
    """Choose the column to read of `{column: whether it holds strings}`: `text`, else the only one with strings."""
    if "text" in columns:
        return "text"
    strings = [name for name, is_string in columns.items() if is_string]
    if len(strings) == 1:
        return strings[0]
    listed = ", ".join(map(repr, columns)) or "none"
    raise UserError(
        f"{where} has no column 'text' and {len(strings)} other columns of strings (columns: {listed}); "
        "rename the column to read to 'text'"
    )


def document(value: object, where: str) -> str | None:
    """Return a row's value as a document, None if it is null or empty. Raises `UserError` for all but valid text."""
    if isinstance(value, bytes):
        with suppress(UnicodeDecodeError):
            value = value.decode()
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where} holds {value!r:.40}, not a string; give text in every row")
    if value and not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"{where} holds half a surrogate pair at character {error.start}; repair it") from error
    return value or None


def _decode(block: bytes, begin: int, path: Path) -> str:
    """Decode what stands at byte `begin`; a byte-order mark at the beginning of the file is dropped."""
    try:
        text = block.decode("utf-8")
    except UnicodeDecodeError as error:
        unpacked = " of the unpacked text" if packing(path) else ""
        raise UserError(
            f"{path} is not UTF-8 text: byte {begin + error.start}{unpacked} cannot be decoded; convert the file to "
            "UTF-8"
        ) from error
    return text if begin else text.removeprefix("\ufeff")


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, for a `UserError` of one sentence."""
    return str(error).strip().partition("\n")[0].rstrip(" .:")
