"""Sources of streamed data as many small file ranges, and which source each window of a batch is from.

Opening a source reads no file but its ends.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from vwn.common.errors import UserError
from vwn.data.reading import Chunk, FileRange, OnBadRow, kind, open_parquet, parquet_column, read_range
from vwn.data.sources import HubSource, hub_data_set, open_local
from vwn.data.unpacking import packing, refuse_unreadable

_LARGEST_RANGE = 1 << 26
_ENDS = 1 << 16
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class StreamedSource:
    """One source: its ranges, in the order of its files, and a hash of names, sizes and both ends of every file."""

    name: str
    ranges: tuple[FileRange, ...]
    fingerprint: str
    hub: HubSource | None = None

    def range_at(self, index: int, seed: int) -> FileRange:
        """Number `index` of an endless sequence of passes, each of which has every range once, in its own order."""
        number, place = divmod(index, len(self.ranges))
        return self.ranges[_order(seed, number, len(self.ranges))[place]]

    def read(self, part: FileRange, offset: int, on_bad_row: OnBadRow | None = None) -> Iterator[Chunk]:
        """Yield the range's documents from `offset` on, as `read_range` gives them."""
        return (read_range if self.hub is None else self.hub.read)(part, offset, on_bad_row)


@lru_cache(maxsize=64)
def _order(seed: int, number: int, count: int) -> np.ndarray:
    # RandomState's numbers are frozen; those of numpy's newer generators may change with its version.
    return np.random.RandomState([seed, number]).permutation(count)


def open_source(spec: str, readers: int) -> StreamedSource:
    """Cut a file, a folder, a pattern with `*`, or a hub data set into at least as many ranges as there are readers.

    Text and JSON lines are cut anywhere, Parquet between row groups. Of packed files, large row groups and hub data
    sets that come in fewer shards than there are readers, several readers read one and take turns. Raises `UserError`
    for what cannot be found or is empty.
    """
    files = open_local(spec)
    if files is None:
        return _open_hub(spec, readers)
    sizes: dict[Path, int] = {}
    for path in files.paths:
        with refuse_unreadable(path):
            sizes[path] = path.stat().st_size
    at_most = max(1, min(sum(sizes.values()) // (2 * readers), _LARGEST_RANGE))
    ranges = [part for path, size in sizes.items() if size for part in _cut(path, size, at_most)]
    bad: list[UserError] = []
    if not any(True for part in ranges for _ in read_range(part, on_bad_row=bad.append)):
        raise bad[0] if bad else UserError(f"{spec} is empty; give a source with text in it")
    shares = -(-readers // len(ranges))
    shared = [
        FileRange(part.path, part.start, part.stop, share, shares, min(part.block, max(1, sizes[part.path] // shares)))
        for part in ranges
        for share in range(shares)
    ]
    return StreamedSource(spec, tuple(shared), _fingerprint(sizes))


def _cut(path: Path, size: int, at_most: int) -> list[FileRange]:
    if packing(path):
        return [FileRange(path)]
    if kind(path) == ".parquet":
        return _row_groups(path, at_most)
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


def _fingerprint(sizes: dict[Path, int]) -> str:
    """Hash the name, size, beginning and end of every file; neither its age nor all of it, which would take long."""
    root = os.path.commonpath([path.parent for path in sizes])
    digest = hashlib.blake2b(digest_size=16)
    for path, size in sizes.items():
        with refuse_unreadable(path), open(path, "rb") as file:
            ends = file.read(_ENDS)
            file.seek(max(size - _ENDS, 0))
            ends += file.read(_ENDS)
        digest.update(os.fsencode(f"{os.path.relpath(path, root)}\0{size}\0") + hashlib.blake2b(ends).digest())
    return digest.hexdigest()


def _open_hub(spec: str, readers: int) -> StreamedSource:
    with hub_data_set(spec) as (name, configuration):
        from datasets import load_dataset_builder

        builder = load_dataset_builder(name, configuration)
        rows: Any = builder.as_streaming_dataset(split="train")
        if rows.num_shards < readers and hasattr(rows, "reshard"):
            rows = rows.reshard()  # Parquet by row groups
        # Names of the files with the revision of the repository in them, where the builder knows them.
        files = sorted(str(path) for path in (builder.config.data_files or {}).get("train", []))
        key = [str(builder.hash), str(builder.config_id), str(rows.num_shards), *files]
        source = HubSource(spec, rows, hashlib.blake2b("\0".join(key).encode(), digest_size=16).hexdigest())
    shares, shards = -(-readers // rows.num_shards), range(rows.num_shards)
    ranges = [FileRange(Path(name), i, i + 1, share, shares, block=1) for i in shards for share in range(shares)]
    return StreamedSource(spec, tuple(ranges), source.identity, source)


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
    points = (np.arange(batch) + (step + 1) * _GOLDEN % 1.0) / batch
    found = np.searchsorted(np.cumsum(weights[:-1]), points, side="right")
    # RandomState's numbers are frozen; those of numpy's newer generators may change with its version.
    return np.random.RandomState([seed, step & 0xFFFFFFFF, step >> 32]).permutation(found)
