"""How a run starts: from trained weights, with a summary, and with refusals before any text is read."""

from __future__ import annotations

import dataclasses

import pytest

import zoo
from runs import config
from vwn.common.errors import UserError
from vwn.training import run as run_module
from vwn.training.config import TrainConfig, WidthOptions
from vwn.training.run import load_corpus, train


def onwards(out, text, start, **changes):
    plain = {"m": None, "n": None, "backbone": TrainConfig.backbone, "width": WidthOptions()}
    return config(
        out, text, **{**plain, "init_from": str(start), "optim": {"steps": 2, "learning_rate": 1e-4}} | changes
    )


@pytest.mark.slow
def test_trained_weights_are_trained_on(tmp_path, text, finished, capsys):
    before, result = finished
    run = onwards(tmp_path / "run", text, before.out)
    again = train(run)
    assert again.curve[0]["loss"] == pytest.approx(result.curve[-1]["loss"], abs=1e-4)
    assert again.curve[0]["loss_2"] == pytest.approx(result.curve[-1]["loss_2"], abs=1e-4)
    assert (again.name, again.m, again.n, again.mtp, again.params) == ("4x10", 4, 10, 1, result.params)
    assert train(dataclasses.replace(run, resume=True)) == again  # its tokenizer is the one of the weights
    said = capsys.readouterr().err
    assert f"{result.params:,} parameters, learning rate 0.0001 (table 0.001, reduce 1e-05), adamw, cosine" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"m": 4, "n": 8, "backbone": "nano"}, "decides the model; drop --backbone, --m and --n"),
        ({"width": WidthOptions(mtp=1)}, "drop the options of a width"),
        ({"init_from": "./nowhere"}, "there is no checkpoint at './nowhere'"),
        ({"optim": {"learning_rate": None}}, "--init-from needs a --learning-rate"),
    ],
)
def test_refusals_of_trained_weights(tmp_path, text, finished, changes, message):
    with pytest.raises(UserError, match=message):
        train(onwards(tmp_path / "run", text, finished[0].out, **changes))
    assert not (tmp_path / "run").exists()


def test_weights_without_a_tokenizer_are_refused(tmp_path, text):
    zoo.tiny_causal_lm("llama").save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="bare holds no tokenizer; name the one it was trained with"):
        train(onwards(tmp_path / "run", text, tmp_path / "bare"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"m": 3, "n": 4}, "3"),
        ({"backbone": "smal", "optim": {"learning_rate": None}}, r"unknown backbone 'smal' \(did you mean small\?\)"),
        ({"m": 4, "n": 3}, "n"),
    ],
)
def test_what_cannot_be_built_is_refused_before_the_text_is_read(tmp_path, text, monkeypatch, changes, message):
    monkeypatch.setattr(run_module, "load_corpus", None)
    with pytest.raises(ValueError, match=message):
        train(config(tmp_path / "run", text, **changes))
    assert not (tmp_path / "run").exists()


def test_a_run_says_what_it_will_do(tmp_path, text):
    run = config(tmp_path / "run", text, optim={"steps": 8, "schedule": "constant"})
    corpus = load_corpus(run)
    model = run_module.Run(run, corpus, 0.01, "x", "none").build()
    said = " ".join(run_module.summary(run, corpus, model, 0.01, {"table": 10}))
    assert "nano, 4x10: " in said
    assert "learning rate 0.01 (table 0.1), adamw, constant" in said
    assert f"8 steps of 128 tokens: 1,024; the text has {corpus.train_tokens:,}, so 0.0" in said
    long = dataclasses.replace(run, optim=dataclasses.replace(run.optim, steps=5 * corpus.train_tokens // 128))
    assert any("more than 4 epochs" in line for line in run_module.summary(long, corpus, model, 0.01, {}))
