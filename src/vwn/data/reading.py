"""Readers: one file of text, JSON lines or Parquet becomes strings in which `SEPARATOR` ends every document."""

from __future__ import annotations

import codecs
import io
import json
import lzma
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from vwn.common.errors import UserError

SEPARATOR = "<|endoftext|>"
SUFFIXES = (".txt", ".txt.xz", ".jsonl", ".jsonl.xz", ".parquet")
_BLOCK_BYTES = 1 << 20

Advance = Callable[[int], object]


def kind(path: Path) -> str:
    """The one of `SUFFIXES` that the file's name ends in, in any case; empty if none."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), "")


def is_supported(path: Path) -> bool:
    """Whether the file's name ends in one of `SUFFIXES`."""
    return bool(kind(path))


def read_file(path: Path, advance: Advance) -> Iterator[str]:
    """The file's text in pieces of any length, `SEPARATOR` after every document.

    A file of none of the `SUFFIXES` is read as text. `advance(k)` is told whenever `k` more bytes of the file (packed
    bytes for `.xz`) have been read. Raises `UserError` for a file that cannot be opened, is damaged or is not UTF-8.
    """
    reader = _READERS[kind(path)]
    try:
        yield from reader(path, advance)
    except (lzma.LZMAError, EOFError) as error:
        raise UserError(f"{path} is not a complete .xz file ({error}); pack it again with xz") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def text_column(columns: Mapping[str, bool], where: str) -> str:
    """The column to read, of `{column: whether it holds strings}`: `text`, else the only one that holds strings."""
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


def string_columns(features: Mapping[str, Any]) -> dict[str, bool]:
    """`{column: whether it holds strings}` of the features of a data set of `datasets`."""
    return {name: getattr(feature, "dtype", None) in ("string", "large_string") for name, feature in features.items()}


def document(value: object, where: str) -> Iterator[str]:
    """One row as a document; null and empty text is passed over, anything but a string of valid text is refused."""
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where} holds {value!r:.40}, not a string; give text in every row")
    if not value:
        return
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"{where} holds half a surrogate pair at character {error.start}; repair it") from error
    yield value
    yield SEPARATOR


def _read_text(path: Path, advance: Advance) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    for block in _blocks(path, advance):
        yield _decode(decoder, block, offset, path)
        offset += len(block)
    yield _decode(decoder, b"", offset, path)
    yield SEPARATOR


def _decode(decoder: codecs.IncrementalDecoder, block: bytes, offset: int, path: Path) -> str:
    """Decode `block`, which starts at byte `offset`; an empty block ends the text."""
    held = len(decoder.getstate()[0])
    try:
        return decoder.decode(block, final=not block)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, offset - held + error.start) from error


def _read_jsonl(path: Path, advance: Advance) -> Iterator[str]:
    column = None
    for number, line in _lines(path, advance):
        where = f"line {number} of {path}"
        row = _parse_row(line, where)
        if column is None:
            column = text_column({key: isinstance(value, str) for key, value in row.items()}, where)
        if column not in row:
            raise UserError(f"{where} has no column {column!r}; give every line the columns of the first")
        yield from document(row[column], where)


def _parse_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error}); give one object per line") from error
    if not isinstance(row, dict):
        raise UserError(f"{where} is {row!r:.40}, not a JSON object; give one object per line")
    return row


def _lines(path: Path, advance: Advance) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, each with its number in the file."""
    offset = 0
    with _unpacked(path, advance) as stream:
        for number, line in enumerate(stream, 1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, offset + error.start) from error
            offset += len(line)
            if number == 1:
                text = text.removeprefix("\ufeff")
            if text.strip():
                yield number, text


def _read_parquet(path: Path, advance: Advance) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet
    from datasets import Features

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            column = text_column(string_columns(Features.from_arrow_schema(file.schema_arrow)), str(path))
            number, done = 0, 0
            for batch in file.iter_batches(batch_size=1000, columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield from document(value, f"row {number} of {path}")
                reached = path.stat().st_size * number // file.metadata.num_rows
                advance(reached - done)
                done = reached
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file ({first_line(error)}); write it again") from error


def _blocks(path: Path, advance: Advance) -> Iterator[bytes]:
    with _unpacked(path, advance) as stream:
        while block := stream.read(_BLOCK_BYTES):
            yield block


@contextmanager
def _unpacked(path: Path, advance: Advance) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked where it ends in `.xz`; tells `advance` of the packed ones."""
    with open(path, "rb", buffering=0) as file:
        raw = io.BufferedReader(_Counted(file, advance), _BLOCK_BYTES)
        with lzma.open(raw) if kind(path).endswith(".xz") else raw as stream:
            yield stream


class _Counted(io.RawIOBase):
    """A raw file that tells how many bytes each read took."""

    def __init__(self, file: io.RawIOBase, advance: Advance):
        self._file, self._advance = file, advance

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int | None:
        taken = self._file.readinto(buffer)
        self._advance(taken or 0)
        return taken


def _not_utf8(path: Path, offset: int) -> UserError:
    unpacked = " of the unpacked text" if kind(path).endswith(".xz") else ""
    return UserError(f"{path} is not UTF-8 text: byte {offset}{unpacked} cannot be decoded; convert the file to UTF-8")


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, for a `UserError` of one sentence."""
    return str(error).strip().partition("\n")[0].rstrip(" .:")


_READERS = {
    "": _read_text,
    ".txt": _read_text,
    ".txt.xz": _read_text,
    ".jsonl": _read_jsonl,
    ".jsonl.xz": _read_jsonl,
    ".parquet": _read_parquet,
}
