"""Lanes: a fixed number of readers, each with parts of every source of its own, however many processes share them.

A run has K lanes, a multiple of its global batch B. Slot j of step s is filled by lane (s mod K/B) B + j, so what a
batch holds depends on its step alone: not on the number of processes, of workers, or on what they have read ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from vwn.data.pieces import Skipped, cut
from vwn.data.shards import Shards

Position = tuple[int, int, int, int]
"""Units begun, offset of the piece in the unit, part of that piece, tokens of this part that are used up."""
START: Position = (0, 0, 0, 0)
_LEAST = 16

Encode = Callable[[str], np.ndarray]


def lane_count(batch: int) -> int:
    """Lanes of a run with a global batch of so many windows: as many, or a multiple that makes at least 16."""
    return batch * -(-_LEAST // batch)


def lane_of(step: int, slot: int, batch: int) -> int:
    """The lane that fills a slot of a step's global batch."""
    return step % (lane_count(batch) // batch) * batch + slot


class Lane:
    """What one lane reads of one source: an endless row of tokens, each document with its end of text.

    Its n-th unit is unit `lane + n * lanes` of the endless sequence of passes over the source, so that in a pass each
    unit is read by one lane, and all lanes begin a new pass at about the same time.
    """

    def __init__(
        self,
        source: Shards,
        lane: int,
        lanes: int,
        encode: Encode,
        end: int,
        seed: int,
        position: Position,
        skipped: Skipped | None = None,
    ):
        self._skipped = skipped
        self._source, self._lane, self._lanes, self._seed = source, lane, lanes, seed
        self._encode, self._end = encode, end
        self._parts = self._read(*position[:3])
        self._at, self._taken = position[:3], position[3]
        self._ids: np.ndarray | None = None

    @property
    def position(self) -> Position:
        """Where the next token is; a new lane that starts there goes on with it."""
        return (*self._at, self._taken)

    def take(self, count: int) -> np.ndarray:
        """The next tokens, `[count]`."""
        taken = np.empty(count, dtype=np.int64)
        filled = 0
        while filled < count:
            if self._ids is None:
                self._at, self._ids = next(self._parts)  # to continue: the part again, without what is used up
            elif self._taken == len(self._ids):
                (self._at, self._ids), self._taken = next(self._parts), 0
            size = min(count - filled, len(self._ids) - self._taken)
            taken[filled : filled + size] = self._ids[self._taken : self._taken + size]
            self._taken += size
            filled += size
        return taken

    def _read(self, count: int, offset: int, first: int) -> Iterator[tuple[tuple[int, int, int], np.ndarray]]:
        """Parts of documents as tokens, each with its place."""
        while True:
            unit = self._source.unit(self._lane + count * self._lanes, self._seed)
            for piece in self._source.pieces(unit, offset, self._skipped):
                for number, (text, ends) in enumerate(cut(piece.text)):
                    if number >= first:
                        ids = self._encode(text)
                        yield (count, piece.offset, number), np.append(ids, self._end) if ends and piece.ends else ids
                first = 0
            count, offset, first = count + 1, 0, 0
