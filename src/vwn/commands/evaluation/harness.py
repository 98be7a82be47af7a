"""Scores on tasks by lm-eval. The only file that imports it."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval import evaluator, simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from vwn.commands.evaluation import TASKS
from vwn.common.errors import UserError
from vwn.hf.loading import check_positions

BOOTSTRAP = 1000
"""Resamples for the standard error of a perplexity; that of an accuracy has a formula."""


class LocalModel(HFLM):
    """A loaded model for lm-eval that counts truncated requests and refuses answers longer than its window."""

    truncated = 0
    """Number of requests whose context was cut at its beginning, so that the answer fits."""

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        longest = max((len(answer) for _, _, answer in requests), default=0)
        if longest > self.max_length:
            raise UserError(
                f"the longest answer has {longest} tokens, and the model takes {self.max_length} at a time; "
                f"give a --window of {longest} or more if the model can take it, else leave the task out"
            )
        self.truncated += sum(len(context) + len(answer) > self.max_length + 1 for _, context, answer in requests)
        return super()._loglikelihood_tokens(requests, *args, **kwargs)


@dataclass(frozen=True)
class Tasks:
    """Tasks with their rows, ready to run: what `simple_evaluate` takes."""

    manager: TaskManager
    loaded: dict[str, Any]


def load_tasks(names: Sequence[str], data_dir: Path) -> Tasks:
    """Read the tasks and their rows.

    Raises:
        UserError: an unknown task, a file that is missing or damaged.
    """
    with _quiet():
        manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"data_dir": str(data_dir)})
        for name in names:
            if name not in manager.all_tasks:
                raise UserError(f"unknown task {name!r}; there are {', '.join(manager.all_tasks)}")
        return Tasks(manager, manager.load(list(dict.fromkeys(names))))


def run_tasks(
    model: Any, tokenizer: Any, tasks: Tasks, limit: int | None = None, window: int | None = None, batch_size: int = 8
) -> dict[str, Any]:
    """Run tasks by lm-eval; return its results, with the number of truncated requests under ``"truncated"``.

    Args:
        model, tokenizer: a causal language model and its tokenizer.
        tasks: from :func:`load_tasks`.
        limit: rows of each task, the first ones; all by default.
        window: tokens that the model reads at once; by default all of its positions.
        batch_size: answers per forward pass.

    Raises:
        UserError: a window that the model cannot read, or an answer that is longer.
    """
    if window is not None:
        check_positions(model, window)
    with _quiet():
        lm = LocalModel(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, max_length=window
        )
        groups, tasks_alone = _top_level(tasks.loaded)
        results = simple_evaluate(
            lm, tasks=[*groups, *tasks_alone], task_manager=tasks.manager, limit=limit, bootstrap_iters=BOOTSTRAP
        )
    return {**results, "truncated": lm.truncated}


def _top_level(loaded: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Separate the groups from the tasks that belong to no group."""
    inside = {name for names in loaded["group_map"].values() for name in names}
    return list(loaded["groups"].values()), [t for name, t in loaded["tasks"].items() if name not in inside]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence lm-eval's log and git, keep standard output for our own results, and its bootstrap in this process."""
    logger = logging.getLogger("lm_eval")
    level, forks, commit = logger.level, os.environ.get("DISABLE_MULTIPROC"), evaluator.get_git_commit_hash
    evaluator.get_git_commit_hash = lambda: None  # git complains on stderr where there is no repository
    logger.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"  # else it forks a process that has threads
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
        evaluator.get_git_commit_hash = commit
        if forks is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = forks


def scores(results: dict[str, Any]) -> dict[str, Any]:
    """Return of :func:`run_tasks`' results ``{task: {"n": rows, "scores": {metric: {"value", "stderr"}}}}``.

    A group has its ``subsets`` in the same form; ``stderr`` is None where there are too few rows for one.
    """
    members = {name: subsets for name, subsets in results.get("group_subtasks", {}).items() if subsets}
    inside = {subset for subsets in members.values() for subset in subsets}
    found: dict[str, Any] = {}
    for name in (n for n in results["results"] if n not in inside):
        found[name] = _scores(results, name)
        if name in members:
            subsets = {subset.split("::")[-1]: _scores(results, subset) for subset in members[name]}
            found[name] = {"n": sum(s["n"] for s in subsets.values()), **found[name], "subsets": subsets}
    return found


def _scores(results: dict[str, Any], name: str) -> dict[str, Any]:
    row = results["results"][name]
    metrics = [key.split(",")[0] for key in row if key.endswith(",none") and "_stderr," not in key]
    errors = {m: row.get(f"{m}_stderr,none") for m in metrics}
    count = results["n-samples"].get(name)
    return ({"n": count["effective"]} if count else {}) | {
        "scores": {
            m: {"value": float(row[f"{m},none"]), "stderr": e if isinstance(e, float) else None}
            for m, e in errors.items()
        }
    }
