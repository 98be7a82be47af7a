"""`TokenStream`: the windows of several sources. `StreamLoader`: a process's batches of them, and their positions."""

from __future__ import annotations

import hashlib
import logging
import os
import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from vwn.common.errors import UserError
from vwn.common.processes import all_gather_object
from vwn.data.corpus import Corpus, prepare_valid
from vwn.data.reading import OnBadRow
from vwn.data.stream.reader import START, Position, Reader, reader_count, reader_of
from vwn.data.stream.source import StreamedSource, open_source, parse_sources, sources_of_step
from vwn.data.tokenizer import TextEncoder, bpe_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FORMAT = 2  # of the state
_logger = logging.getLogger(__name__)

Positions = dict[int, list[Position]]


@dataclass(frozen=True, eq=False)
class TokenStream(IterableDataset[dict[str, torch.Tensor]]):
    """Windows of token ids from several sources, without end; `StreamLoader` makes batches of it.

    `weights` are the sources' shares of all tokens. `batch_size` is global: windows per optimiser step of all
    processes together. The batches depend on what is here and on nothing else. Up to `skip_bad_rows` rows that cannot
    be read are left out by each process, and logged.
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

    @cached_property
    def _encoder(self) -> TextEncoder:
        return TextEncoder(self.tokenizer, self.control_tokens)

    def open(self, reader: int, source: int, position: Position, on_bad_row: OnBadRow | None = None) -> Reader:
        """Open a reader of one source."""
        return Reader(
            self.sources[source],
            reader,
            self.readers,
            lambda text: self._encoder([text])[0],
            self._encoder.end,
            self.seed + source & 0xFFFFFFFF,
            position,
            on_bad_row,
        )

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return ({"input_ids": x, "labels": x.clone()} for b in StreamLoader(self) for x in b["input_ids"])


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
    return Corpus(
        train=train,
        valid=held_out.valid,
        tokenizer=held_out.tokenizer,
        train_tokens=None,
        valid_tokens=held_out.valid_tokens,
        valid_bytes_per_token=held_out.valid_bytes_per_token,
        fingerprint=f"{held_out.fingerprint}+{train.fingerprint}",
    )


class StreamLoader:
    """This process's batches of a `TokenStream`, without end, and where they stand.

    Process `rank` of `world` fills slots `rank * B / world` on of every global batch B, in `accumulation` batches
    `{"input_ids": LongTensor [B / world / accumulation, window], "labels": the same}`. Each of `workers` processes
    runs some of its readers, ahead of the training; 0 runs them in this one. None of these four changes what a global
    batch holds, so a state may be loaded with others than it was saved with.
    """

    def __init__(self, stream: TokenStream, rank: int = 0, world: int = 1, accumulation: int = 1, workers: int = 0):
        if stream.batch_size % (world * accumulation):
            raise UserError(
                f"--batch-size {stream.batch_size} cannot be divided among {world} processes with "
                f"--gradient-accumulation {accumulation}; make it a multiple of {world * accumulation}"
            )
        self.stream = stream
        self.rank, self.world, self.accumulation = rank, world, accumulation
        own_readers = stream.readers // world
        self.workers = min(workers, own_readers)
        self.step = 0
        self.positions: Positions = {}
        self._passes = [0] * len(stream.sources)
        self._skipped = 0
        _allow_files(own_readers * len(stream.sources))

    def state_dict(self) -> dict[str, Any]:
        """Position of every reader after the last batch taken, as JSON; every process must call it."""
        positions = {reader: place for part in all_gather_object(self.positions) for reader, place in part.items()}
        start = [START] * len(self.stream.sources)
        readers = [positions.get(reader, start) for reader in range(self.stream.readers)]
        return {
            "format": _FORMAT,
            "step": self.step,
            "readers": self.stream.readers,
            "sources": [
                {"name": source.name, "fingerprint": source.fingerprint, "positions": [_write(p[i]) for p in readers]}
                for i, source in enumerate(self.stream.sources)
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state, whatever the number of processes and workers. Raises `UserError` for other data."""
        try:
            known = [(s["name"], s["fingerprint"], [_read(p) for p in s["positions"]]) for s in state["sources"]]
            step, readers = int(state["step"]), int(state["readers"])
            readable = state["format"] == _FORMAT and all(len(places) == readers for _, _, places in known)
        except (KeyError, TypeError, ValueError):
            readable = False
        if not readable:
            raise UserError("the checkpoint's place in the streamed data cannot be read; use the checkpoint before it")
        if readers != self.stream.readers or len(known) != len(self.stream.sources):
            raise UserError(
                f"the checkpoint has {len(known)} sources in {readers} readers, the run {len(self.stream.sources)} in "
                f"{self.stream.readers}; continue with the --stream and --batch-size it was started with"
            )
        for (name, fingerprint, _), source in zip(known, self.stream.sources, strict=True):
            if fingerprint != source.fingerprint:
                raise UserError(
                    f"the files of {source.name} are not those that {name} had; restore them "
                    "(rows that cannot be read need no repair: --skip-bad-rows 100)"
                )
        self.step = step
        own = self.stream.batch_size // self.world
        self.positions = {
            reader: [places[reader] for _, _, places in known]
            for reader in range(readers)
            if reader % self.stream.batch_size // own == self.rank
        }
        self._passes = [
            max(self._pass(i, reader, place[0]) for reader, place in enumerate(places))
            for i, (_, _, places) in enumerate(known)
        ]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        size = self.stream.batch_size // self.world // self.accumulation
        shares = [iter(self._share(worker)) for worker in range(max(self.workers, 1))]
        for number in count():
            ids = torch.empty(size, self.stream.window, dtype=torch.long)
            step, part = self.step, number % self.accumulation
            for worker, share in enumerate(shares):
                rows = _rows(self, step, part, worker)
                if not rows:
                    continue
                made = next(share)
                if isinstance(made, str):
                    raise UserError(made)
                windows, places, skipped = made
                self._report(skipped)
                ids[[row for row, _ in rows]] = windows
                for (_, reader), (source, place) in zip(rows, places, strict=True):
                    self._note(reader, source, place)
            if part + 1 == self.accumulation:
                self.step = step + 1
            yield {"input_ids": ids, "labels": ids.clone()}

    def _share(self, worker: int) -> Any:
        share = _Share(self, worker)
        if not self.workers:
            return share
        # A tokenizer that has threads of its own must not be forked while they run; a worker is one thread.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        return DataLoader(share, batch_size=None, num_workers=1, prefetch_factor=4)

    def _note(self, reader: int, source: int, place: Position) -> None:
        self.positions.setdefault(reader, [START] * len(self.stream.sources))[source] = place
        number = self._pass(source, reader, place[0])
        if number > self._passes[source]:
            self._passes[source] = number
            if self.rank == 0:
                name = self.stream.sources[source].name
                _logger.info("%s has ended at step %d: pass %d of it begins", name, self.step + 1, number + 1)

    def _report(self, skipped: list[str]) -> None:
        for sentence in skipped:
            _logger.error("%s; skipped", sentence)  # an error, as other processes than the first say nothing less
        self._skipped += len(skipped)
        if self._skipped > self.stream.skip_bad_rows:
            raise UserError(_too_many(self.stream.skip_bad_rows, skipped[-1]))

    def _pass(self, source: int, reader: int, ranges: int) -> int:
        return (reader + ranges * self.stream.readers) // len(self.stream.sources[source].ranges)


class _Share(IterableDataset[Any]):
    """One worker's part of each batch: windows `[rows, window]`, the positions of their readers after them, and the
    errors of the rows left out on the way.

    A `UserError` travels as its sentence: a worker's exceptions arrive with a traceback in their text.
    """

    def __init__(self, loader: StreamLoader, worker: int):
        self._loader, self._worker = loader, worker

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._windows()
        except UserError as error:
            yield str(error)

    def _windows(self) -> Iterator[tuple[torch.Tensor, list[tuple[int, Position]], list[str]]]:
        loader, stream = self._loader, self._loader.stream
        start, open_readers = [START] * len(stream.sources), dict[tuple[int, int], Reader]()
        positions, left_out = dict(loader.positions), list[str]()

        def on_bad_row(error: UserError) -> None:
            if not stream.skip_bad_rows:
                raise UserError(f"{error}, or leave such rows out (--skip-bad-rows 100)") from error
            left_out.append(str(error))
            if len(left_out) > stream.skip_bad_rows:  # a file of nothing else would never fill a window
                raise UserError(_too_many(stream.skip_bad_rows, str(error)))

        for step in count(loader.step):
            sources = sources_of_step(stream.weights, stream.batch_size, step, stream.seed)
            for part in range(loader.accumulation):
                windows, places = [], []
                for _, reader in _rows(loader, step, part, self._worker):
                    source = int(sources[reader % stream.batch_size])
                    key = reader, source
                    if key not in open_readers:
                        position = positions.get(reader, start)[source]
                        open_readers[key] = stream.open(reader, source, position, on_bad_row)
                    windows.append(torch.from_numpy(open_readers[key].take(stream.window)))
                    places.append((source, open_readers[key].position))
                if windows:
                    yield torch.stack(windows), places, left_out.copy()
                    left_out.clear()


def _rows(loader: StreamLoader, step: int, part: int, worker: int) -> list[tuple[int, int]]:
    """List the rows of a batch that a worker fills, each with its reader. A reader is always of the same worker."""
    stream, workers = loader.stream, max(loader.workers, 1)
    own = stream.batch_size // loader.world
    size = own // loader.accumulation
    first = step % (stream.readers // stream.batch_size) * own + part * size  # number among the process's readers
    slot = loader.rank * own + part * size
    rows = [row for row in range(size) if (first + row) % workers == worker]
    return [(row, reader_of(step, slot + row, stream.batch_size)) for row in rows]


def _too_many(allowed: int, sentence: str) -> str:
    return f"{sentence}; more than {allowed} rows cannot be read (--skip-bad-rows)"


def _write(position: Position) -> str:
    return " ".join(map(str, position))


def _read(text: str) -> Position:
    begun, offset, chunk, taken = map(int, text.split())
    return begun, offset, chunk, taken


def _allow_files(readers: int) -> None:
    """Each reader of each source keeps a file open: raise this process's limit where it is too low."""
    wanted = readers + 256
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise UserError(
                f"{readers} files are read at once, but this machine lets a process open {hard}; "
                "take fewer sources or a smaller --batch-size per process, or raise the limit (ulimit -Hn)"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
