"""Decayed losses at several budgets: branches equal straight runs, kills change nothing, runs become longer."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file

from runs import config, without_seconds
from vwn import cli
from vwn.common.errors import UserError
from vwn.training import directory
from vwn.training.budgets import format_tokens, parse_tokens
from vwn.training.checkpoint.manifest import checkpoints
from vwn.training.run import train
from vwn.training.trainer import VirtualWidthTrainer, cooled_down

pytestmark = pytest.mark.slow

STEP = 4 * 32  # tokens


def branched(out, text, budgets=(6, 12), **changes):
    optim = dict(steps=1000, schedule="wsd", budgets=tuple(str(STEP * b) for b in budgets), cooldown=0.3)
    return config(out, text, optim=optim | changes.pop("optim", {}), **changes)


def straight(out, text, steps, **optim):
    return config(out, text, optim=dict(steps=steps, schedule="wsd", cooldown=0.3, warmup_steps=1) | optim)


def weights(folder):
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys() != set()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def without_times(result):
    return {name: without_seconds(getattr(result, name)) for name in ("curve", "decayed")}


def folder(run, steps):
    return run.out / "branches" / format_tokens(STEP * steps)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text):
    """A finished run of budgets of 6 and 12 steps, and its result."""
    run = branched(tmp_path_factory.mktemp("branched") / "run", text)
    return run, train(run)


@pytest.mark.parametrize("steps", [6, 12])
def test_a_branch_is_the_straight_run_to_the_bit(tmp_path, text, whole, steps):
    run, result = whole
    plain = train(straight(tmp_path / "straight", text, steps))
    assert_same_weights(folder(run, steps), tmp_path / "straight")
    point = next(p for p in result.decayed if p["tokens"] == steps * STEP)
    assert without_seconds([point]) == without_seconds(plain.curve[-1:])
    assert set(point) == {"tokens", "loss", "loss_2", "seconds"}


def test_what_a_run_with_budgets_leaves_behind(whole):
    run, result = whole
    assert json.loads((run.out / "result.json").read_text())["decayed"] == result.decayed
    assert [p["tokens"] for p in result.decayed] == [6 * STEP, 12 * STEP]
    assert result.curve[-1]["tokens"] == 8 * STEP  # the trunk's, which the last branch leaves there
    assert max(checkpoints(run.out)) == 8
    assert not checkpoints(folder(run, 6)) | checkpoints(folder(run, 12))
    assert_same_weights(run.out, folder(run, 12))
    assert (run.out / "config.json").exists()
    assert result.step_seconds_p90 >= result.step_seconds_median > 0
    assert all(a["seconds"] < b["seconds"] for a, b in zip(result.decayed, result.decayed[1:], strict=False))


def test_a_finished_run_is_not_repeated(whole, monkeypatch):
    run, result = whole
    monkeypatch.setattr(VirtualWidthTrainer, "train", None)
    assert train(dataclasses.replace(run, resume=True)) == result


def test_kills_at_random_steps_change_nothing(tmp_path, text, whole, monkeypatch):
    draw, taken = random.Random(0), VirtualWidthTrainer.training_step
    run = dataclasses.replace(branched(tmp_path / "run", text, save_every=2), resume="auto")
    left = [0]

    def dies(self, *args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return taken(self, *args, **kwargs)

    monkeypatch.setattr(VirtualWidthTrainer, "training_step", dies)
    kills = 0
    while kills < 30:
        left[0] = draw.randint(3, 4)
        try:
            result = train(run)
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills >= 3
    assert without_times(result) == without_times(whole[1])
    for steps in (6, 12):
        assert_same_weights(folder(run, steps), folder(whole[0], steps))


def test_a_kill_between_a_branch_and_the_result(tmp_path, whole):
    out = shutil.copytree(whole[0].out, tmp_path / "run")
    for name in ("result.json", "config.json", "model.safetensors"):
        (out / name).unlink()
    assert without_times(train(dataclasses.replace(whole[0], out=out, resume=True))) == without_times(whole[1])
    assert_same_weights(out, whole[0].out)
    assert (out / "config.json").read_text() == (whole[0].out / "config.json").read_text()


def test_budgets_that_are_added_give_what_they_would_have_given_at_once(tmp_path, text, whole):
    first = branched(tmp_path / "run", text, budgets=(6,))
    assert len(train(first).decayed) == 1
    before = (folder(first, 6) / "result.json").read_bytes()
    result = train(cli.parse("train", ["--out", str(first.out), "--resume", "--budgets", str(12 * STEP)]))
    assert without_seconds(result.decayed) == without_seconds(whole[1].decayed)
    assert (folder(first, 6) / "result.json").read_bytes() == before
    for steps in (6, 12):
        assert_same_weights(folder(first, steps), folder(whole[0], steps))
    record = json.loads((first.out / "run.json").read_text())
    assert record["config"]["optim.budgets"] == [format_tokens(6 * STEP), format_tokens(12 * STEP)]
    assert record["extended"][0]["before"] == {"optim.budgets": [format_tokens(6 * STEP)]}


def test_a_budget_below_the_trunk_is_refused(whole):
    run, _ = whole
    asked = dataclasses.replace(run.optim, budgets=(str(9 * STEP),))
    with pytest.raises(UserError, match=r"--budgets 1152 leaves the trunk after 6 steps.*at step 8"):
        train(dataclasses.replace(run, resume=True, optim=asked))


def test_a_constant_run_made_longer_is_the_long_run(tmp_path, text):
    def constant(out, steps):
        return config(out, text, optim=dict(steps=steps, schedule="constant"))

    train(constant(tmp_path / "a", 2))
    longer = dataclasses.replace(constant(tmp_path / "a", 5), resume=True)
    result = train(longer)
    assert without_seconds(result.curve)[-1] == without_seconds(train(constant(tmp_path / "b", 5)).curve)[-1]
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    again = cli.parse("train", ["--out", str(longer.out), "--resume"])
    assert again.optim.steps == 5
    assert train(again) == result
    far = dataclasses.replace(longer, optim=dataclasses.replace(longer.optim, steps=1000))
    assert far.warmup == 50
    assert directory.continued(far, json.loads((longer.out / "run.json").read_text())).warmup == 1


def test_a_cosine_cannot_be_made_longer(finished):
    run, _ = finished
    longer = dataclasses.replace(run, resume=True, optim=dataclasses.replace(run.optim, steps=30))
    with pytest.raises(UserError, match=r"--steps 20, not 30; only a run with a constant rate"):
        train(longer)


def test_shape_of_the_cool_down():
    shares = [cooled_down(step, warmup=4, leaves=8, ends=12, final=0.2) for step in range(13)]
    assert shares == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert shares[4:9] == [1.0] * 5


@pytest.mark.parametrize(
    ("tokens", "name"), [(10**6, "1M"), (1_500_000, "1.5M"), (819_200, "819200"), (7, "7"), (2 * 10**9, "2B")]
)
def test_names_of_budgets(tokens, name):
    assert format_tokens(tokens) == name
    assert parse_tokens(name) == parse_tokens(str(tokens)) == tokens


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ({"budgets": ("1X",)}, "--budgets takes numbers of tokens.*'1X'"),
        ({"budgets": ("1M",), "schedule": "cosine", "cooldown": 0.2}, "use --schedule wsd"),
        ({"budgets": ("1M",), "steps": 20}, "drop --steps 20"),
        ({"budgets": ("1M", "999999")}, r"--budgets 1M and 999999 are the same in whole steps of 128 tokens"),
        ({"budgets": ("10k",), "warmup_steps": 60}, "10K is 78 steps and leaves the trunk after 55, within the 60"),
        ({"cooldown": 1.0}, "--cooldown must be above 0 and below 1"),
        ({"cooldown": 0.5, "schedule": "constant", "budgets": ()}, "--cooldown goes with --schedule wsd"),
        ({"budgets": (), "steps": 10, "warmup_steps": 8}, "--warmup-steps 8 reaches into the cool-down after 7 steps"),
    ],
)
def test_refusals(tmp_path, text, optim, message):
    with pytest.raises(UserError, match=message):
        train(branched(tmp_path / "run", text, optim=optim))
    assert not (tmp_path / "run").exists()
