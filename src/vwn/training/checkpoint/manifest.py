"""Checkpoints that are whole, or are not taken for one: written aside, listed with sizes and hashes, then renamed.

``manifest.json`` is written last: ``{format, step, world_size, files: {name: {bytes, blake2b}}}``. A file of which a
bit has changed, one that is short, missing or new makes a checkpoint unusable, and the one before is taken.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vwn.common.errors import UserError
from vwn.common.files import sync, sync_directory, write_json
from vwn.common.processes import all_gather_object, broadcast, rank, world_size

MANIFEST = "manifest.json"
FORMAT = 1
STAGING = ".incomplete"  # where a checkpoint or the final model is being written
DISCARDED = ".discarded-"  # in front of the name of what is being deleted


def checkpoints(directory: Path) -> dict[int, Path]:
    """Return the checkpoints in a run directory by step, newest first, whole or not; clocks have no say in it."""
    found = {int(m[1]): p for p in directory.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))}
    return dict(sorted(found.items(), reverse=True))


def last_checkpoint(directory: Path) -> Path | None:
    """Return the newest checkpoint that is whole; None where there has never been one.

    All processes of a run call it together: each reads a share, and all find the same.

    Raises:
        UserError: there are checkpoints, and none of them is whole.
    """
    steps = broadcast(list(checkpoints(directory)))
    why = ""
    for step in steps:
        checkpoint = directory / f"checkpoint-{step}"
        found = _agreed_damage(checkpoint)
        if found is None:
            return checkpoint
        if rank() == 0:
            before = "the one before is used" if step != steps[-1] else "there is none before it"
            print(f"vwn: {checkpoint} is damaged ({found}); {before}", file=sys.stderr)
        why = why or f"{checkpoint.name}: {found}"
    if steps:
        raise UserError(
            f"none of the checkpoints in {directory} can be used ({why}); restore one of them, or delete them to train "
            "from the start"
        )
    return None


def is_whole(checkpoint: Path) -> bool:
    """Return whether a checkpoint is there and undamaged, for all processes of a run together."""
    return broadcast(checkpoint.is_dir()) and _agreed_damage(checkpoint) is None


def _agreed_damage(checkpoint: Path) -> str | None:
    return next((d for d in all_gather_object(damage_of(checkpoint, rank(), world_size())) if d), None)


def step_of(checkpoint: Path) -> int:
    """Return the optimiser step in a checkpoint's name."""
    return int(checkpoint.name.rpartition("-")[2])


def damage_of(checkpoint: Path, share: int = 0, shares: int = 1) -> str | None:
    """Return why a checkpoint cannot be used, or None; of ``shares`` processes each reads one ``share`` of it."""
    if not (checkpoint / MANIFEST).exists():
        return f"{MANIFEST} is missing"
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        if manifest["format"] > FORMAT:
            return f"{MANIFEST} is of a newer vwn, format {manifest['format']}"
        listed = {name: (entry["bytes"], entry["blake2b"]) for name, entry in manifest["files"].items()}
        if manifest["self"] != _seal(manifest):
            return f"{MANIFEST} is not what was written"
        if checkpoint.name != f"checkpoint-{manifest['step']}":
            return f"{MANIFEST} is that of checkpoint-{manifest['step']}"
        found = {name: (checkpoint / name).stat().st_size for name in _files(checkpoint)}
        for name, (size, _) in listed.items():
            if name not in found:
                return f"{name} is missing"
            if found[name] != size:
                return f"{name} has {found[name]} bytes, not {size}"
        if extra := sorted(found.keys() - listed):
            return f"{extra[0]} does not belong to it"
        for name in sorted(listed)[share::shares]:
            if _hash(checkpoint / name) != listed[name][1]:
                return f"{name} is not what was written"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{MANIFEST}: {type(error).__name__} {error}"[:100]
    return None


def seal(checkpoint: Path, step: int) -> None:
    """Have the disk hold every file of a checkpoint, and list them; all processes together, when all have written."""
    names = broadcast(sorted(_files(checkpoint)))
    mine = {}
    for name in names[rank() :: world_size()]:
        sync(checkpoint / name)
        mine[name] = {"bytes": (checkpoint / name).stat().st_size, "blake2b": _hash(checkpoint / name)}
    files = {name: entry for part in all_gather_object(mine) for name, entry in part.items()}
    if rank() == 0:
        manifest: dict[str, Any] = {"format": FORMAT, "step": step, "world_size": world_size()}
        manifest["files"] = {name: files[name] for name in names}
        write_json(checkpoint / MANIFEST, manifest | {"self": _seal(manifest)})
        for folder in {(checkpoint / name).parent for name in names}:
            sync_directory(folder)


def publish(checkpoint: Path, directory: Path) -> Path:
    """Give a sealed checkpoint its place in the run directory, of which the disk knows when this returns."""
    place = directory / checkpoint.name
    discard(place)
    checkpoint.rename(place)
    sync_directory(directory)
    return place


def rotate(directory: Path, keep: int, whole: Iterable[int], last_step: int) -> None:
    """Delete the checkpoints up to step ``last_step`` but the last ``keep`` of those in ``whole``, which are good.

    Later ones are damaged leftovers of a run that was continued from before them; they stay until written anew.
    """
    stays = sorted(set(whole) & {step for step in checkpoints(directory) if step <= last_step})[-keep:]
    for step, path in checkpoints(directory).items():
        if step <= last_step and step not in stays:
            discard(path)


def discard(folder: Path) -> None:
    """Delete a checkpoint so that a kill in the middle does not leave half of it under its name."""
    if folder.exists():
        trash = folder.with_name(f"{DISCARDED}{folder.name}")
        shutil.rmtree(trash, ignore_errors=True)
        folder.rename(trash)
        shutil.rmtree(trash)


def clear_rests(directory: Path) -> None:
    """Delete what a killed process left half written or half deleted."""
    for rest in (directory / STAGING, *directory.glob(f"{DISCARDED}*")):
        shutil.rmtree(rest, ignore_errors=True)


def _files(checkpoint: Path) -> set[str]:
    """List all files but the manifest, those of sharded states in their folders too."""
    return {p.relative_to(checkpoint).as_posix() for p in checkpoint.rglob("*") if p.is_file()} - {MANIFEST}


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def _seal(manifest: dict[str, Any]) -> str:
    """Hash what a manifest says, so that a bit of it cannot change unseen either."""
    said = {name: value for name, value in manifest.items() if name != "self"}
    return hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=32).hexdigest()
