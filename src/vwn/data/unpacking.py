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
    """Open a file for reading, unpacked if its name says that it is packed; only what is not packed can seek."""
    with open(path, "rb", buffering=_BLOCK) as file:
        unpack = _UNPACKERS.get(packing(path))
        if unpack is None:
            yield file
        else:
            with io.BufferedReader(_Blocks(unpack(file)), _BLOCK) as stream:
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
    """Move a file to an offset; one that is packed, and has just been opened, by reading up to there."""
    if file.seekable():
        file.seek(offset)
        return
    while offset > 0 and (block := file.read(min(offset, _BLOCK))):
        offset -= len(block)


def _unpack_xz(file: IO[bytes]) -> Iterator[bytes]:
    """Unpack all streams of a file, which may have zero bytes between them, four at a time.

    `lzma.open` takes these zeros, or a damaged start of a later stream, for the end of the file.
    """
    unpacker, block = lzma.LZMADecompressor(), file.read(_BLOCK)
    while True:
        yield unpacker.decompress(block, _BLOCK)
        if unpacker.eof:
            block, padding = _without_padding(file, unpacker.unused_data)
            if padding % 4:
                raise lzma.LZMAError(f"{padding} zero bytes behind a stream, not a multiple of 4")
            if not block:
                return
            unpacker = lzma.LZMADecompressor()
        elif not unpacker.needs_input:
            block = b""
        elif not (block := file.read(_BLOCK)):
            raise EOFError("it ends in the middle of a stream")


def _without_padding(file: IO[bytes], block: bytes) -> tuple[bytes, int]:
    """Return the next block that is not all zeros, without zeros in front of it, and their number; empty at the end."""
    padding = 0
    while True:
        stripped = block.lstrip(b"\0")
        padding += len(block) - len(stripped)
        if stripped or not (block := file.read(_BLOCK)):
            return stripped, padding


def _unpack_gzip(file: IO[bytes]) -> Iterator[bytes]:
    with gzip.open(file) as stream:
        while block := stream.read(_BLOCK):
            yield block


def _unpack_zstd(file: IO[bytes]) -> Iterator[bytes]:
    require_packages("reading a .zst file", "pyarrow")
    import pyarrow

    with pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd") as stream:
        while block := stream.read(_BLOCK):
            yield block


_UNPACKERS = {".xz": _unpack_xz, ".gz": _unpack_gzip, ".zst": _unpack_zstd}


class _Blocks(io.RawIOBase):
    """A raw file made of blocks of bytes."""

    def __init__(self, blocks: Iterator[bytes]):
        self._blocks, self._rest = blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = memoryview(block)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count
