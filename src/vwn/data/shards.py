"""A source of streamed data as many small units, which the lanes share out. No file is read but its ends."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vwn.common.errors import UserError
from vwn.data.pieces import PIECE, Piece, Skipped, Unit, document_of, parquet_column, read_pieces, row_text
from vwn.data.reading import SUFFIXES, first_line, is_supported, kind, string_columns, text_column
from vwn.data.sources import open_local, quiet

_LARGEST_UNIT = 1 << 26
_ENDS = 1 << 16
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shards:
    """One source: its units, in the order of its files, and a hash of names, sizes and both ends of every file."""

    name: str
    units: tuple[Unit, ...]
    fingerprint: str
    hub: Any = None
    _passes: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, compare=False, repr=False)

    def unit(self, index: int, seed: int) -> Unit:
        """Unit `index` of the endless sequence of passes, each of which has every unit once, in an order of its own."""
        number, place = divmod(index, len(self.units))
        if (seed, number) not in self._passes:
            if len(self._passes) > 8:
                self._passes.clear()
            # RandomState's numbers are frozen; those of numpy's newer generators may change with its version.
            self._passes[seed, number] = np.random.RandomState([seed, number]).permutation(len(self.units))
        return self.units[self._passes[seed, number][place]]

    def pieces(self, unit: Unit, offset: int, skipped: Skipped | None = None) -> Iterator[Piece]:
        """The unit's text from `offset` on, as `read_pieces` gives it."""
        return (read_pieces if self.hub is None else self.hub.pieces)(unit, offset, skipped)


def open_shards(spec: str, lanes: int) -> Shards:
    """The units of a file, a folder, a pattern with `*`, or a hub data set: at least as many as there are lanes.

    Text and JSON lines are cut anywhere, Parquet between row groups. Of packed files, large row groups and hub data
    sets that come in fewer shards than there are lanes, several lanes read one and take turns. Raises `UserError` for
    what cannot be found or is empty.
    """
    paths = _paths(spec)
    if paths is None:
        return _open_hub(spec, lanes)
    files = [path for path in paths if _size(path)]
    if not files:
        raise UserError(f"{spec} is empty; give a source with text in it")
    total = sum(_size(path) for path in files)
    at_most = max(1, min(total // (2 * lanes), _LARGEST_UNIT))
    units = [unit for path in files for unit in _units(path, at_most)]
    parts = -(-lanes // len(units))
    shards = Shards(spec, tuple(part for unit in units for part in _divided(unit, parts)), _fingerprint(paths))
    if not any(True for unit in units for _ in read_pieces(unit, skipped=lambda _: None)):
        raise UserError(f"{spec} is empty; give a source with text in it")
    if parts > 1 and any(kind(path).endswith(".xz") for path in files):
        _logger.info("%s has fewer packed files than lanes (%s): each is unpacked %s times over", spec, lanes, parts)
    return shards


def _paths(spec: str) -> list[Path] | None:
    if any(c in spec for c in "*?[") and not os.path.exists(spec):
        found = sorted(glob.glob(os.path.expanduser(spec), recursive=True))
        paths = [Path(name) for name in found if is_supported(Path(name)) and os.path.isfile(name)]
        if not paths:
            raise UserError(f"{spec} matches no {', '.join(SUFFIXES)} file; check the pattern")
        return paths
    source = open_local(spec)
    return None if source is None else list(source.paths)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _units(path: Path, at_most: int) -> list[Unit]:
    suffix = kind(path)
    if suffix.endswith(".xz"):
        return [Unit(path)]
    if suffix == ".parquet":
        return _row_groups(path, at_most)
    size = _size(path)
    count = -(-size // at_most)
    return [Unit(path, size * i // count, size * (i + 1) // count) for i in range(count)]


def _row_groups(path: Path, at_most: int) -> list[Unit]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            parquet_column(file, path)
            sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)]
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file ({first_line(error)}); write it again") from error
    units: list[Unit] = []
    first = held = 0
    for group, size in enumerate(sizes):
        if group > first and held + size > at_most:
            units.append(Unit(path, first, group, block=1))
            first, held = group, 0
        held += size
    return [*units, Unit(path, first, len(sizes), block=1)] if sizes else units


def _divided(unit: Unit, parts: int) -> Iterator[Unit]:
    block = unit.block if unit.block == 1 else max(1, min(PIECE, _size(unit.path) // parts))
    for part in range(parts):
        yield Unit(unit.path, unit.start, unit.stop, part, parts, block)


def _fingerprint(paths: list[Path]) -> str:
    """Of every file its name, size, beginning and end; not its age, and not all of it, which would read it all."""
    root = os.path.commonpath([path.parent for path in paths])
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                ends = file.read(_ENDS)
                file.seek(max(size - _ENDS, 0))
                ends += file.read(_ENDS)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        digest.update(f"{os.path.relpath(path, root)}\0{size}\0".encode() + hashlib.blake2b(ends).digest())
    return digest.hexdigest()


@dataclass(frozen=True)
class HubRows:
    """The training split of a data set of the hub, read row by row over the network; a unit is one of its shards."""

    name: str
    rows: Any
    column: str

    def pieces(self, unit: Unit, offset: int, skipped: Skipped | None = None) -> Iterator[Piece]:
        """The shard's rows; those before `offset` are fetched again but not looked at."""
        shard = self.rows.shard(num_shards=self.rows.num_shards, index=unit.start, contiguous=True)
        for row, values in enumerate(shard.skip(offset) if offset else shard, offset):
            if unit.owns(row):
                where = f"row {row + 1} of shard {unit.start} of {self.name}"
                text = row_text(partial(document_of, values[self.column], where), skipped)
                if text is not None:
                    yield Piece(row, text, True)


def _open_hub(spec: str, lanes: int) -> Shards:
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetsError

    name, _, configuration = spec.partition(":")
    try:
        with quiet():
            builder = load_dataset_builder(name, configuration or None)
            rows: Any = builder.as_streaming_dataset(split="train")
            if rows.num_shards < lanes and hasattr(rows, "reshard"):
                rows = rows.reshard()  # Parquet by row groups
            features = rows.features or rows._resolve_features().features
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(
            f"{spec!r} is neither a file nor a folder, and the Hugging Face hub does not give it as a data set with a "
            f"split 'train' ({first_line(error)}); check the name and the network, or give local text"
        ) from error
    column = text_column(string_columns(features), f"the data set {spec}")
    parts = -(-lanes // rows.num_shards)
    units = [
        Unit(Path(name), shard, shard + 1, part, parts, 1) for shard in range(rows.num_shards) for part in range(parts)
    ]
    # Names of the files with the revision of the repository in them, where the builder knows them.
    files = sorted(str(path) for path in (builder.config.data_files or {}).get("train", []))
    key = [str(builder.hash), str(builder.config_id), str(rows.num_shards), *files]
    fingerprint = hashlib.blake2b("\0".join(key).encode(), digest_size=16).hexdigest()
    return Shards(spec, tuple(units), fingerprint, HubRows(spec, rows.select_columns([column]), column))
