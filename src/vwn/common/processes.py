"""Collectives over the processes of a run; with one process they return its own value."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from vwn.common.errors import UserError

T = TypeVar("T")


class LostProcess(UserError):
    """Another process of the run is gone, or does not answer."""

    exit_code = 69
    """Exit code of the command line: EX_UNAVAILABLE of sysexits.h."""


@contextmanager
def all_present() -> Iterator[None]:
    """Raise :class:`LostProcess` in place of the errors by which torch.distributed and gloo report a lost process."""
    try:
        yield
    except RuntimeError as error:
        if world_size() == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        why = " ".join(str(error).split()).rpartition("] ")[2][:150]
        raise LostProcess(
            f"another process of this run is gone or does not answer ({why}); start all again with --resume auto"
        ) from error


def world_size() -> int:
    """Return the number of processes that have joined."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def all_gather_object(value: T) -> list[T]:
    """Collect the value of each process, by rank; all of them must call."""
    if world_size() == 1:
        return [value]
    found: list[T | None] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found  # type: ignore[return-value]


def broadcast(value: T) -> T:
    """Get the value of the first process; all of them must call."""
    if world_size() == 1:
        return value
    found = [value]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def all_reduce_max(value: int, device: torch.device) -> int:
    """Get the largest value of any process, cheaply enough for every step; all of them must call."""
    if world_size() == 1:
        return value
    found = torch.tensor(value, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)
