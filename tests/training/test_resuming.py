"""Taking a run up again: what `--resume` means, checkpoints of earlier versions, how many stay, changed options."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import pytest

from runs import config
from vwn import cli
from vwn.common.errors import UserError
from vwn.training.checkpoint.manifest import MANIFEST, checkpoints, damage_of, last_checkpoint, rotate, seal
from vwn.training.checkpoint.saving import RUN_STATE
from vwn.training.config import ReliabilityOptions, SpeedOptions
from vwn.training.run import train

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("words", "meaning"),
    [
        (["--resume"], True),
        (["--resume", "auto"], "auto"),
        (["--resume", "--seed", "1"], True),
        (["--resume", "False"], False),
    ],
)
def test_forms_of_resume(words, meaning):
    assert cli.parse("train", ["--out", "x", *words]).resume == meaning


def test_resume_alone_needs_a_run_and_auto_does_not(tmp_path, text):
    with pytest.raises(UserError, match=r"no run in .*--resume auto"):
        train(config(tmp_path / "none", text, resume=True))
    assert not (tmp_path / "none").exists()
    run = config(tmp_path / "new", text, resume="auto", optim={"steps": 2}, speed=SpeedOptions("reference"))
    assert train(run) == train(run)


def test_every_checkpoint_has_a_manifest_of_all_its_files(finished):
    run, _ = finished
    for step, folder in checkpoints(run.out).items():
        manifest = json.loads((folder / MANIFEST).read_text())
        names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        assert set(manifest["files"]) == names - {MANIFEST}
        assert (manifest["step"], manifest["world_size"], manifest["format"]) == (step, 1, 1)


def test_sharded_states_below_a_checkpoint_are_covered(tmp_path, finished):
    folder = tmp_path / "checkpoint-20"
    shutil.copytree(last_checkpoint(finished[0].out), folder)
    (folder / MANIFEST).unlink()
    (folder / "pytorch_model_fsdp_0").mkdir()
    shard = folder / "pytorch_model_fsdp_0" / "__0_0.distcp"
    shard.write_bytes(b"shard")
    seal(folder, 20)
    assert damage_of(folder) is None
    shard.write_bytes(b"sharp")
    assert damage_of(folder) == "pytorch_model_fsdp_0/__0_0.distcp is not what was written"


def test_a_checkpoint_without_a_manifest_is_passed_over_whatever_the_times_of_files(tmp_path, finished, capsys):
    shutil.copytree(finished[0].out, tmp_path / "run")
    os.utime(tmp_path / "run" / "checkpoint-16", (3.9e9, 3.9e9))
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-20"
    (last_checkpoint(tmp_path / "run") / MANIFEST).unlink()
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-16"
    assert "manifest.json is missing" in capsys.readouterr().err


def test_a_run_without_a_whole_checkpoint_does_not_start_again(tmp_path, finished, text):
    out = shutil.copytree(finished[0].out, tmp_path / "run")
    (out / "result.json").unlink()
    for folder in checkpoints(out).values():
        (folder / "optimizer.pt").write_bytes(b"")
    with pytest.raises(UserError, match="none of the checkpoints"):
        train(config(out, text, resume=True))
    assert list(checkpoints(out)) == [20, 16]


def test_a_format_of_the_future_is_not_guessed_at(tmp_path, finished):
    shutil.copytree(last_checkpoint(finished[0].out), tmp_path / "checkpoint-20")
    manifest = json.loads((tmp_path / "checkpoint-20" / MANIFEST).read_text())
    (tmp_path / "checkpoint-20" / MANIFEST).write_text(json.dumps(manifest | {"format": 2}))
    assert "newer vwn" in damage_of(tmp_path / "checkpoint-20")


def test_a_checkpoint_with_a_part_that_other_versions_had(tmp_path, finished, text):
    out = shutil.copytree(finished[0].out, tmp_path / "run")
    (out / "result.json").unlink()
    shutil.rmtree(out / "checkpoint-20")
    state = out / "checkpoint-16" / RUN_STATE
    state.write_text(json.dumps(json.loads(state.read_text()) | {"stopwatch": [{"steps": [1.0]}]}))
    seal(out / "checkpoint-16", 16)
    assert train(config(out, text, resume=True)).curve[-1]["loss"] == finished[1].curve[-1]["loss"]


def test_keep_last(tmp_path, text):
    run = config(tmp_path / "run", text, optim={"steps": 4}, save_every=1, eval_every=8)
    train(dataclasses.replace(run, reliability=ReliabilityOptions(keep_last=3)))
    assert list(checkpoints(tmp_path / "run")) == [4, 3, 2]


def test_rotation_keeps_what_may_be_counted_on_and_leaves_what_comes_after(tmp_path):
    for step in (4, 8, 9, 12, 16):
        (tmp_path / f"checkpoint-{step}").mkdir()
    rotate(tmp_path, 2, whole=[4, 8, 12], last_step=12)  # 9 was found damaged, and so was 16
    assert list(checkpoints(tmp_path)) == [16, 12, 8]


def test_options_that_do_not_shape_a_run_may_change_and_new_ones_may_be_missing(tmp_path, text):
    run = config(tmp_path / "run", text, optim={"steps": 2})
    result = train(run)
    record = json.loads((run.out / "run.json").read_text())
    for name in [n for n in record["config"] if n.startswith("reliability.")] + ["health_every", "optim.schedule"]:
        del record["config"][name]  # of a run that was started before there were any
    (run.out / "run.json").write_text(json.dumps(record))
    again = dataclasses.replace(run, resume=True, reliability=ReliabilityOptions(keep_last=5, skip_bad_steps=9))
    assert train(again) == result


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_last": 0}, "--keep-last must be at least 1"),
        ({"skip_bad_steps": 100}, "--skip-bad-steps must be from 0 to 99"),
        ({"spike_factor": -1.0}, "--spike-factor must be finite"),
        ({"distributed_timeout": 0.0}, "--distributed-timeout must be positive"),
    ],
)
def test_options_out_of_range(tmp_path, text, options, message):
    with pytest.raises(UserError, match=message):
        train(dataclasses.replace(config(tmp_path / "run", text), reliability=ReliabilityOptions(**options)))
    assert not (tmp_path / "run").exists()
