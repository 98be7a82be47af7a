"""Sources of streamed data as many small file ranges, and which source each window of a batch is from.

Opening a source reads no file but its ends.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from vwn.common.errors import UserError
from vwn.data.reading import (
    CHUNK,
    KINDS,
    Chunk,
    FileRange,
    OnBadRow,
    document,
    kind,
    open_parquet,
    parquet_column,
    read_range,
    row_chunks,
    string_columns,
    text_column,
)
from vwn.data.sources import hub_data_set, open_local, refuse_undecodable, supported
from vwn.data.unpacking import packing

_LARGEST_RANGE = 1 << 26
_ENDS = 1 << 16
_GOLDEN = (5**0.5 - 1) / 2
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StreamedSource:
    """One source: its ranges, in the order of its files, and a hash of names, sizes and both ends of every file."""

    name: str
    ranges: tuple[FileRange, ...]
    fingerprint: str
    hub: HubRows | None = None
    _passes: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, compare=False, repr=False)

    def range_at(self, index: int, seed: int) -> FileRange:
        """Number `index` of an endless sequence of passes, each of which has every range once, in its own order."""
        number, place = divmod(index, len(self.ranges))
        if (seed, number) not in self._passes:
            if len(self._passes) > 8:
                self._passes.clear()
            # RandomState's numbers are frozen; those of numpy's newer generators may change with its version.
            self._passes[seed, number] = np.random.RandomState([seed, number]).permutation(len(self.ranges))
        return self.ranges[self._passes[seed, number][place]]

    def read(self, part: FileRange, offset: int, on_bad_row: OnBadRow | None = None) -> Iterator[Chunk]:
        """Yield the range's documents from `offset` on, as `read_range` gives them."""
        return (read_range if self.hub is None else self.hub.read)(part, offset, on_bad_row)


def open_source(spec: str, readers: int) -> StreamedSource:
    """Cut a file, a folder, a pattern with `*`, or a hub data set into at least as many ranges as there are readers.

    Text and JSON lines are cut anywhere, Parquet between row groups. Of packed files, large row groups and hub data
    sets that come in fewer shards than there are readers, several readers read one and take turns. Raises `UserError`
    for what cannot be found or is empty.
    """
    paths = _paths(spec)
    if paths is None:
        return _open_hub(spec, readers)
    files = [path for path in paths if _size(path)]
    if not files:
        raise UserError(f"{spec} is empty; give a source with text in it")
    total = sum(_size(path) for path in files)
    at_most = max(1, min(total // (2 * readers), _LARGEST_RANGE))
    ranges = [part for path in files for part in _cut(path, at_most)]
    shares = -(-readers // len(ranges))
    shared = tuple(share for part in ranges for share in _shares(part, shares))
    if not any(True for part in ranges for _ in read_range(part, on_bad_row=lambda _: None)):
        raise UserError(f"{spec} is empty; give a source with text in it")
    if shares > 1 and any(map(packing, files)):
        _logger.info(
            "%s has fewer packed files than readers (%s): each is unpacked %s times over", spec, readers, shares
        )
    return StreamedSource(spec, shared, _fingerprint(paths))


def _paths(spec: str) -> list[Path] | None:
    refuse_undecodable(spec)
    if any(c in spec for c in "*?[") and not os.path.exists(spec):
        found = sorted(glob.glob(os.path.expanduser(spec), recursive=True))
        paths = supported(spec, [Path(name) for name in found if os.path.isfile(name)])
        if not paths:
            raise UserError(f"{spec} matches no {KINDS} file; check the pattern")
        return paths
    source = open_local(spec)
    return None if source is None else list(source.paths)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _cut(path: Path, at_most: int) -> list[FileRange]:
    if packing(path):
        return [FileRange(path)]
    if kind(path) == ".parquet":
        return _row_groups(path, at_most)
    size = _size(path)
    count = -(-size // at_most)
    return [FileRange(path, size * i // count, size * (i + 1) // count) for i in range(count)]


def _row_groups(path: Path, at_most: int) -> list[FileRange]:
    with open_parquet(path) as file:
        parquet_column(file, path)
        sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
    ranges: list[FileRange] = []
    first = held = 0
    for group, size in enumerate(sizes):
        if group > first and held + size > at_most:
            ranges.append(FileRange(path, first, group, block=1))
            first, held = group, 0
        held += size
    return [*ranges, FileRange(path, first, len(sizes), block=1)] if sizes else ranges


def _shares(part: FileRange, shares: int) -> Iterator[FileRange]:
    block = part.block if part.block == 1 else max(1, min(CHUNK, _size(part.path) // shares))
    for share in range(shares):
        yield FileRange(part.path, part.start, part.stop, share, shares, block)


def _fingerprint(paths: list[Path]) -> str:
    """Hash the name, size, beginning and end of every file; neither its age nor all of it, which would take long."""
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
        digest.update(os.fsencode(f"{os.path.relpath(path, root)}\0{size}\0") + hashlib.blake2b(ends).digest())
    return digest.hexdigest()


@dataclass(frozen=True)
class HubRows:
    """The training split of a data set of the hub, read row by row over the network; a range is one of its shards."""

    name: str
    rows: Any
    column: str

    def read(self, part: FileRange, offset: int, on_bad_row: OnBadRow | None = None) -> Iterator[Chunk]:
        """Yield the shard's rows; those before `offset` are fetched again but not looked at."""
        shard = self.rows.shard(num_shards=self.rows.num_shards, index=part.start, contiguous=True)
        for row, values in enumerate(shard.skip(offset) if offset else shard, offset):
            if part.owns(row):
                where = f"row {row + 1} of shard {part.start} of {self.name}"
                yield from row_chunks(row, partial(document, values[self.column], where), on_bad_row)


def _open_hub(spec: str, readers: int) -> StreamedSource:
    with hub_data_set(spec) as (name, configuration):
        from datasets import load_dataset_builder

        builder = load_dataset_builder(name, configuration)
        rows: Any = builder.as_streaming_dataset(split="train")
        if rows.num_shards < readers and hasattr(rows, "reshard"):
            rows = rows.reshard()  # Parquet by row groups
        features = rows.features or rows._resolve_features().features
    column = text_column(string_columns(features), f"the data set {spec}")
    shares, shards = -(-readers // rows.num_shards), range(rows.num_shards)
    ranges = [FileRange(Path(name), i, i + 1, share, shares, block=1) for i in shards for share in range(shares)]
    # Names of the files with the revision of the repository in them, where the builder knows them.
    files = sorted(str(path) for path in (builder.config.data_files or {}).get("train", []))
    key = [str(builder.hash), str(builder.config_id), str(rows.num_shards), *files]
    fingerprint = hashlib.blake2b("\0".join(key).encode(), digest_size=16).hexdigest()
    return StreamedSource(spec, tuple(ranges), fingerprint, HubRows(spec, rows.select_columns([column]), column))


def parse_sources(specs: Sequence[str]) -> dict[str, float]:
    """Parse `SOURCE` or `SOURCE=WEIGHT` to shares of the tokens, which sum to 1; without a weight it is 1.

    Raises `UserError` for a weight that is no positive number and a source that is named twice.
    """
    weights: dict[str, float] = {}
    for spec in specs:
        source, given, number = spec.rpartition("=")
        if not given or os.path.exists(os.path.expanduser(spec)) or any(c in number for c in "/*?["):
            source, number = spec, "1"
        try:
            weight = float(number)
        except ValueError:
            weight = -1.0
        if not (source and 0 < weight < inf):
            raise UserError(
                f"--stream {spec} must be SOURCE or SOURCE=WEIGHT with a positive weight, such as books=0.3"
            )
        if source in weights:
            raise UserError(f"--stream names {source} twice; give it once, with the sum of the weights")
        weights[source] = weight
    total = sum(weights.values())
    return {source: weight / total for source, weight in weights.items()}


def sources_of_step(weights: Sequence[float], batch: int, step: int, seed: int) -> np.ndarray:
    """Choose the source of every window of a step's global batch, `[batch]`.

    Every batch holds of each source its share of windows, rounded up or down; over many steps the shares are exact.
    It depends on the arguments alone, so that any rank and worker knows it. Which slot has which source is shuffled
    anew in every step, so that each reader reads from all of them.
    """
    if len(weights) == 1:
        return np.zeros(batch, dtype=np.int64)
    offset = (step + 1) * _GOLDEN % 1.0
    points = (np.arange(batch) + offset) / batch
    found = np.searchsorted(np.cumsum(weights[:-1]), points, side="right")
    # RandomState's numbers are frozen; those of numpy's newer generators may change with its version.
    return np.random.RandomState([seed, step & 0xFFFFFFFF, step >> 32]).permutation(found)
