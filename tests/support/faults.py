"""Faults to inject into training runs, and what must come of each: a laboratory for ``test_faults.py``.

Every run is the command line itself, in a child forked from a process that has imported everything. The reference runs
left alone; ``begun`` is the same run killed behind its second checkpoint, and each fault happens to a copy of it.
"""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from runs import without_seconds
from vwn.training.checkpoint.manifest import checkpoints, damage_of
from vwn.training.config import CorpusConfig, OptimConfig, SpeedOptions, TrainConfig
from vwn.training.run import train

STEPS, SAVE = 12, 4
BACKBONE = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
BACKBONE |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 258}
SEED = 0
BEFORE = "the checkpoint before is used, same run"
SAME = "same run"
RESUMED = "killed, resumed, same run"
STOPPED = "stopped in a sentence, resumed, same run"


@dataclass
class Lab:
    """Where the faults happen."""

    root: Path
    text: Path
    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    number: int = 0

    def __post_init__(self) -> None:
        self.reference, self.begun = self.root / "reference", self.root / "begun"
        self.backbone = self.root / "backbone.json"
        self.backbone.write_text(json.dumps(BACKBONE))
        made = TrainConfig(
            out=self.root / "warm",  # what a first run imports and sets up, no child need do again
            backbone=str(self.backbone),
            m=2,
            n=3,
            corpus=CorpusConfig(data=str(self.text), window=16, max_valid_tokens=64),
            optim=OptimConfig(steps=1, batch_size=2, learning_rate=0.01),
            speed=SpeedOptions("reference"),
        )
        train(made)
        gc.collect()
        gc.freeze()  # or every child's collections would go through, and so copy, all that it inherited
        code, said = self.run(self.reference)
        assert code == 0, said
        killed, _ = self.run(self.begun, sabotage=lambda: kill_at_operation(None, f"checkpoint-{2 * SAVE}"))
        assert killed == -signal.SIGKILL
        assert list(checkpoints(self.begun)) == [2 * SAVE, SAVE]
        shutil.rmtree(self.begun / ".incomplete", ignore_errors=True)  # the room that a next run finds is to be known

    def copy(self) -> Path:
        """The begun run, to be spoilt."""
        self.number += 1
        return Path(shutil.copytree(self.begun, self.root / f"fault-{self.number}"))

    def run(self, out: Path, *more: str, sabotage: Callable[[], Any] = lambda: None) -> tuple[int, str]:
        """`vwn train --resume auto` in a child; its exit status, negative for a signal, and what it said."""
        said = self.root / "said.txt"
        child = os.fork()
        if child == 0:
            log = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1) for fd in (1, 2))  # pytest has its own
            code = 70
            signal.alarm(120)  # a child that hangs ends with another code than is expected
            try:
                from vwn.cli import main

                sys.argv = ["vwn", *self.command(out), *more]
                sabotage()
                main()
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status), said.read_text(errors="replace")

    def command(self, out: Path) -> list[str]:
        return [
            "train", "--out", str(out), "--data", str(self.text), "--window", "16", "--max-valid-tokens", "64",
            "--backbone", str(self.backbone), "--m", "2", "--n", "3", "--mtp", "1", "--connection-backend", "reference",
            "--steps", str(STEPS), "--batch-size", "2", "--learning-rate", "0.01", "--log-every", "3",
            "--eval-every", "6", "--save-every", str(SAVE), "--resume", "auto",
        ]  # fmt: skip

    def is_same(self, out: Path) -> None:
        """The finished run is the reference, bit for bit: curve, logs, weights."""

        def logs(run: Path) -> list[dict[str, Any]]:
            history = json.loads((run / f"checkpoint-{STEPS}/trainer_state.json").read_text())["log_history"]
            timed = ("seconds", "runtime", "per_second")
            return [{k: v for k, v in entry.items() if not k.endswith(timed)} for entry in history]

        curves = [without_seconds(json.loads((r / "result.json").read_text())["curve"]) for r in (out, self.reference)]
        assert curves[0] == curves[1]
        assert logs(out) == logs(self.reference)
        one, other = (load_file(r / "model.safetensors") for r in (out, self.reference))
        assert one.keys() == other.keys()
        assert all(one[name].equal(other[name]) for name in other)
        assert damage_of(out / f"checkpoint-{STEPS}") is None

    def finish(self, out: Path) -> str:
        """Resume to the end, and compare; what was said on the way."""
        code, said = self.run(out)
        assert code == 0, said[-2000:]
        self.is_same(out)
        return said


# What is done inside a child


def kill_at_operation(number: int | None, behind: str = "", log: Path | None = None) -> None:
    """Die at the so-manieth change to the file system below the run; or when something of this name has its place."""
    seen = 0

    def happened(event: str, arguments: Any) -> None:
        nonlocal seen
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if not (writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "vwn.fsync")):
            return
        if not any(part in str(arguments) for part in (".incomplete", "checkpoint-", ".json")):
            return
        seen += 1
        if log is not None:
            log.write_text(f"{seen}") if event != "open" or str(log) not in str(arguments) else None
        if seen == number or (behind and event == "vwn.fsync" and os.path.exists(os.path.join(OUT[0], behind))):
            os.kill(os.getpid(), signal.SIGKILL)

    OUT[:] = [sys.argv[sys.argv.index("--out") + 1]]
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        sync(descriptor)
        sys.audit("vwn.fsync", os.readlink(f"/proc/self/fd/{descriptor}"))

    os.fsync = fsync
    sys.addaudithook(happened)


OUT = [""]


def kill_after(seconds: float) -> None:
    signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))


def stop_after(step: int, when: str) -> None:
    """SIGTERM to ourselves: in the middle of a step, of a validation or of a save."""
    from vwn.training.trainer import VirtualWidthTrainer

    kept = getattr(VirtualWidthTrainer, when)

    def with_signal(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step >= step:
            os.kill(os.getpid(), signal.SIGTERM)
        return kept(self, *args, **kwargs)

    setattr(VirtualWidthTrainer, when, with_signal)


# Kinds of faults: each yields its cases, (name, what is done to a copy of the begun run and must come of it)

Case = tuple[str, Callable[[Lab, Path], str]]
Spoiling = tuple[str, Callable[[Path], Any]]
Damage = Callable[[Lab], Iterator[Spoiling]]
NEWEST = f"checkpoint-{2 * SAVE}"


def files(lab: Lab) -> list[str]:
    folder = lab.begun / NEWEST
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def killed_in_save(lab: Lab) -> Iterator[Case]:
    log = lab.root / "operations"
    out = lab.copy()
    assert lab.run(out, sabotage=lambda: kill_at_operation(None, log=log))[0] == 0
    for number in range(1, int(log.read_text()) + 1):
        yield f"operation {number}", lambda lab, out, n=number: killed(lab, out, lambda: kill_at_operation(n))


def killed(lab: Lab, out: Path, sabotage: Callable[[], None]) -> str:
    code, said = lab.run(out, sabotage=sabotage)
    assert code in (-signal.SIGKILL, 0), said[-2000:]
    whole = [step for step, path in checkpoints(out).items() if damage_of(path) is None]
    assert whole, "no checkpoint is left"
    assert max(whole) >= 2 * SAVE, "a checkpoint is lost that had been reported as saved"
    assert whole == list(checkpoints(out)), "half a checkpoint bears a checkpoint's name"
    lab.finish(out)
    return RESUMED


def killed_at_any_time(lab: Lab) -> Iterator[Case]:
    draw = random.Random(SEED)
    out, begin = lab.copy(), time.monotonic()
    lab.finish(out)
    duration = time.monotonic() - begin
    for number in range(30):
        after = draw.uniform(0.1, 1.0) * duration
        yield f"moment {number}", lambda lab, out, s=after: killed(lab, out, lambda: kill_after(s))


def passed_over(damage: Damage) -> Callable[[Lab], Iterator[Case]]:
    def fault(lab: Lab, out: Path, spoil: Callable[[Path], Any]) -> str:
        spoil(out / NEWEST)
        said = lab.finish(out)
        assert f"{NEWEST} is damaged" in said
        assert f"{SAVE}/{STEPS}" in said  # where the bar began
        return BEFORE

    def cases(lab: Lab) -> Iterator[Case]:
        for name, spoil in damage(lab):
            yield name, partial(fault, spoil=spoil)

    return cases


def truncated(lab: Lab) -> Iterator[Spoiling]:
    def cut(folder: Path, name: str, part: float) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: min(int(part * len(data)), len(data) - 2)])

    for name in files(lab):
        for part in (0.0, 0.5, 1.0):
            yield f"{name} to {part}", partial(cut, name=name, part=part)


def flipped(lab: Lab) -> Iterator[Spoiling]:
    def flip(folder: Path, name: str, place: float) -> None:
        data = bytearray((folder / name).read_bytes())
        data[int(place * len(data))] ^= 1 << int(place * 1e6) % 8
        (folder / name).write_bytes(data)

    draw = random.Random(SEED)
    for name in files(lab):
        for place in (draw.random(), draw.random()):
            yield f"{name} at {place:.3f}", partial(flip, name=name, place=place)


def missing(lab: Lab) -> Iterator[Spoiling]:
    for name in files(lab):
        yield name, lambda folder, name=name: (folder / name).unlink()


def foreign(lab: Lab) -> Iterator[Spoiling]:
    def empty(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.mkdir()

    def renamed(folder: Path) -> None:
        shutil.rmtree(folder)
        shutil.copytree(folder.with_name(f"checkpoint-{SAVE}"), folder)

    def manifest(folder: Path) -> None:
        shutil.copy(folder.with_name(f"checkpoint-{SAVE}") / "manifest.json", folder / "manifest.json")

    yield "an empty folder", empty
    yield "another checkpoint under its name", renamed
    yield "a file more", lambda folder: (folder / "notes.txt").write_text("mine")
    yield "another's manifest", manifest


DAMAGES: dict[str, Damage] = {
    "a file cut short": truncated,
    "a bit flipped": flipped,
    "a file missing": missing,
    "a foreign or half-copied checkpoint": foreign,
}


def full_disk(lab: Lab) -> Iterator[Case]:
    """The system says how little is free; or it does not, as under a quota, and writing fails at some file's end."""

    def fault(lab: Lab, out: Path, sabotage: Callable[[], Any]) -> str:
        code, said = lab.run(out, sabotage=sabotage)
        assert code == 74, said[-2000:]
        assert "Traceback" not in said
        assert "cannot be written" in said.splitlines()[-1] or "the disk is full" in said.splitlines()[-1]
        assert damage_of(out / NEWEST) is None, "a checkpoint is lost that had been reported as saved"
        assert all(damage_of(path) is None for path in checkpoints(out).values())
        assert not (out / ".incomplete").exists()
        lab.finish(out)
        return STOPPED

    def little_is_free() -> None:
        usage = shutil.disk_usage
        shutil.disk_usage = lambda path: usage(path)._replace(free=1000)

    yield "1000 bytes are free", partial(fault, sabotage=little_is_free)
    largest = max(p.stat().st_size for p in (lab.begun / NEWEST).rglob("*") if p.is_file())
    for share in (0.01, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.75, 0.9, 0.99):
        limit = int(share * largest), resource.RLIM_INFINITY
        yield (
            f"files of {share:.0%} of the largest",
            partial(fault, sabotage=partial(resource.setrlimit, resource.RLIMIT_FSIZE, limit)),
        )


def told_to_stop(lab: Lab) -> Iterator[Case]:
    for when in ("training_step", "prediction_step", "_save_rng_state", "log"):
        for step in (1, 4, 7):

            def fault(lab: Lab, out: Path, when: str = when, step: int = step) -> str:
                shutil.rmtree(out)  # from the start, so that saves and validations come before the end
                code, said = lab.run(out, sabotage=lambda: stop_after(step, when))
                if code == 0:  # told at its last step: nothing is left to be resumed
                    lab.is_same(out)
                    return SAME
                assert code == 75, said[-2000:]
                last = next(iter(checkpoints(out)))
                assert f"stopped by SIGTERM after step {last}" in said
                assert damage_of(out / f"checkpoint-{last}") is None
                lab.finish(out)
                return STOPPED

            yield f"{when} of step {step}", fault


KINDS: dict[str, Callable[[Lab], Iterator[Case]]] = {
    "kill -9 at each file operation of a save": killed_in_save,
    "kill -9 at any moment": killed_at_any_time,
    **{kind: passed_over(damage) for kind, damage in DAMAGES.items()},
    "disk full": full_disk,
    "SIGTERM": told_to_stop,
}
