"""What a run writes beside its model and what it can be repeated from: samples, trackers, options, its start."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
import transformers

from runs import config, run_vwn, without_seconds
from vwn import cli
from vwn.common.errors import UserError
from vwn.training import run as run_module
from vwn.training.config import CorpusConfig, TrainConfig, WidthOptions
from vwn.training.directory import settings, start
from vwn.training.model import load_backbone
from vwn.training.presets import PRESETS
from vwn.training.run import train
from vwn.training.watch.samples import FILE, last_sample

pytestmark = pytest.mark.slow


def sampled(out, text, **changes):
    """A run whose validation is long enough for samples of two tokens."""
    corpus = CorpusConfig(data=str(text), window=32, max_valid_tokens=2 * 1024)
    return config(out, text, **{"corpus": corpus, "optim": {"steps": 2}, "eval_every": 1, "save_every": 1} | changes)


def weights(run):
    return (run.out / "model.safetensors").read_bytes()


def test_samples_at_each_validation_leave_the_run_as_it_is(tmp_path, text):
    run, silent = sampled(tmp_path / "a", text), sampled(tmp_path / "b", text, sample_tokens=0)
    result, without = train(run), train(silent)
    lines = [json.loads(line) for line in (run.out / FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert len(lines[0]["prompt"].encode()) == 16
    assert all(line["text"] for line in lines)
    assert result.sample == lines[-1]["prompt"] + lines[-1]["text"]
    assert json.loads((run.out / "result.json").read_text())["sample"] == result.sample
    assert without.sample is None
    assert not (silent.out / FILE).exists()
    assert without_seconds(result.curve) == without_seconds(without.curve)
    assert weights(run) == weights(silent)
    for path in (run.out / "logs").iterdir():
        assert b"sample/text_summary" in path.read_bytes()
    (tmp_path / FILE).write_text('{"step": 2')
    with pytest.raises(UserError, match="is damaged"):
        last_sample(tmp_path)
    for name in ("model.safetensors", "result.json"):  # a kill after the first checkpoint: its later lines are redone
        (run.out / name).unlink()
    shutil.rmtree(run.out / "checkpoint-2")
    assert train(dataclasses.replace(run, resume=True)).sample == result.sample
    assert [json.loads(line) for line in (run.out / FILE).read_text().splitlines()] == lines


def test_a_model_that_cannot_generate_is_trained_without_samples(tmp_path, text, monkeypatch, caplog):
    monkeypatch.setattr(transformers.LlamaForCausalLM, "generate", lambda *_, **__: 1 / 0)
    assert train(sampled(tmp_path / "run", text, m=None, n=None, width=WidthOptions())).sample is None
    assert caplog.records[-1].getMessage() == "no samples are written: ZeroDivisionError: division by zero"


def test_trackers(tmp_path, text, monkeypatch):
    monkeypatch.setattr(run_module, "load_corpus", None)  # all are refused before any text is read
    for names, message in (
        (("tensorbord",), "--report-to knows no 'tensorbord'; give azure_ml"),
        (("comet_ml",), "--report-to comet_ml needs a package that is not installed"),
        (("none", "tensorboard"), "--report-to none stands alone"),
    ):
        with pytest.raises(UserError, match=message):
            train(config(tmp_path / "run", text, report_to=names))
    monkeypatch.undo()
    train(config(tmp_path / "run", text, optim={"steps": 1}, report_to=("none",)))
    assert not (tmp_path / "run" / "logs").exists()


def test_a_tracker_gets_every_loss(tmp_path, text, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(
        transformers.integrations.WandbCallback, "on_log", lambda *args, logs, **kwargs: seen.append(logs)
    )
    train(config(tmp_path / "run", text, optim={"steps": 1}, log_every=1, report_to=("tensorboard", "wandb")))
    assert (tmp_path / "run" / "logs").exists()
    assert list((tmp_path / "wandb").glob("offline-run-*"))
    assert {"loss_2", "eval_loss"} <= {name for logs in seen for name in logs}
    wandb.finish()


def test_a_run_repeats_from_its_record(tmp_path, text):
    run = config(tmp_path / "a", text, optim={"steps": 3, "rate_factors": ("table=3", "head=2")}, seed=5)
    run = dataclasses.replace(run, width=WidthOptions(mtp=1, static=True))
    run.out.mkdir()
    start(run, "text", {})

    def read(*words):
        return settings(cli.parse("train", [str(word) for word in (*words, "--out", tmp_path / "b")]))

    assert read(run.out) == settings(run)
    assert read(run.out / "run.json", "--seed=6") == settings(run) | {"seed": 6}
    assert settings(cli.parse("train", ["--out", str(run.out), "--resume", "--seed=6"])) == settings(run) | {"seed": 6}
    (tmp_path / "options.yaml").write_text(
        f"backbone: nano\nm: 4\nn: 10\nseed: 5\nnum_mtp_modules: 1\nstatic: true\nlog-every: 2\neval-every: 4\n"
        f"save-every: 4\ncorpus:\n  data: {text}\n  window: 32\n  max_valid_tokens: 512\noptim:\n  steps: 9\n"
        "  batch_size: 4\n  learning_rate: 1e-2\n  rate_factors: {table: 3, head: 2}\n"
    )
    assert read(tmp_path / "options.yaml", "--steps", 3) == settings(run)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "steps: [", "cannot be read as .yaml"),
        ("a.json", "[1]", "holds no options"),
        ("a.toml", "steps = 1", "a .json or a .yaml file"),
        ("a.yaml", "stesp: 1", "did you mean --steps?"),
        ("a.yaml", "steps: 1\noptim: {steps: 2}", "a.yaml gives steps twice; give it once"),
        ("a.yaml", "steps: many", "vwn train --help"),
        (None, None, "cannot read the options"),
    ],
)
def test_files_of_options_that_are_refused(tmp_path, capsys, monkeypatch, name, content, message):
    path = tmp_path / (name or "nowhere.yaml")
    if name:
        path.write_text(content)
    code, _, err = run_vwn(capsys, monkeypatch, "train", path, "--out", tmp_path / "run")
    assert (code, message in err.replace("\n", " ")) == (2, True), err


@pytest.mark.parametrize("name", PRESETS)
def test_sizes_of_presets(name):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(load_backbone(name, 32_768, 256))
    assert sum(p.numel() for p in model.parameters()) == PRESETS[name].parameters()


def test_bytes_can_be_asked_for_with_trained_weights(tmp_path, text, finished):
    wide = tmp_path / "wide"
    shutil.copytree(finished[0].out, wide, ignore=shutil.ignore_patterns("checkpoint-*", "tokenizer*"))
    onwards = config(tmp_path / "run", text, m=None, n=None, backbone=TrainConfig.backbone, width=WidthOptions())
    onwards = dataclasses.replace(onwards, init_from=str(wide))
    with pytest.raises(UserError, match="tokenizer"):
        train(onwards)
    corpus = dataclasses.replace(onwards.corpus, tokenizer="bytes")
    train(dataclasses.replace(onwards, corpus=corpus, optim=dataclasses.replace(onwards.optim, steps=1)))


def test_a_run_from_weights_continues_without_them(tmp_path, text, finished):
    wide = tmp_path / "wide"
    shutil.copytree(finished[0].out, wide, ignore=shutil.ignore_patterns("checkpoint-*"))
    run = config(tmp_path / "a", text, m=None, n=None, backbone=TrainConfig.backbone, width=WidthOptions())
    run = dataclasses.replace(run, init_from=str(wide), save_every=1, optim=dataclasses.replace(run.optim, steps=2))
    whole = train(run)
    shutil.copytree(run.out, tmp_path / "b", ignore=shutil.ignore_patterns("checkpoint-2", "result.json"))
    (tmp_path / "b" / "model.safetensors").unlink()
    shutil.rmtree(wide)
    cut = cli.parse("train", ["--out", str(tmp_path / "b"), "--resume"])
    assert without_seconds(train(cut).curve) == without_seconds(whole.curve)
    assert weights(cut) == weights(run)
    assert (cut.out / "generation_config.json").read_text() == (run.out / "generation_config.json").read_text()
    for written in (*run_module.checkpoints(cut.out).values(), cut.out / "result.json"):  # as before the first one
        shutil.rmtree(written) if written.is_dir() else written.unlink()
    with pytest.raises(UserError, match="has no checkpoint yet; continue it with --init-from"):
        train(dataclasses.replace(cut, init_from=f"elsewhere/{tmp_path.name}/wide"))
