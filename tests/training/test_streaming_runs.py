"""Runs on streamed data: killed and continued, refused, and read again by the other commands."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import RandomSampler

from runs import config, without_seconds
from texts import write_jsonl, write_parquet
from vwn import cli
from vwn.commands.evaluation.text import load_text
from vwn.commands.inspection.run import load_tokens
from vwn.common.errors import UserError
from vwn.data.corpus import prepare_run
from vwn.lab.compare.config import CompareConfig
from vwn.training.config import CorpusConfig
from vwn.training.directory import check_same, read_json, settings
from vwn.training.run import train
from vwn.training.trainer import VirtualWidthTrainer

pytestmark = pytest.mark.slow

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "off")


def texts(count, seed):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=60)) for _ in range(count)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    write_jsonl(folder, texts(60, 0))
    write_parquet(folder, texts(60, 1))
    (folder / "valid").mkdir()
    write_jsonl(folder / "valid", texts(10, 2))
    return folder


def streamed(out, sources, workers=0, resume=False, **optim):
    stream = (f"{sources}/text.jsonl=2", f"{sources}/text.parquet")
    corpus = CorpusConfig(
        stream=stream, valid=f"{sources}/valid/text.jsonl", window=32, max_valid_tokens=512, workers=workers
    )
    return config(out, None, corpus=corpus, resume=resume, optim={"steps": 12, **optim})


@pytest.fixture(scope="module")
def whole(sources, tmp_path_factory):
    run = streamed(tmp_path_factory.mktemp("runs") / "whole", sources)
    return run, train(run)


def inputs_of(monkeypatch):
    """The token ids that the model is trained on, step by step."""
    seen = []
    step = VirtualWidthTrainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        seen.append(inputs["input_ids"].clone())
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(VirtualWidthTrainer, "training_step", training_step)
    return seen


def test_a_run_that_breaks_off_goes_on_with_other_workers_to_the_same_bits(tmp_path, sources, whole, monkeypatch):
    reference, result = whole
    seen = inputs_of(monkeypatch)
    run = streamed(tmp_path / "run", sources, workers=2)

    def fail(self, directory):
        if "checkpoint-8" in directory:
            raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(VirtualWidthTrainer, "_save_rng_state", fail)
        with pytest.raises(KeyboardInterrupt):
            train(run)
    assert len(seen) == 8
    resumed = train(streamed(run.out, sources, workers=1, resume=True))  # from step 4
    assert len(seen) == 8 + 8
    assert all(torch.equal(one, other) for one, other in zip(seen[4:8], seen[8:12], strict=True))
    assert without_seconds(resumed.curve) == without_seconds(result.curve)
    one, other = load_file(run.out / "model.safetensors"), load_file(reference.out / "model.safetensors")
    assert all(torch.equal(one[k], other[k]) for k in one | other)
    states = [json.loads((out / "checkpoint-12" / "data_state.json").read_text()) for out in (run.out, reference.out)]
    assert states[0] == states[1]
    epochs = [
        [entry["epoch"] for entry in read_json(out / "checkpoint-12" / "trainer_state.json")["log_history"]]
        for out in (run.out, reference.out)
    ]
    assert epochs[0] == epochs[1]


def test_other_data_is_refused_and_other_workers_are_not(tmp_path, whole, sources):
    run, result = whole
    assert train(dataclasses.replace(run, resume=True)) == result
    stored = read_json(run.out / "run.json")["config"]
    check_same(run.out, stored, settings(streamed(run.out, sources.name, workers=7)))  # seen from its folder
    other = dataclasses.replace(run.corpus, stream=run.corpus.stream[:1])
    with pytest.raises(UserError, match="started with --stream"):
        train(dataclasses.replace(run, corpus=other, resume=True))
    assert cli.parse("train", ["--out", str(run.out), "--resume"]).corpus == dataclasses.replace(
        run.corpus, tokenizer="bytes"
    )


def test_changed_files_are_refused(tmp_path, sources):
    copy = tmp_path / "sources"
    (copy / "valid").mkdir(parents=True)
    for name in ("text.jsonl", "text.parquet", "valid/text.jsonl"):
        (copy / name).write_bytes((sources / name).read_bytes())
    run = streamed(tmp_path / "run", copy, steps=4)
    train(run)
    (run.out / "result.json").unlink()
    with open(copy / "text.jsonl", "a") as file:
        file.write('\n{"id": 9, "text": "more"}')
    with pytest.raises(UserError, match="not those that the run"):
        train(dataclasses.replace(run, resume=True))


def test_evaluation_and_inspection_read_the_validation_text(whole):
    run, _ = whole
    record = read_json(run.out / "run.json")
    text = load_text(run.out, None, record)
    assert text.name == run.corpus.valid
    assert len(text.tokens) == prepare_run(record["config"], window=2).valid_tokens
    ids, name = load_tokens(run.out, None, 128, None)
    assert name == run.corpus.valid
    assert ids.shape == (4, 32)


def test_what_does_not_go_together_is_refused(sources):
    with pytest.raises(UserError, match="takes the place of --data"):
        CorpusConfig(data="a.txt", stream=("b.txt",)).check()
    with pytest.raises(UserError, match="prepared text"):
        CompareConfig(out=sources, corpus=CorpusConfig(stream=("b.txt",))).check()
    with pytest.raises(UserError, match="workers"):
        CorpusConfig(workers=-1).check()


# Packed windows


def test_an_epoch_of_packed_windows_has_whole_global_batches_alone(monkeypatch):
    """Else the windows of a step would depend on the number of processes; two of them are in test_distributed."""
    trainer = object.__new__(VirtualWidthTrainer)
    trainer.config, trainer.train_dataset = config("out", "text", optim={"batch_size": 8}), range(61)
    monkeypatch.setattr(
        "vwn.training.trainer.SavingTrainer._get_train_sampler", lambda self, data: RandomSampler(range(61))
    )
    sampler = trainer._get_train_sampler()
    one, other = list(sampler), list(sampler)
    assert len(one) == len(set(one)) == 56
    assert set(one) != set(other)  # an epoch leaves out others
