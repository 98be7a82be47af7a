"""Decayed losses at several budgets: one trunk at the peak rate, and for each budget a branch that cools down.

A branch starts from the trunk's checkpoint at the step where its own straight run would begin to cool down, so it ends
with the weights of that run, to the bit on one CPU process.
"""

from __future__ import annotations

import dataclasses
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vwn.common.errors import UserError
from vwn.common.files import read_json, sync, sync_directory
from vwn.common.processes import broadcast, rank
from vwn.training import directory
from vwn.training.budgets import Branch, decay_steps
from vwn.training.checkpoint.manifest import checkpoints, discard, is_whole, last_checkpoint, step_of
from vwn.training.distributed import on_all_ranks
from vwn.training.result import Point, RunResult, stored_result
from vwn.training.trainer import Diverged

if TYPE_CHECKING:
    from vwn.training.run import Run

FOLDER = "branches"
"""Name of the folder in the run directory that holds a folder for each budget."""


def train_branches(run: Run, budgets: int | None = None) -> RunResult:
    """Train the trunk and the branches, the smallest budget first; the model of the largest becomes the run's.

    The trunk waits where a branch leaves it until that branch has ended. Its newest checkpoint is then the one that an
    unfinished branch starts from, and at the end the one that a larger budget is added to.

    Args:
        run: with budgets.
        budgets: how many of them are trained now, the smallest first; by default all.

    Raises:
        UserError: a budget was added that is smaller than what the trunk has been trained for.
    """
    config = run.config
    decayed: list[Point] = []
    for branch in config.branches[:budgets]:
        out = config.out / FOLDER / branch.name
        ended = broadcast(on_all_ranks(partial(stored_result, out) if rank() == 0 else lambda: None))
        if ended is None:
            try:
                _reach(run, branch)
                ended = _cool_down(run, branch)
            except Diverged as diverged:
                diverged.result = dataclasses.replace(diverged.result, decayed=decayed)
                raise
        if rank() == 0:
            for path in checkpoints(out).values():  # nothing goes on from a model that has cooled down
                discard(path)
        decayed.append(ended.curve[-1])
    result = broadcast(on_all_ranks(lambda: finished(config.out) if rank() == 0 else None))
    assert result is not None
    if rank() == 0:
        if len(decayed) == len(config.branches):
            _copy_model(config.out / FOLDER / config.branches[-1].name, config.out)
        directory.write_json(config.out / "result.json", dataclasses.asdict(result))
    return result


def finished(out: Path) -> RunResult | None:
    """Read what a run has measured so far: its result, with the branches that ended since; None if nothing has ended.

    With branches, everything but the losses at the smaller budgets is measured by the largest, and the curve is the
    trunk's up to where that one leaves it.
    """
    result = stored_result(out)
    if result is not None and result.has_diverged:
        return result
    branches = {path: branch for path in (out / FOLDER).glob("*") if (branch := stored_result(path)) is not None}
    if not branches:
        return result
    decayed = sorted((branch.curve[-1] for branch in branches.values()), key=_tokens)
    path, last = max(branches.items(), key=lambda item: _tokens(item[1].curve[-1]))
    settings = read_json(path / "run.json")["config"]
    share = decay_steps(settings["optim.steps"], settings["optim.cooldown"]) / settings["optim.steps"]
    leaves = round(_tokens(decayed[-1]) * (1 - share))
    return dataclasses.replace(last, curve=[point for point in last.curve if _tokens(point) <= leaves], decayed=decayed)


def _tokens(point: Point) -> int:
    return int(point["tokens"] or 0)


def _reach(run: Run, branch: Branch) -> None:
    """Train the trunk to where a branch leaves it, if it has no checkpoint there already."""
    config = run.config
    if is_whole(config.out / f"checkpoint-{branch.leaves}"):
        return
    newest = last_checkpoint(config.out)
    if newest is not None and step_of(newest) > branch.leaves:
        raise UserError(
            f"--budgets {branch.name} leaves the trunk after {branch.leaves} steps; the trunk in {config.out} is at "
            f"step {step_of(newest)} and no longer has that checkpoint; give a larger budget, or choose another --out"
        )
    trunk = dataclasses.replace(config, optim=dataclasses.replace(config.optim, steps=branch.leaves))
    run.train(trunk, part=", trunk", is_trunk=True)


def _cool_down(run: Run, branch: Branch) -> RunResult:
    """Train a branch: the straight run of its budget, from the trunk's checkpoint on."""
    c = run.config
    log, evaluate, save = c.intervals
    straight = dataclasses.replace(
        c,
        out=c.out / FOLDER / branch.name,
        optim=dataclasses.replace(c.optim, steps=branch.steps, budgets=(), warmup_steps=c.warmup),
        log_every=log,
        eval_every=evaluate,
        save_every=save,
    )
    if rank() == 0:
        straight.out.mkdir(parents=True, exist_ok=True)
        directory.start(straight, run.corpus.fingerprint, run.rate_factors)
    return run.train(straight, start=c.out / f"checkpoint-{branch.leaves}", part=f", {branch.name} cool-down")


def _copy_model(source: Path, target: Path) -> None:
    """Copy the trained model, as :meth:`vwn.training.checkpoint.saving.SavingTrainer.save_final` leaves it."""
    (target / "config.json").unlink(missing_ok=True)  # it makes the folder whole
    ours = {"run.json", "result.json", "health.jsonl", "samples.jsonl"}
    names = [p.name for p in source.iterdir() if p.is_file() and p.name not in ours and not p.name.startswith(".")]
    for name in sorted(names, key=lambda name: name == "config.json"):
        partial = target / f".{name}.partial"
        shutil.copyfile(source / name, partial)
        sync(partial)
        partial.replace(target / name)
    sync_directory(target)
