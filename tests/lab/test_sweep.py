"""Learning-rate sweeps, rates of parameter groups, and the progress over all runs."""

from __future__ import annotations

import json

import pytest

from runs import compare_config
from vwn.common.errors import UserError
from vwn.lab.compare import progress
from vwn.lab.compare.arms import parse_arm
from vwn.lab.compare.config import CompareConfig, SweepOptions
from vwn.lab.compare.progress import Progress, duration
from vwn.lab.compare.run import compare
from vwn.lab.compare.sweep import sweep, sweep_run
from vwn.training.arguments import parse_factors
from vwn.training.config import OptimConfig


def swept(tmp_path, losses, **options):
    """A sweep over a table of rate -> loss, and the rates in the order in which they were tried."""
    tried = []

    def final_loss(rate):
        tried.append(rate)
        return {"loss": losses(rate)}

    config = CompareConfig(out=tmp_path, sweep=SweepOptions(**options))
    return sweep(config, parse_arm("4x16"), 1.0, final_loss), tried


def test_a_best_rate_inside_needs_three_runs(tmp_path):
    found, tried = swept(tmp_path, lambda rate: abs(rate - 1.1))
    assert tried == [0.5, 1.0, 2.0]
    assert (found["best"], found["bracketed"]) == (1.0, True)
    assert [r["learning_rate"] for r in found["rates"]] == [0.5, 1.0, 2.0]


@pytest.mark.parametrize(("target", "best"), [(7.0, 8.0), (0.13, 0.125)])
def test_a_best_rate_at_the_edge_is_followed_until_it_is_bracketed(tmp_path, target, best):
    found, tried = swept(tmp_path, lambda rate: abs(rate - target))
    assert (found["best"], found["bracketed"]) == (best, True)
    assert len(tried) == len(set(tried)) == 6


def test_a_sweep_that_ends_at_an_edge_says_so(tmp_path):
    found, tried = swept(tmp_path, lambda rate: -rate, sweep_extensions=2)
    assert (found["best"], found["bracketed"], len(tried)) == (8.0, False, 5)


def test_divergence_is_worse_than_any_loss_and_followed_downwards(tmp_path):
    found, _ = swept(tmp_path, lambda rate: None if rate > 0.3 else rate)
    assert (found["best"], found["bracketed"]) == (0.0625, False)  # three extensions, and no worse neighbour below
    assert found["rates"][-1] == {"learning_rate": 2.0, "loss": None}
    with pytest.raises(UserError, match="diverged at every rate"):
        swept(tmp_path, lambda rate: None)


def test_a_sweep_runs_shorter_on_another_seed(tmp_path, text):
    config = compare_config(tmp_path, text, sweep=SweepOptions(sweep_seed=77), optim=OptimConfig(steps=40))
    measured = config.run(config.parsed[2], 0)
    tried = sweep_run(config, measured, "4x10", 3e-3)
    assert (tried.optim.steps, tried.seed, tried.optim.learning_rate) == (20, 77, 3e-3)
    assert tried.out == tmp_path / "sweep" / "4x10-lr0.003"
    assert tried.width == measured.width


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sweep_seed": 1}, "one of the --seeds"),
        ({"sweep_rates": (0.1, 0.2)}, "three or more"),
        ({"sweep_rates": (0.1, 0.2, -1.0)}, "positive"),
        ({"sweep_steps": 0}, "--sweep-steps"),
        ({"sweep_extensions": -1}, "--sweep-extensions"),
    ],
)
def test_sweeps_that_cannot_be(tmp_path, text, options, expected):
    with pytest.raises(UserError, match=expected):
        compare_config(tmp_path, text, sweep=SweepOptions(**options)).check()


def test_studies_sweep_unless_a_rate_is_given(tmp_path):
    assert CompareConfig(out=tmp_path, study="widths").sweeps
    assert not CompareConfig(out=tmp_path).sweeps
    assert not CompareConfig(out=tmp_path, study="widths", optim=OptimConfig(learning_rate=1e-2)).sweeps
    assert CompareConfig(out=tmp_path, sweep=SweepOptions(lr_sweep="on")).sweeps


@pytest.mark.slow
def test_a_swept_comparison_measures_each_arm_at_its_best_rate(tmp_path, text):
    sweeping = SweepOptions(lr_sweep="on", sweep_rates=(1e-5, 5e-3, 1e-2), sweep_extensions=1)
    asked = compare_config(
        tmp_path / "out", text, arms=("plain", "1x1"), seeds=(0,), learning_rates=("1x1=0.004",), sweep=sweeping,
        optim=OptimConfig(steps=8, batch_size=4),
    )  # fmt: skip
    report = compare(asked)
    plain, given = report["sweep"]
    for tried in plain["rates"]:
        assert tried["loss"] == pytest.approx(tried["next_token"] + 0.3 * tried["next_2_token"])
    assert plain["seed"] == 1000
    assert plain["best"] != 1e-5
    assert (given["best"], given["rates"]) == (0.004, [])
    assert [a["learning_rate"] for a in report["arms"]] == [plain["best"], 0.004]
    folders = sorted((tmp_path / "out" / "sweep").iterdir())
    assert len(folders) == len(plain["rates"])
    for path in folders:
        assert json.loads((path / "result.json").read_text())["seed"] == 1000
        assert not list(path.glob("checkpoint-*"))


@pytest.mark.parametrize("items", ["routing", "router=1", "routing=0", "routing=inf", "routing=1 routing=2"])
def test_factors_that_mean_nothing(items):
    with pytest.raises(UserError, match=r"GROUP=FACTOR|twice"):
        parse_factors(items.split())


def test_progress_learns_its_pace_from_what_was_done_in_this_process(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    p = Progress({"plain": 1.0, "wide": 2.0})
    p.plan("plain", 40)
    p.plan("wide", 20)
    p.skip("plain", 20)
    assert p.text() == "25%"
    p.start("plain")
    now[0] = 5.0
    p.advance(5)
    assert p.text() == "31%, 55 s left"  # 55 of 80 to come, one a second
    now[0] = 10.0
    p.advance(10)
    p.finish(20)  # ten of them in an earlier process
    assert p.text() == "50%, 40 s left"
    p.start("wide")
    now[0] = 40.0
    p.advance(5)
    assert p.text() == "62%, 1 min left"  # 20 of work in 40 s


@pytest.mark.parametrize(("seconds", "text"), [(4, "4 s"), (90, "2 min"), (3599, "1 h 00 min"), (7500, "2 h 05 min")])
def test_durations(seconds, text):
    assert duration(seconds) == text
