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
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from processes import free_port
from runs import without_seconds
from vwn.common.processes import all_gather_object, all_present
from vwn.training.checkpoint.manifest import checkpoints, damage_of
from vwn.training.config import CorpusConfig, OptimConfig, SpeedOptions, TrainConfig
from vwn.training.run import train

STEPS, SAVE = 12, 4
BACKBONE = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
BACKBONE |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 258}
SEED = 0
REFUSED = "refused in a sentence"
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
        status = wait_for(child)
        return status, said.read_text(errors="replace")

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


def wait_for(child: int, seconds: float = 120) -> int:
    """Exit status of a child, as subprocess has it; a child that hangs is killed and fails the test."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError(f"a child was still at work after {seconds} s")
        time.sleep(0.005)


# What is done inside a child


def kill_at_operation(number: int | None, behind: str = "", log: Path | None = None) -> None:
    """Die at the so-manieth change to the file system below the run; or when something of this name has its place."""
    seen = 0

    def happened(event: str, arguments: Any) -> None:
        nonlocal seen
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if not (writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "vwn.fsync")):
            return
        if (
            ".incomplete" not in str(arguments)
            and "checkpoint-" not in str(arguments)
            and ".json" not in str(arguments)
        ):
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


def turn_clock(seconds: float) -> None:
    """The wall clock jumps at every look at it, back and forth."""
    real, draw = time.time, random.Random(SEED)
    time.time = lambda: real() + draw.choice((-1, 1)) * seconds


def believe_there_is_room() -> None:
    """As under a quota, which the system's figure of what is free does not know."""
    usage = shutil.disk_usage
    shutil.disk_usage = lambda path: usage(path)._replace(free=2**60)


# Kinds of faults: each yields its cases, (name, what is done to a copy of the begun run and must come of it)

Case = tuple[str, Callable[[Lab, Path], str]]
NEWEST = f"checkpoint-{2 * SAVE}"


def files(lab: Lab) -> list[str]:
    folder = lab.begun / NEWEST
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def passed_over(spoil: Callable[[Path], None]) -> Callable[[Lab, Path], str]:
    def fault(lab: Lab, out: Path) -> str:
        spoil(out / NEWEST)
        said = lab.finish(out)
        assert f"{NEWEST} is damaged" in said
        assert f"{SAVE}/{STEPS}" in said  # where the bar began
        return BEFORE

    return fault


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


def truncated(lab: Lab) -> Iterator[Case]:
    for name in files(lab):
        for part in (0.0, 0.5, 1.0):

            def cut(folder: Path, name: str = name, part: float = part) -> None:
                data = (folder / name).read_bytes()
                (folder / name).write_bytes(data[: min(int(part * len(data)), len(data) - 1)])

            yield f"{name} to {part}", passed_over(cut)


def flipped(lab: Lab) -> Iterator[Case]:
    draw = random.Random(SEED)
    for name in files(lab):
        for place in (draw.random(), draw.random()):

            def flip(folder: Path, name: str = name, place: float = place) -> None:
                data = bytearray((folder / name).read_bytes())
                data[int(place * len(data))] ^= 1 << int(place * 1e6) % 8
                (folder / name).write_bytes(data)

            yield f"{name} at {place:.3f}", passed_over(flip)


def missing(lab: Lab) -> Iterator[Case]:
    for name in files(lab):
        yield name, passed_over(lambda folder, name=name: (folder / name).unlink())


def foreign(lab: Lab) -> Iterator[Case]:
    def empty(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.mkdir()

    def renamed(folder: Path) -> None:
        shutil.rmtree(folder)
        shutil.copytree(folder.with_name(f"checkpoint-{SAVE}"), folder)

    yield "an empty folder", passed_over(empty)
    yield "another checkpoint under its name", passed_over(renamed)
    yield "a file more", passed_over(lambda folder: (folder / "notes.txt").write_text("mine") and None)
    yield (
        "another's manifest",
        passed_over(
            lambda folder: (
                shutil.copy(folder.with_name(f"checkpoint-{SAVE}") / "manifest.json", folder / "manifest.json") and None
            )
        ),
    )


def none_left(lab: Lab) -> Iterator[Case]:
    for name in files(lab)[::3]:

        def fault(lab: Lab, out: Path, name: str = name) -> str:
            for folder in checkpoints(out).values():
                (folder / name).write_bytes(b"")
            before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
            code, said = lab.run(out)
            assert code == 2, said
            assert "none of the checkpoints" in said
            assert {p: p.read_bytes() for p in before} == before
            return REFUSED

        yield name, fault


def spoilt_record(lab: Lab) -> Iterator[Case]:
    for name in ("run.json", "result.json"):
        for content in (b"", b"{", b"[]", b"\xff\xfe"):

            def fault(lab: Lab, out: Path, name: str = name, content: bytes = content) -> str:
                (out / name).write_bytes(content)
                code, said = lab.run(out)
                assert code == 2, said
                assert name in said.splitlines()[-1]
                assert list(checkpoints(out)) == [2 * SAVE, SAVE]
                return REFUSED

            yield f"{name} {content!r}", fault


def cannot_write(lab: Lab, out: Path, sabotage: Callable[[], None]) -> str:
    code, said = lab.run(out, sabotage=sabotage)
    assert code == 74, said[-2000:]
    assert "Traceback" not in said
    assert "cannot be written" in said.splitlines()[-1] or "the disk is full" in said.splitlines()[-1]
    assert damage_of(out / NEWEST) is None, "a checkpoint is lost that had been reported as saved"
    assert all(damage_of(path) is None for path in checkpoints(out).values())
    assert not (out / ".incomplete").exists()
    return STOPPED


def full_disk(lab: Lab) -> Iterator[Case]:
    """On a small tmpfs, which is made larger before the run is resumed."""
    size = sum(p.stat().st_size for p in lab.begun.rglob("*") if p.is_file())
    one = sum(p.stat().st_size for p in (lab.begun / NEWEST).rglob("*") if p.is_file())
    for quota in (False, True):
        for share in (0.02, 0.2, 0.4, 0.6, 0.8, 0.95, 0.999):

            def fault(lab: Lab, out: Path, quota: bool = quota, room: int = int(size + share * one)) -> str:
                with small_disk(out, room):
                    outcome = cannot_write(lab, out, believe_there_is_room if quota else lambda: None)
                    subprocess.run(["mount", "-o", "remount,size=64m", str(out)], check=True)
                    lab.finish(out)
                return outcome

            yield f"{share:.1%} of a checkpoint free{', under a quota' if quota else ''}", fault


@contextmanager
def small_disk(out: Path, room: int) -> Iterator[None]:
    """The run on a disk of its own."""
    held = out.with_name(f"{out.name}-held")
    out.rename(held)
    out.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room + 4096 * 40}", "tmpfs", str(out)], check=True)
    try:
        shutil.copytree(held, out, dirs_exist_ok=True)
        free = shutil.disk_usage(out).free
        target = room - sum(p.stat().st_size for p in held.rglob("*") if p.is_file())
        (out / "logs" / "ballast").write_bytes(bytes(max(0, free - target)))
        yield
    finally:
        subprocess.run(["umount", "-l", str(out)], check=True)
        shutil.rmtree(held)


def too_large_files(lab: Lab) -> Iterator[Case]:
    largest = max(p.stat().st_size for p in (lab.begun / NEWEST).rglob("*") if p.is_file())
    for share in (0.01, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.75, 0.9, 0.99):

        def limit(size: int = int(share * largest)) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        def fault(lab: Lab, out: Path, limit: Callable[[], None] = limit) -> str:
            outcome = cannot_write(lab, out, limit)
            lab.finish(out)
            return outcome

        yield f"files of {share:.0%} of the largest", fault


def changed_clock(lab: Lab) -> Iterator[Case]:
    for days in (1, 400, 9000):

        def fault(lab: Lab, out: Path, days: int = days) -> str:
            code, said = lab.run(out, sabotage=lambda: turn_clock(86400.0 * days))
            assert code == 0, said[-2000:]
            lab.is_same(out)
            return SAME

        yield f"jumps of {days} days", fault
    for seed in range(5):

        def aged(lab: Lab, out: Path, seed: int = seed) -> str:
            draw = random.Random(seed)
            for path in (p for p in out.rglob("*")):
                os.utime(path, (draw.uniform(0, 4e9),) * 2)
            os.utime(out / f"checkpoint-{SAVE}", (3.9e9, 3.9e9))  # the older one seems the newer
            said = lab.finish(out)
            assert f"{2 * SAVE}/{STEPS}" in said
            return SAME

        yield f"times of files, {seed}", aged


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


def in_a_group(rank: int, port: int, task: Callable[[], None], seconds: float) -> int:
    """A child that is one of two processes; its pid."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            import datetime

            import torch.distributed as dist

            store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
            dist.init_process_group(
                "gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=seconds)
            )
            with all_present():
                all_gather_object(rank)
                task()
            code = 0
        except Exception as error:
            code = getattr(error, "exit_code", 70)
        finally:
            os._exit(code)
    return child


def lost_process(lab: Lab) -> Iterator[Case]:
    """While a checkpoint is sealed by two processes; the other one ends in a sentence, and publishes nothing."""
    from vwn.training.checkpoint.manifest import publish, seal

    for lost in (0, 1):
        for how in (signal.SIGKILL, signal.SIGSTOP):

            def fault(lab: Lab, out: Path, lost: int = lost, how: int = how) -> str:
                staging = out / ".incomplete" / "checkpoint-10"
                shutil.copytree(out / NEWEST, staging)
                (staging / "manifest.json").unlink()

                def task(rank: int) -> None:
                    if rank == lost:
                        os.kill(os.getpid(), how)
                    seal(staging, 10)
                    publish(staging, out)

                port = free_port()
                children = [in_a_group(r, port, lambda r=r: task(r), 5.0) for r in (0, 1)]
                try:
                    assert wait_for(children[1 - lost], 60) == 69
                finally:
                    os.kill(children[lost], signal.SIGKILL)
                    os.waitpid(children[lost], 0)
                assert list(checkpoints(out)) == [2 * SAVE, SAVE]
                lab.finish(out)
                return STOPPED

            yield f"process {lost} by {signal.Signals(how).name}", fault


def other_world_size(lab: Lab) -> Iterator[Case]:
    """Sealed by two processes, continued by one, which says so; with a file of a process that is missing, not used."""
    from vwn.training.checkpoint.manifest import seal

    def sealed(out: Path) -> None:
        folder = out / NEWEST
        (folder / "manifest.json").unlink()
        shutil.copy(folder / "rng_state.pth", folder / "rng_state_0.pth")
        shutil.copy(folder / "rng_state.pth", folder / "rng_state_1.pth")
        port = free_port()
        children = [in_a_group(r, port, lambda: seal(folder, 2 * SAVE), 30.0) for r in (0, 1)]
        assert [wait_for(child) for child in children] == [0, 0]

    def fewer(lab: Lab, out: Path) -> str:
        sealed(out)
        assert "written by 2 processes, 1 go on with it" in lab.finish(out)
        return SAME

    def part(lab: Lab, out: Path, rank: int = 0) -> str:
        sealed(out)
        return passed_over(lambda folder: (folder / f"rng_state_{rank}.pth").unlink())(lab, out)

    yield "written by 2, continued by 1", fewer
    yield "the file of process 0 is missing", lambda lab, out: part(lab, out, 0)
    yield "the file of process 1 is missing", lambda lab, out: part(lab, out, 1)


KINDS: dict[str, Callable[[Lab], Iterator[Case]]] = {
    "kill -9 at each file operation of a save": killed_in_save,
    "kill -9 at any moment": killed_at_any_time,
    "a file cut short": truncated,
    "a bit flipped": flipped,
    "a file missing": missing,
    "a foreign or half-copied checkpoint": foreign,
    "every checkpoint damaged": none_left,
    "a damaged record of the run": spoilt_record,
    "disk full": full_disk,
    "file size limited": too_large_files,
    "clock changed": changed_clock,
    "SIGTERM": told_to_stop,
    "a process lost": lost_process,
    "another number of processes": other_world_size,
}
NEEDS_ROOT = {"disk full"}


def can_mount(folder: Path) -> bool:
    """Whether a small disk can be made here."""
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True)
    return made.returncode == 0 and subprocess.run(["umount", str(folder)]).returncode == 0
