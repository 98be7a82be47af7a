"""Find the text that a name stands for: a file, a folder, the standard library or a data set of the Hugging Face hub.

A source has a `name` for messages, a `key()` that changes whenever the text does, and `chunks()`: its documents in
chunks, each with the name of its file, in the same order every time.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from vwn.common.errors import UserError
from vwn.common.extras import require_packages
from vwn.data.reading import (
    KINDS,
    Chunk,
    FileRange,
    OnBadRow,
    document,
    first_line,
    kind,
    read_range,
    row_chunks,
    text_column,
)
from vwn.data.unpacking import refuse_unreadable

Side = Literal["train", "valid"]

STDLIB = "stdlib"
VALID_SHARE = 0.1
"""Share of a text that is held out for validation where none is given."""
# Tests are repetitive; `encodings` and `pydoc_data` are generated, so that near-copies would be on both sides.
_NOT_TEXT = frozenset({"test", "tests", "idlelib", "turtledemo", "encodings", "pydoc_data", "site-packages"})
_VALID_SPLITS = ("validation", "valid", "dev")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileSource:
    """Files, read in this order. The key hashes their contents, so a copy elsewhere is the same text."""

    name: str
    paths: tuple[Path, ...]

    def key(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for path in self.paths:
            with refuse_unreadable(path), open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest())
            digest.update(kind(path).encode() + b"\0")
        return digest.hexdigest()

    def chunks(self) -> Iterator[tuple[str, Chunk]]:
        for path in self.paths:
            for chunk in read_range(FileRange(path)):
                yield str(path), chunk


class HubSource:
    """Rows of a data set of the Hugging Face hub, each a document: an `IterableDataset`, kept locally or streamed."""

    def __init__(self, name: str, rows: Any, identity: str):
        features = rows.features or rows._resolve_features().features
        kinds = {name: getattr(feature, "dtype", None) for name, feature in features.items()}
        strings = {name: kind in ("string", "large_string") for name, kind in kinds.items()}
        self.column = text_column(strings, f"the data set {name}")
        self.name, self.rows, self.identity = name, rows.select_columns([self.column]), identity

    def key(self) -> str:
        return f"hub-{self.identity}-{self.column}"

    def chunks(self) -> Iterator[tuple[str, Chunk]]:
        for shard in range(self.rows.num_shards):
            for chunk in self.read(FileRange(Path(self.name), shard, block=1)):
                yield self.name, chunk

    def read(self, part: FileRange, offset: int = 0, on_bad_row: OnBadRow | None = None) -> Iterator[Chunk]:
        """Yield the rows of shard `part.start` as `read_range` does; those before `offset` are fetched in vain."""
        shard = self.rows.shard(num_shards=self.rows.num_shards, index=part.start, contiguous=True)
        for row, values in enumerate(shard.skip(offset) if offset else shard, offset):
            if part.owns(row):
                where = f"row {row + 1} of shard {part.start} of {self.name}"
                yield from row_chunks(row, partial(document, values[self.column], where), on_bad_row)


Source = FileSource | HubSource


def find_sources(data: str, valid: str | None) -> tuple[Source, Source | None]:
    """Find the training source and the validation source; None if validation is to be split off the training text.

    `stdlib` and hub data sets have sides of their own: the training side is read for `data`, the validation side for
    `valid`, or for `data` alone. Raises `UserError` for what cannot be found.
    """
    train, own_valid = find(data, "train")
    return train, own_valid if valid is None else find(valid, "valid")[0]


def find(spec: str, side: Side) -> tuple[Source, Source | None]:
    """Find the source for one side, and the validation side that belongs to it, if any."""
    if spec == STDLIB:
        sides = _stdlib_sides()
        return sides[side], sides["valid"]
    source = open_local(spec)
    return _open_hub(spec, side) if source is None else (source, None)


def open_local(spec: str) -> FileSource | None:
    """Find a file, a folder, the files of a pattern, or the training side of `stdlib`; None for a hub id.

    A warning lists the files of a folder or a pattern that cannot be read.
    """
    if spec == STDLIB:
        return _stdlib_sides()["train"]
    refuse_undecodable(spec)
    path = Path(os.path.expanduser(spec))
    if spec and path.is_dir():
        walked = [Path(folder, name).relative_to(path) for folder, _, names in os.walk(path) for name in names]
        visible = [file for file in walked if not any(part.startswith(".") for part in file.parts)]
        files = [path / file for file in sorted(visible, key=Path.as_posix)]
    elif spec and path.exists():
        if not kind(path):
            raise UserError(f"{spec} is none of the supported kinds of data: {KINDS}, or a folder of them")
        files = [path]
    elif any(character in spec for character in "*?["):
        files = [file for file in map(Path, sorted(glob.glob(str(path), recursive=True))) if file.is_file()]
    elif not spec or kind(path) or spec.startswith((".", "/", "~")) or spec.count("/") > 1 or "\\" in spec:
        raise UserError(f"{spec!r} does not exist; give a file ({KINDS}), a folder, {STDLIB!r} or a hub id")
    else:
        return None
    found, left_out = [file for file in files if kind(file)], [file.name for file in files if not kind(file)]
    if not found:
        raise UserError(f"{spec} holds no {KINDS} file; give a folder or a pattern with text in it")
    if left_out:
        shown = ", ".join(name if name.isprintable() else ascii(name) for name in left_out[:5])
        more = f" and {len(left_out) - 5} more" if len(left_out) > 5 else ""
        what = f"{len(left_out)} of {len(files)} files in {spec} are not {KINDS}"
        _logger.warning("%s and are left out: %s%s", what, shown, more)
    return FileSource(spec, tuple(found))


def refuse_undecodable(spec: str) -> None:
    """Refuse a name whose bytes are not UTF-8: it could not be written to the run's records and model card."""
    try:
        spec.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the name {spec!a} is not UTF-8; rename the file or folder") from error


def _stdlib_sides() -> dict[Side, FileSource]:
    """Split the standard library's files in two, each side in the order of the hashes of their relative paths.

    A file's side depends on its relative path alone, so it is the same on every machine and Python version.
    """
    root = Path(sysconfig.get_path("stdlib"))
    ranked = sorted((_rank(path.relative_to(root).as_posix()), path) for path in _stdlib_files(root))
    sides: dict[Side, FileSource] = {
        "train": FileSource(STDLIB, tuple(path for rank, path in ranked if rank >= VALID_SHARE)),
        "valid": FileSource(STDLIB, tuple(path for rank, path in ranked if rank < VALID_SHARE)),
    }
    if not all(source.paths for source in sides.values()):
        raise UserError(
            f"the standard library at {root} has {len(ranked)} source files, too few to hold some out for validation; "
            "give a text of your own with --data"
        )
    return sides


def _stdlib_files(root: Path) -> Iterator[Path]:
    for name in sys.stdlib_module_names:
        for path in (root / f"{name}.py", *(root / name).rglob("*.py")):
            if path.is_file() and path.stat().st_size and not _NOT_TEXT.intersection(path.relative_to(root).parts):
                yield path


def _rank(relative: str) -> float:
    """Hash a relative path to a number in [0, 1)."""
    return int.from_bytes(hashlib.blake2b(relative.encode(), digest_size=6).digest()) / 2**48


def _open_hub(spec: str, side: Side) -> tuple[HubSource, HubSource | None]:
    with hub_data_set(spec) as (name, configuration):
        from datasets import load_dataset

        splits: Any = load_dataset(name, configuration)
    valid = next((name for name in _VALID_SPLITS if name in splits), None)
    wanted = valid if side == "valid" and valid else "train"
    if wanted not in splits:
        raise UserError(f"the data set {spec} has no split 'train' (it has {', '.join(splits)}); use one that has")

    def source(split: str, name: str) -> HubSource:
        # `datasets` derives the fingerprint from the repository's revision, the configuration and the split.
        return HubSource(name, splits[split].to_iterable_dataset(), splits[split]._fingerprint)

    return source(wanted, spec), source(valid, f"{spec} ({valid})") if valid else None


@contextmanager
def hub_data_set(spec: str) -> Iterator[tuple[str, str | None]]:
    """Yield name and configuration of `owner/name:configuration`; inside, the hub's errors become one `UserError`."""
    require_packages(f"the data set {spec}", "datasets")
    from datasets.exceptions import DatasetsError

    name, _, configuration = spec.partition(":")
    try:
        with quiet():
            yield name, configuration or None
    except UserError:
        raise
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(
            f"{spec!r} is neither a file nor a folder, and the Hugging Face hub does not give it as a data set "
            f"({first_line(error)}); check the name and the network, or give local text"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the log lines of the Hugging Face libraries. Errors still arrive as exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
