"""Find the text that a name stands for: a file, a folder, the standard library or a data set of the Hugging Face hub.

A source has a `name` for messages, a `key()` that changes whenever the text does, and `chunks()`: its documents in
chunks, each with the name of its file, in the same order every time.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from vwn.common.errors import UserError
from vwn.common.extras import require_packages
from vwn.data.reading import (
    KINDS,
    Chunk,
    FileRange,
    document,
    first_line,
    kind,
    read_range,
    row_chunks,
    string_columns,
    text_column,
)

if TYPE_CHECKING:
    from datasets import Dataset

Side = Literal["train", "valid"]

STDLIB = "stdlib"
# Tests repeat themselves; `encodings` and `pydoc_data` are generated, near-copies of one table would be on both sides.
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
            try:
                with open(path, "rb") as file:
                    digest.update(hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest())
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror}") from error
            digest.update(kind(path).encode() + b"\0")
        return digest.hexdigest()

    def chunks(self) -> Iterator[tuple[str, Chunk]]:
        for path in self.paths:
            file = str(path)
            for chunk in read_range(FileRange(path)):
                yield file, chunk


@dataclass(frozen=True)
class HubSource:
    """One split of a data set of the Hugging Face hub, one document per row."""

    name: str
    rows: Dataset
    column: str

    def key(self) -> str:
        # `datasets` derives it from the repository's revision, the configuration and the split.
        return f"hub-{self.rows._fingerprint}-{self.column}"

    def chunks(self) -> Iterator[tuple[str, Chunk]]:
        rows = cast("Iterable[dict[str, Any]]", self.rows.select_columns([self.column]))
        for number, row in enumerate(rows):
            find = partial(document, row[self.column], f"row {number + 1} of {self.name}")
            for chunk in row_chunks(number, find, on_bad_row=None):
                yield self.name, chunk


Source = FileSource | HubSource


def resolve(data: str, valid: str | None, valid_fraction: float) -> tuple[Source, Source | None]:
    """Find the training source and the validation source; None if validation is to be split off the training text.

    `stdlib` and hub data sets have sides of their own: the training side is read for `data`, the validation side for
    `valid`, or for `data` alone. Raises `UserError` for what cannot be found.
    """
    train, own_valid = _open(data, "train", valid_fraction)
    return train, own_valid if valid is None else _open(valid, "valid", valid_fraction)[0]


def resolve_valid(spec: str) -> Source:
    """Find the source for the validation side alone."""
    return _open(spec, "valid", 0.1)[0]


def _open(spec: str, side: Side, valid_fraction: float) -> tuple[Source, Source | None]:
    """Find the source for one side, and the validation side that belongs to it, if any."""
    if spec == STDLIB:
        sides = _stdlib_sides(valid_fraction)
        return sides[side], sides["valid"]
    source = open_local(spec)
    return _open_hub(spec, side) if source is None else (source, None)


def open_local(spec: str) -> FileSource | None:
    """Find a file, a folder or the training side of `stdlib`; None for what can only be a hub id."""
    if spec == STDLIB:
        return _stdlib_sides(0.1)["train"]
    refuse_undecodable(spec)
    path = Path(os.path.expanduser(spec))
    if not spec or not os.path.exists(path):
        if not spec or kind(path) or spec.startswith((".", "/", "~")) or spec.count("/") > 1 or "\\" in spec:
            raise UserError(f"{spec!r} does not exist; give a file ({KINDS}), a folder, {STDLIB!r} or a hub id")
        return None
    if path.is_dir():
        return _folder(spec, path)
    if not kind(path):
        raise UserError(f"{spec} is none of the supported kinds of data: {KINDS}, or a folder of them")
    return FileSource(spec, (path,))


def refuse_undecodable(spec: str) -> None:
    """Refuse a name whose bytes are not UTF-8: it could not be written to the run's records and model card."""
    try:
        spec.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the name {spec!a} is not UTF-8; rename the file or folder") from error


def _folder(spec: str, folder: Path) -> FileSource:
    files = [Path(directory, name).relative_to(folder) for directory, _, names in os.walk(folder) for name in names]
    visible = [file for file in files if not any(part.startswith(".") for part in file.parts)]
    found = supported(spec, sorted(visible, key=Path.as_posix))
    if not found:
        raise UserError(f"the folder {spec} holds no {KINDS} file; give a folder with text in it")
    return FileSource(spec, tuple(folder / file for file in found))


def supported(spec: str, files: list[Path]) -> list[Path]:
    """Select the files of a folder or pattern that can be read. If there are any, log which others are left out."""
    found = [file for file in files if kind(file)]
    left_out = [str(file) for file in files if not kind(file)]
    if found and left_out:
        shown = ", ".join(name if name.isprintable() else ascii(name) for name in left_out[:5])
        more = f" and {len(left_out) - 5} more" if len(left_out) > 5 else ""
        what = f"{len(left_out)} of {len(files)} files in {spec} are not {KINDS}"
        _logger.warning("%s and are left out: %s%s", what, shown, more)
    return found


def _stdlib_sides(valid_fraction: float) -> dict[Side, FileSource]:
    """Split the standard library's files in two, each side in the order of the hashes of their relative paths.

    A file's side depends on its relative path alone, so it is the same on every machine and Python version.
    """
    root = Path(sysconfig.get_path("stdlib"))
    ranked = sorted((_rank(path.relative_to(root).as_posix()), path) for path in _stdlib_files(root))
    sides: dict[Side, FileSource] = {
        "train": FileSource(STDLIB, tuple(path for rank, path in ranked if rank >= valid_fraction)),
        "valid": FileSource(STDLIB, tuple(path for rank, path in ranked if rank < valid_fraction)),
    }
    if not all(source.paths for source in sides.values()):
        raise UserError(
            f"the standard library at {root} has {len(ranked)} source files, too few for a validation fraction of "
            f"{valid_fraction}; give a text of your own with --data"
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

        splits = cast("dict[str, Dataset]", load_dataset(name, configuration))
    valid = next((name for name in _VALID_SPLITS if name in splits), None)
    wanted = valid if side == "valid" and valid else "train"
    if wanted not in splits:
        raise UserError(f"the data set {spec} has no split 'train' (it has {', '.join(splits)}); use one that has")

    def source(split: str, name: str) -> HubSource:
        column = text_column(string_columns(splits[split].features), f"the data set {name}")
        return HubSource(name, splits[split], column)

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
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(
            f"{spec!r} is neither a file nor a folder, and the Hugging Face hub does not give it as a data set "
            f"({first_line(error)}); check the name and the network, or give local text"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the log lines of the Hugging Face libraries. Errors still arrive as exceptions."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub", "transformers")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
