"""Packed files (.xz, .gz, .zst) as one stream of bytes. Damage anywhere in the file is an error."""

from __future__ import annotations

import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from vwn.common.errors import UserError
from vwn.common.extras import require_packages

PACKINGS = (".xz", ".gz", ".zst")
_BLOCK = 1 << 18


def packing(path: Path) -> str:
    """Return the one of `PACKINGS` that the file's name ends in, in any case; empty if none."""
    suffix = path.suffix.lower()
    return suffix if suffix in PACKINGS else ""


@contextmanager
def open_unpacked(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, unpacked if its name says that it is packed. Packed files read forwards only."""
    with open(path, "rb", buffering=_BLOCK) as file:
        match packing(path):
            case ".xz":
                raw: Any = _XzFile(file)
            case ".gz":
                raw = gzip.GzipFile(fileobj=file)
            case ".zst":
                require_packages("reading a .zst file", "pyarrow")
                import pyarrow

                raw = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")
            case _:
                yield file
                return
        with io.BufferedReader(raw, _BLOCK) as stream:
            yield stream


@contextmanager
def refuse_unreadable(path: Path) -> Iterator[None]:
    """Raise `UserError` in place of the exceptions of a file that cannot be read or is damaged."""
    try:
        yield
    except (lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        raise UserError(f"{path} is not a complete {packing(path)} file ({error}); pack it again") from error


def move_to(file: IO[bytes], offset: int) -> None:
    """Move a file that has just been opened to an offset; one that cannot seek by reading up to there."""
    if file.seekable():
        file.seek(offset)
        return
    while offset > 0 and (block := file.read(min(offset, _BLOCK))):
        offset -= len(block)


class _XzFile(io.RawIOBase):
    """All streams of an .xz file, also with zero bytes between them (four at a time, as the format has it).

    `lzma.open` takes these zeros, or a damaged start of a later stream, for the end of the file.
    """

    def __init__(self, file: IO[bytes]):
        self._blocks, self._rest = _unpack_xz(file), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = block
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def _unpack_xz(file: IO[bytes]) -> Iterator[bytes]:
    while True:
        unpacker = lzma.LZMADecompressor()
        while not unpacker.eof:
            block = file.read(_BLOCK) if unpacker.needs_input else b""
            if unpacker.needs_input and not block:
                raise EOFError("it ends in the middle of a stream")
            yield unpacker.decompress(block, _BLOCK)
        file.seek(-len(unpacker.unused_data), io.SEEK_CUR)
        while (word := file.read(4)) == bytes(4):
            pass
        if not word:
            return
        file.seek(-len(word), io.SEEK_CUR)
