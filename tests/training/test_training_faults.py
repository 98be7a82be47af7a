"""Resuming, and what goes wrong: kills, damaged files, full disks, other people's directories, divergence."""

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from runs import config, run_vwn, without_seconds
from vwn.common.errors import UserError
from vwn.common.files import CannotWrite
from vwn.training.checkpoint.manifest import last_checkpoint
from vwn.training.directory import locked
from vwn.training.run import train
from vwn.training.trainer import Diverged, VirtualWidthTrainer

pytestmark = pytest.mark.slow


def test_an_existing_directory_is_refused_and_left_alone(finished, text):
    run, _ = finished
    before = {p: p.stat().st_mtime_ns for p in run.out.rglob("*")}
    with pytest.raises(UserError, match=r"exists already.*--resume"):
        train(config(run.out, text))
    assert {p: p.stat().st_mtime_ns for p in run.out.rglob("*")} == before


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path, finished, text):
    reference, result = finished
    run = config(shutil.copytree(reference.out, tmp_path / "run"), text, resume=True)
    lines = (run.out / "health.jsonl").read_text()
    for name in ("result.json", "config.json", "model.safetensors"):
        (run.out / name).unlink()
    shutil.rmtree(run.out / "checkpoint-20")
    (run.out / "health.jsonl").write_text(lines + '{"step": 2')  # killed while writing, saving and deleting
    (run.out / ".incomplete" / "checkpoint-99").mkdir(parents=True)
    (run.out / ".discarded-checkpoint-4").mkdir()
    resumed = train(run)
    assert without_seconds(resumed.curve) == without_seconds(result.curve)
    assert (run.out / "health.jsonl").read_text() == lines
    one, other = (load_file(out / "model.safetensors") for out in (run.out, reference.out))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)
    seconds = [p["seconds"] for p in resumed.curve]
    assert seconds == sorted(seconds)
    assert not (run.out / ".incomplete").exists()
    assert not list(run.out.glob(".discarded-*"))


def test_a_save_that_fails_leaves_no_checkpoint_behind(tmp_path, text, monkeypatch):
    def full_disk(self, directory):
        if "checkpoint-8" in directory:
            raise OSError("No space left on device")

    monkeypatch.setattr(VirtualWidthTrainer, "_save_rng_state", full_disk)
    with pytest.raises(CannotWrite, match=r"No space.*the last checkpoint, .*checkpoint-4, is untouched"):
        train(config(tmp_path / "run", text))
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-4"


def test_a_non_finite_loss_stops_with_a_sentence_and_keeps_the_checkpoint(tmp_path, text, monkeypatch):
    compute = VirtualWidthTrainer.compute_loss
    steps = []

    def poisoned(self, model, inputs, return_outputs=False, **kwargs):
        steps.append(None)
        if len(steps) == 7:
            with torch.no_grad():
                model.lm_head.weight[0, 0] = float("nan")
        return compute(self, model, inputs, return_outputs, **kwargs)

    monkeypatch.setattr(VirtualWidthTrainer, "compute_loss", poisoned)
    message = r"loss is no longer finite at step 7; the last checkpoint is .*checkpoint-4.*--learning-rate"
    with pytest.raises(Diverged, match=message) as stopped:
        train(config(tmp_path / "run", text))
    weights = load_file(last_checkpoint(tmp_path / "run") / "model.safetensors")
    assert all(w.isfinite().all() for w in weights.values())
    curve = stopped.value.result.curve
    assert [p["tokens"] // 128 for p in curve] == [0, 4, 7]
    assert curve[-1]["loss"] is None


def test_ruined_weights_are_neither_saved_nor_called_a_result(tmp_path, text):
    for name, save_every in (("late", 2), ("early", 1)):
        run = config(tmp_path / name, text, optim={"steps": 2, "learning_rate": 1e30}, save_every=save_every)
        with pytest.raises(Diverged, match="no longer finite"):
            train(run)
        assert not (run.out / "result.json").exists()
        assert not (run.out / "config.json").exists()
        for checkpoint in run.out.glob("checkpoint-*"):
            assert all(w.isfinite().all() for w in load_file(checkpoint / "model.safetensors").values())


@pytest.mark.parametrize("gone", [["result.json"], ["result.json", "config.json", "model.safetensors"]])
def test_a_run_killed_after_its_last_step_only_writes_its_result(tmp_path, text, finished, gone):
    reference, result = finished
    out = tmp_path / "run"
    shutil.copytree(reference.out, out)
    for name in gone:
        (out / name).unlink()
    again = train(config(out, text, resume=True))
    assert again.curve == result.curve
    assert again.tokens_per_second == pytest.approx(result.tokens_per_second, rel=0.01)
    one, other = load_file(out / "model.safetensors"), load_file(reference.out / "model.safetensors")
    assert all(torch.equal(one[k], other[k]) for k in other)
    assert last_checkpoint(out).name == "checkpoint-20"
    assert AutoModelForCausalLM.from_pretrained(out).config.m == 4


def test_changed_text_is_refused(tmp_path, text):
    copy = tmp_path / "text.txt"
    copy.write_text(text.read_text())
    run = config(tmp_path / "run", copy, optim={"steps": 1})
    train(run)
    (run.out / "result.json").unlink()
    copy.write_text(text.read_text()[:-500])
    with pytest.raises(UserError, match="not those that the run"):
        train(dataclasses.replace(run, resume=True))


def test_other_peoples_directories_are_left_alone(tmp_path, text):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        train(config(tmp_path / "thesis", text, resume=True))
    with pytest.raises(UserError, match="is a file"):
        train(config(tmp_path / "file", text))
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["thesis.txt"]


def test_two_processes_do_not_share_a_directory(tmp_path, text):
    run = config(tmp_path / "run", text)
    with locked(run.out), pytest.raises(UserError, match="another process"):
        train(run)


@pytest.mark.parametrize("name", ["run.json", "result.json"])
def test_records_that_are_no_records(tmp_path, finished, capsys, monkeypatch, name):
    out = shutil.copytree(finished[0].out, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    for content in (b"", b"{", b"[]", b"\xff\xfe", b'{"name": 1}'):
        (out / name).write_bytes(content)
        code, _, err = run_vwn(capsys, monkeypatch, "train", "--out", out, "--resume")
        assert code == 2, err
        assert name in err.splitlines()[-1] or "no option --name" in err
