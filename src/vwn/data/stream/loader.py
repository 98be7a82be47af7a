"""`TokenStream`: the windows of several sources. `StreamLoader`: a process's batches of them, and their positions."""

from __future__ import annotations

import hashlib
import logging
import os
import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vwn.common.errors import UserError
from vwn.common.processes import all_gather_object
from vwn.data.corpus import Corpus, prepare_valid
from vwn.data.stream.reader import START, Position, Reader, reader_count, reader_of
from vwn.data.stream.source import StreamedSource, open_source, parse_sources, sources_of_step
from vwn.data.tokenizer import TextEncoder, bpe_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FORMAT = 2  # of the state
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TokenStream:
    """Windows of token ids from several sources, without end; `StreamLoader` makes batches of it.

    `weights` are the sources' shares of all tokens. `batch_size` is global: windows per optimiser step of all
    processes together. The batches depend on what is here and on nothing else. Each process that reads leaves out, and
    logs, up to `skip_bad_rows` rows that cannot be read.
    """

    sources: tuple[StreamedSource, ...]
    weights: tuple[float, ...]
    tokenizer: PreTrainedTokenizerFast
    window: int
    batch_size: int
    seed: int
    skip_bad_rows: int = 0
    control_tokens: bool = False

    @property
    def readers(self) -> int:
        """Number of readers that share the sources."""
        return reader_count(self.batch_size)

    @property
    def fingerprint(self) -> str:
        """Hash of the sources' files, as `StreamedSource` has it, and of how they are tokenised."""
        digest = hashlib.blake2b(self.tokenizer.backend_tokenizer.to_str().encode(), digest_size=16)
        digest.update(bytes([self.control_tokens]))
        for source in self.sources:
            digest.update(source.fingerprint.encode())
        return digest.hexdigest()


def prepare_stream(
    sources: Sequence[str],
    *,
    valid: str | None,
    tokenizer: str,
    window: int,
    batch_size: int,
    seed: int = 0,
    skip_bad_rows: int = 0,
    control_tokens: bool = False,
) -> Corpus:
    """Prepare a corpus whose training side is streamed: it is neither written to disk nor ever all in memory.

    Args:
        sources: each a file, a folder, a pattern (`shards/*.parquet`) or a hub id, with `=WEIGHT` behind it for its
            share of the tokens.
        valid, window, control_tokens: as in `prepare`.
        tokenizer: `bytes`, a folder or a hub id.
        batch_size: windows per optimiser step, of all processes together.
        seed: of the order of the file ranges and of the mixture.
        skip_bad_rows: how many rows that cannot be read each process leaves out and logs; at the next one it stops.

    Raises:
        UserError: a source that is missing, unreadable or empty; no `valid`; a tokeniser that is yet to be trained.
    """
    weights = parse_sources(sources)
    if valid is None:
        raise UserError("--stream needs --valid: streamed text is never seen as a whole, so no part can be held out")
    if bpe_size(tokenizer):
        raise UserError(
            f"--stream needs a tokenizer that exists, not {tokenizer}: train one on a sample with vwn train "
            f"--data SAMPLE --tokenizer {tokenizer} --steps 1 --out runs/sample, and give --tokenizer runs/sample"
        )
    held_out = prepare_valid(valid, tokenizer=tokenizer, window=window, control_tokens=control_tokens)
    train = TokenStream(
        tuple(open_source(source, reader_count(batch_size)) for source in weights),
        tuple(weights.values()),
        held_out.tokenizer,
        window,
        batch_size,
        seed,
        skip_bad_rows,
        control_tokens,
    )
    fingerprint = f"{held_out.fingerprint}+{train.fingerprint}"
    return replace(held_out, train=train, train_tokens=None, fingerprint=fingerprint)


class StreamLoader:
    """This process's batches of a `TokenStream`, without end, and where they stand.

    Process `rank` of `world` fills slots `rank * B / world` on of every global batch B, in `accumulation` batches
    `{"input_ids": LongTensor [B / world / accumulation, window], "labels": the same}`. At most `workers` processes read
    ahead of the training, as many as divide its readers evenly; 0 reads in this one. None of these four changes what a
    global batch holds, so a state may be loaded with others than it was saved with.
    """

    def __init__(self, stream: TokenStream, rank: int = 0, world: int = 1, accumulation: int = 1, workers: int = 0):
        if stream.batch_size % (world * accumulation):
            raise UserError(
                f"--batch-size {stream.batch_size} cannot be divided among {world} processes with "
                f"--gradient-accumulation {accumulation}; make it a multiple of {world * accumulation}"
            )
        self.stream, self.rank, self.accumulation = stream, rank, accumulation
        self.own = stream.batch_size // world
        readers = stream.readers // world
        self.workers = max((w for w in range(1, min(workers, readers) + 1) if readers % w == 0), default=0)
        self.step = 0
        self.positions: dict[int, list[Position]] = {}
        _allow_files(readers * len(stream.sources))

    def state_dict(self) -> dict[str, Any]:
        """Return the position of every reader after the last batch taken, as JSON; every process must call it."""
        positions = {reader: place for part in all_gather_object(self.positions) for reader, place in part.items()}
        readers = [positions.get(reader, [START] * len(self.stream.sources)) for reader in range(self.stream.readers)]
        return {
            "format": _FORMAT,
            "step": self.step,
            "readers": self.stream.readers,
            "sources": [
                {
                    "name": source.name,
                    "fingerprint": source.fingerprint,
                    "positions": [" ".join(map(str, place[i])) for place in readers],
                }
                for i, source in enumerate(self.stream.sources)
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state, whatever the number of processes and workers. Raises `UserError` for other data."""
        if state.get("format") != _FORMAT:
            raise UserError("the checkpoint's place in the streamed data cannot be read; use the checkpoint before it")
        known, sources = state["sources"], self.stream.sources
        if state["readers"] != self.stream.readers or len(known) != len(sources):
            raise UserError(
                f"the checkpoint has {len(known)} sources in {state['readers']} readers, the run {len(sources)} in "
                f"{self.stream.readers}; continue with the --stream and --batch-size it was started with"
            )
        for stored, source in zip(known, sources, strict=True):
            if stored["fingerprint"] != source.fingerprint:
                raise UserError(
                    f"the files of {source.name} are not those that {stored['name']} had; restore them "
                    "(rows that cannot be read need no repair: --skip-bad-rows 100)"
                )
        self.step = state["step"]
        self.positions = {
            reader: [tuple(map(int, stored["positions"][reader].split())) for stored in known]  # type: ignore[misc]
            for reader in range(self.stream.readers)
            if reader % self.stream.batch_size // self.own == self.rank
        }

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        size = self.own // self.accumulation
        options: dict[str, Any] = {"generator": torch.Generator()}  # or it would draw from the model's
        if self.workers:
            # A tokenizer that has threads of its own must not be forked while they run; a worker is one thread.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
            options |= {"num_workers": self.workers, "prefetch_factor": -(-4 * size // self.workers)}
        windows = iter(DataLoader(_Windows(self), batch_size=None, collate_fn=_unchanged, **options))
        for number in count(1):
            ids = np.empty((size, self.stream.window), dtype=np.int64)
            for row in range(size):
                made = next(windows)
                if isinstance(made, str):
                    raise UserError(made)
                ids[row], reader, source, place = made
                self.positions.setdefault(reader, [START] * len(self.stream.sources))[source] = place
            if number % self.accumulation == 0:
                self.step += 1
            yield {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(ids.copy())}


class _Windows(IterableDataset[Any]):
    """The windows of a process in order, each with its reader, its source and the reader's position after it.

    In a worker, those that are its turn: a reader is always of the same worker. A `UserError` travels as its sentence:
    a worker's exceptions arrive with a traceback in their text.
    """

    def __init__(self, loader: StreamLoader):
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._windows()
        except UserError as error:
            yield str(error)

    def _windows(self) -> Iterator[tuple[np.ndarray, int, int, Position]]:
        loader, stream, worker = self._loader, self._loader.stream, get_worker_info()
        turn, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        encoder = TextEncoder(stream.tokenizer, stream.control_tokens)
        on_bad_row, open_readers = _Skipping(stream.skip_bad_rows), dict[tuple[int, int], Reader]()
        numbers = count()
        for step in count(loader.step):
            sources = sources_of_step(stream.weights, stream.batch_size, step, stream.seed)
            for slot in range(loader.rank * loader.own, (loader.rank + 1) * loader.own):
                if next(numbers) % workers != turn:
                    continue
                index, source = reader_of(step, slot, stream.batch_size), int(sources[slot])
                if (index, source) not in open_readers:
                    open_readers[index, source] = Reader(
                        stream.sources[source],
                        index,
                        stream.readers,
                        lambda text: encoder([text])[0],
                        encoder.end,
                        stream.seed + source & 0xFFFFFFFF,
                        loader.positions[index][source] if index in loader.positions else START,
                        on_bad_row,
                    )
                reader = open_readers[index, source]
                yield reader.take(stream.window), index, source, reader.position


class _Skipping:
    """Leave out rows that cannot be read, up to a number, and log each."""

    def __init__(self, allowed: int):
        self._allowed = self._left = allowed

    def __call__(self, error: UserError) -> None:
        if not self._allowed:
            raise UserError(f"{error}, or leave such rows out (--skip-bad-rows 100)") from error
        if not self._left:
            raise UserError(f"{error}; more than {self._allowed} rows cannot be read (--skip-bad-rows)") from error
        self._left -= 1
        _logger.error("%s; skipped", error)  # every process logs errors; only the first logs anything milder


def _unchanged(window: Any) -> Any:
    return window


def _allow_files(readers: int) -> None:
    """Raise this process's limit on open files where it is too low: each reader of each source keeps one open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < readers + 256:
        wanted = readers + 256 if hard == resource.RLIM_INFINITY else min(readers + 256, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
