"""A comparison with budgets goes budget by budget, and its report holds what has ended, however it was stopped."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from runs import compare_config, without_seconds
from vwn.lab.compare import run as runner
from vwn.lab.compare.config import CompareConfig
from vwn.lab.compare.finished import read_report
from vwn.lab.compare.run import adopt, compare
from vwn.lab.report.write import renew
from vwn.training.budgets import format_tokens
from vwn.training.config import OptimConfig
from vwn.training.run import train
from vwn.training.watch.preemption import Stopped

STEP = 4 * 32  # tokens
SMALL, LARGE = 5 * STEP, 10 * STEP


def asked(out: Path, text: Path, *budgets: int | str, **changes: Any) -> CompareConfig:
    optim = OptimConfig(batch_size=4, learning_rate=1e-2, schedule="wsd", budgets=tuple(map(str, budgets)))
    options = {"arms": ("plain", "1x1"), "learning_rates": (), "seeds": (0,), "resume": True, "optim": optim}
    return compare_config(out, text, **options | changes)


def budgets_of(report: dict[str, Any]) -> dict[tuple[str, int], list[int]]:
    return {(run["name"], run["seed"]): [point["tokens"] for point in run["decayed"]] for run in report["arms"]}


def decayed(report: dict[str, Any]) -> list[Any]:
    return [without_seconds(run["decayed"]) for run in report["arms"]]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was trained: (arm, seed, number of budgets); a number that is put first stops before so many runs."""
    calls: list[Any] = []

    def counted(run: Any, corpus: Any, label: Any, budgets: int | None) -> Any:
        if isinstance(calls[0], int):
            if calls[0] == 0:
                raise Stopped(signal.SIGTERM, 3)
            calls[0] -= 1
        calls.append((run.name, run.seed, budgets))
        return train(run, corpus, label, budgets)

    monkeypatch.setattr(runner, "train", counted)
    return calls


@pytest.mark.slow
def test_every_budget_of_all_arms_and_seeds_comes_before_the_next(
    tmp_path: Path, text: Path, trained: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    trained.append(1)
    with pytest.raises(Stopped):
        compare(asked(out, text, SMALL))
    stored = json.loads((out / "report.json").read_text())
    assert budgets_of(stored) == {("plain", 0): [SMALL]}
    assert f"what has ended is in {out / 'report.html'}" in capsys.readouterr().err

    trained[:] = [4]  # with a budget and a seed more
    longer = adopt(asked(out, text, LARGE, seeds=(1,)), {"budgets", "seeds"})
    with pytest.raises(Stopped):
        compare(longer)
    assert trained[1:] == [("1x1", 0, 1), ("plain", 1, 1), ("1x1", 1, 1), ("plain", 0, 2)]
    stored = json.loads((out / "report.json").read_text())
    both, one = [SMALL, LARGE], [SMALL]
    assert budgets_of(stored) == {("plain", 0): both, ("1x1", 0): one, ("plain", 1): one, ("1x1", 1): one}
    point, *none = stored["budgets"]["loss"]["arms"]["1x1"]
    assert (point["tokens"], point["equal"]["tokens"]["gap"]["over_seeds"]["n"], none) == (SMALL, 2, [])

    trained[:] = [None]
    report = compare(adopt(asked(out, text, f"{LARGE / 1000}k"), {"budgets"}))  # the same, written otherwise
    assert trained[1:] == [("1x1", 0, 2), ("plain", 1, 2), ("1x1", 1, 2)]
    assert set(map(tuple, budgets_of(report).values())) == {(SMALL, LARGE)}
    assert report["config"]["steps"] == 10
    assert len(report["continued"]) == 2
    assert (out / "arms" / "1x1-seed1" / "model.safetensors").exists()

    # A folder that was trained arm by arm: one arm has ended, of the next a branch has and there is no result yet.
    half = out / "arms" / "1x1-seed0"
    (half / "result.json").unlink()
    shutil.rmtree(half / "branches" / format_tokens(LARGE))
    (out / "report.json").unlink()
    renew(read_report(out), out)
    stored = json.loads((out / "report.json").read_text())
    assert budgets_of(stored) == {("plain", 0): both, ("1x1", 0): one, ("plain", 1): both, ("1x1", 1): both}
    assert stored["arms"][1]["curve"][-1]["tokens"] == 4 * STEP
    assert stored["baseline"] == "plain"
    trained[:] = [None]
    again = compare(longer)
    assert trained[1:] == [("1x1", 0, 2)]
    assert decayed(again) == decayed(report)
    trained[:] = [0]
    assert decayed(compare(longer)) == decayed(report)  # nothing is repeated
