"""The run directory: what it holds, when it may be written to, and how a run is taken up again."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vwn.common.errors import UserError
from vwn.common.files import read_json, write_json
from vwn.common.provenance import provenance
from vwn.training.checkpoint.manifest import FORMAT, clear_rests, last_checkpoint
from vwn.training.config import CorpusConfig, OptimConfig, ReliabilityOptions, SpeedOptions, TrainConfig, WidthOptions

LOCK = ".lock"
PARTIAL = re.compile(r"\..*\.partial")  # what a killed process had begun to write

# Settings that a run may be continued with others of: the batches are the same, but for rows that cannot be read.
FREE = ("corpus.workers", "corpus.skip_bad_rows")


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep other processes out of a run directory, which is created.

    Raises:
        UserError: somebody is in there already, or the directory cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the directory {directory} cannot be made: {error.strerror}; choose another --out") from error
    lock = FileLock(directory / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"another process is at work in {directory}; wait for it or choose another --out") from None
    try:
        yield
    finally:
        lock.release()


def open_directory(directory: Path, record: str, resume: bool) -> dict[str, Any] | None:
    """What a directory's ``record`` file says of the work in it; None for a new directory.

    Raises:
        UserError: something is there and ``resume`` was not asked for, or what is there is not ours.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file; choose another --out")
    if not directory.exists() or all(p.name == LOCK or PARTIAL.fullmatch(p.name) for p in directory.iterdir()):
        return None
    if not resume:
        raise UserError(f"the directory {directory} exists already; continue it with --resume or choose another --out")
    if not (directory / record).exists():
        raise UserError(f"{directory} holds something else (there is no {record} in it); choose another --out")
    return read_json(directory / record)


def check_same(directory: Path, stored: dict[str, Any], asked: dict[str, Any], kind: str = "run") -> None:
    """Refuse to continue with other settings than the work was started with; options newer than it had defaults."""
    defaults = settings(TrainConfig(out=directory))
    for name, value in asked.items():
        if name in FREE or name.startswith("reliability."):
            continue
        if stored.get(name, json.loads(json.dumps(defaults.get(name)))) != json.loads(json.dumps(value)):
            raise UserError(
                f"the {kind} in {directory} was started with {name} = {stored.get(name)!r}, not {value!r}; "
                "leave the option away to continue it, or choose another --out"
            )


def check_same_text(directory: Path, stored: dict[str, Any], fingerprint: str) -> None:
    """Refuse to continue on other text: the data order, and perhaps the vocabulary, would not be the run's."""
    if stored.get("text") != fingerprint:
        raise UserError(
            f"the text or its tokens are not those that the run in {directory} was started with; "
            "restore the data, or choose another --out"
        )


def settings(config: TrainConfig) -> dict[str, Any]:
    """Everything that determines the run, flat, by dotted name; not where it lies, on what, or whether it resumes."""
    flat: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        flat |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
    return {name: value for name, value in flat.items() if name not in ("out", "parallel", "resume")}


def adopt(config: TrainConfig, given: Set[str]) -> TrainConfig:
    """The configuration to resume: of the stored run, but for the options that were ``given``."""
    if not config.resume or not (config.out / "run.json").exists():
        return config
    stored = read_json(config.out / "run.json").get("config", {})
    flat = {
        name: value if name.split(".")[-1] in given else stored.get(name, value)
        for name, value in settings(config).items()
    }
    parts: dict[str, Any] = {name: value for name, value in flat.items() if "." not in name}
    groups: dict[str, Any] = {"corpus": CorpusConfig, "width": WidthOptions, "optim": OptimConfig}
    groups |= {"speed": SpeedOptions, "reliability": ReliabilityOptions}
    for group, make in groups.items():
        parts[group] = make(**{k.split(".")[1]: v for k, v in flat.items() if k.startswith(f"{group}.")})
    return TrainConfig(out=config.out, parallel=config.parallel, resume=config.resume, **parts)


def start(config: TrainConfig, fingerprint: str) -> None:
    """Record everything needed to repeat the run; drop what a killed one left half done."""
    clear_rests(config.out)
    if not (config.out / "run.json").exists():
        record = {"config": settings(config), "text": fingerprint, "checkpoint_format": FORMAT, **provenance()}
        write_json(config.out / "run.json", record)


def locate(checkpoint: str) -> Path | str:
    """The folder of a checkpoint: itself, or the last one of a run directory; a hub id stays as it is.

    Raises:
        UserError: there is no model.
    """
    path = Path(checkpoint)
    if path.is_dir() and not (path / "config.json").exists():
        path = last_checkpoint(path) or path
    if not path.exists():
        # owner/name is a hub id, unless its first part is a folder here or looks like one
        is_local = checkpoint.startswith((".", "/", "~", "runs/")) or path.parent.is_dir()
        if checkpoint.count("/") == 1 and not is_local:
            return checkpoint
        raise UserError(f"there is no checkpoint at {checkpoint!r}; give a run directory or a hub id owner/name")
    if not (path / "config.json").exists():
        raise UserError(
            f"{path} holds no model (no config.json); give the --out of a training run or a checkpoint-N in it"
        )
    return path


def run_record(source: Path | str) -> dict[str, Any]:
    """``run.json`` of the training run that wrote a checkpoint; empty if there is none."""
    folders = (source, source.resolve().parent) if isinstance(source, Path) else ()
    return next((read_json(f / "run.json") for f in folders if (f / "run.json").exists()), {})
