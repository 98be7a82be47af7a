"""The run directory: what it holds, when it may be written to, and how a run is taken up again."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vwn.common.errors import UserError
from vwn.common.files import read_json, write_json
from vwn.common.provenance import provenance
from vwn.training.budgets import format_tokens, parse_tokens
from vwn.training.checkpoint.manifest import clear_rests, last_checkpoint
from vwn.training.config import TrainConfig

LOCK = ".lock"
PARTIAL = re.compile(r"\..*\.partial")  # what a killed process had begun to write

# Settings that may change when a run is continued: its batches stay the same, but for rows that cannot be read.
FREE = ("corpus.workers", "corpus.skip_bad_rows", "sample_tokens", "report_to")
PATHS = ("init_from", "corpus.data", "corpus.valid", "corpus.stream", "corpus.tokenizer")
"""Settings that hold paths, which differ if seen from another folder; the text itself is compared separately."""


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
    """Return a directory's ``record`` file; None for a new directory.

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
    """Refuse to continue with other settings than the work was started with; options newer than it had defaults.

    A run may become longer where that changes nothing of what was trained, see :func:`extends`.
    """
    stored = _json(settings(TrainConfig(out=directory))) | stored
    for name, value in _json(asked).items():
        if name in FREE or name.startswith("reliability.") or extends(name, stored, value):
            continue
        if stored.get(name) != value and not (name in PATHS and _agree(stored.get(name), value)):
            was, field = stored.get(name), name.rpartition(".")[2]
            option = field if kind == "arm" else "--" + field.replace("_", "-")  # an arm's are of another form
            given = f"without {option}" if was is False or was in (None, []) else f"with {option} {was}"
            longer = "; only a run with a constant rate, or one with --budgets, can be made longer, and none shorter"
            raise UserError(
                f"the {kind} in {directory} was started {given}, not {value}"
                f"{longer if name == 'optim.steps' else ''}; drop the option to continue it, or choose another --out"
            )


def _agree(one: Any, other: Any) -> bool:
    """Return whether two paths, or lists of them, end alike: in two parts, or in one where there is but one."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_agree, one, other))
    ends = zip(Path(str(one)).parts[:-3:-1], Path(str(other)).parts[:-3:-1], strict=False)
    return [a == b for a, b in ends] in ([True], [True, True])


def extends(name: str, stored: dict[str, Any], value: Any) -> bool:
    """Return whether a setting's ``value`` makes a run longer: ``--steps`` at a constant rate, or ``--budgets``."""
    if name == "optim.steps":
        return stored["optim.schedule"] == "constant" and value > stored[name]
    return name == "optim.budgets" and bool(stored[name] and value)  # those of before stay


def check_same_text(directory: Path, stored: dict[str, Any], fingerprint: str) -> None:
    """Refuse to continue on other text: the data order, and perhaps the vocabulary, would not be the run's."""
    if stored.get("text") != fingerprint:
        raise UserError(
            f"the text or its tokens are not those that the run in {directory} was started with; "
            "restore the data, or choose another --out"
        )


def settings(config: TrainConfig) -> dict[str, Any]:
    """Return what determines a run as ``{dotted.name: value}``, without ``out``, ``parallel`` and ``resume``."""
    flat: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        flat |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
    flat["optim.budgets"] = tuple(format_tokens(parse_tokens(text)) for text in config.optim.budgets)
    flat["corpus.tokenizer"] = "bytes" if config.corpus.tokenizer is None else config.corpus.tokenizer
    return {name: value for name, value in flat.items() if name not in ("out", "parallel", "resume")}


def continued(config: TrainConfig, record: dict[str, Any]) -> TrainConfig:
    """Return a run with the warm-up and the budgets of its ``run.json``; it may have further budgets."""
    budgets = tuple(dict.fromkeys((*record["config"].get("optim.budgets", ()), *settings(config)["optim.budgets"])))
    optim = dataclasses.replace(config.optim, warmup_steps=record.get("warmup", config.warmup), budgets=budgets)
    return dataclasses.replace(config, optim=optim)


def start(config: TrainConfig, fingerprint: str, rate_factors: dict[str, float]) -> None:
    """Record everything needed to repeat the run, or that it was made longer; drop what a killed one left half done."""
    clear_rests(config.out)
    asked, path = settings(config), config.out / "run.json"
    if not path.exists():
        record = {"config": asked, "text": fingerprint, "warmup": config.warmup, "rate_factors": rate_factors}
        write_json(path, record | provenance())
        return
    record = read_json(path)
    before = record["config"]
    longer = {n: before[n] for n in ("optim.steps", "optim.budgets") if n in before and before[n] != _json(asked[n])}
    if longer:
        record["config"] = before | {name: asked[name] for name in longer}
        record["extended"] = [*record.get("extended", []), {"before": longer, **provenance()}]
        write_json(path, record)


def _json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def locate(checkpoint: str) -> Path | str:
    """Return the folder of a checkpoint: itself, or the last one of a run directory; a hub id stays as it is.

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
    """Read ``run.json`` of the training run that wrote a checkpoint; empty if there is none."""
    folders = (source, source.resolve().parent) if isinstance(source, Path) else ()
    return next((read_json(f / "run.json") for f in folders if (f / "run.json").exists()), {})
