"""The supported versions of transformers, and the README's own way to install."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.cache_utils import DynamicCache

from tiny import build, token_ids, vwn_config
from vwn import UserError
from vwn.hf import VirtualWidthCausalLMOutput, VirtualWidthConfig, VirtualWidthModelOutput
from vwn.hf.outputs import CACHE_FIELD
from vwn.hf.versions import FIRST_UNTESTED, OLDEST, check_transformers
from vwn.hf.widening import CACHE_NAMES

ROOT = Path(__file__).parents[2]


def test_an_older_version_is_refused_and_a_newer_one_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_transformers("5.24.3")
    with pytest.raises(UserError, match=r"transformers >=5.17,<5.25, and 5.16.1 is installed.*pip install"):
        check_transformers("5.16.1")
    for version in ("5.25.0.dev0", "5.25.0", "6.0.0"):
        with pytest.warns(UserWarning, match=f"{version} is installed"):
            check_transformers(version)


def test_the_bounds_are_those_of_the_package():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"transformers>={OLDEST},<{FIRST_UNTESTED}" in dependencies


@pytest.mark.parametrize("name", ["cache", "past_key_values", "cache_params"])
def test_a_cache_goes_by_all_names_that_transformers_had_for_it(name):
    model, ids = build(vwn_config(num_mtp_modules=1)), token_ids()
    wanted = model(ids).logits
    for part in (model, model.model):
        cache = DynamicCache(config=model.config.backbone)
        assert part(ids[:, :5], **{name: cache}, use_cache=True).past_key_values is cache
        assert cache.get_seq_length() == 5
        second = part(ids[:, 5:], **{name: cache}, use_cache=True)
    torch.testing.assert_close(model.lm_head(second.last_hidden_state), wanted[:, 5:])


def test_trainer_evaluates_with_labels_alone(tmp_path):
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    rows = [{"input_ids": row, "labels": row} for row in token_ids()]
    seen = []
    trainer = Trainer(
        build(vwn_config()), arguments, eval_dataset=rows, compute_metrics=lambda p: seen.append(p.predictions) or {}
    )
    assert trainer.evaluate()["eval_loss"] > 0
    assert seen[0].shape[:2] == token_ids().shape


def test_trainer_does_not_gather_a_cache_as_a_prediction():
    outputs = (VirtualWidthModelOutput, VirtualWidthCausalLMOutput)
    caches = {name for output in outputs for name in CACHE_NAMES if name in output.__dataclass_fields__}
    assert CACHE_FIELD in caches
    assert {*caches, *CACHE_NAMES} <= {*VirtualWidthConfig.keys_to_ignore_at_inference}


@pytest.mark.filterwarnings("error")
def test_nothing_deprecated_is_used(capfd):
    """transformers 5.24 calls every cache `cache`, and warns wherever it gets another name."""
    model = build(vwn_config(num_mtp_modules=1, ngram_order=2, ngram_buckets=7))
    model(token_ids(), labels=token_ids())
    model.generate(token_ids(1), max_new_tokens=3, do_sample=False)
    model.generate(token_ids(1), max_new_tokens=3, do_sample=False, use_mtp=True)
    assert "deprecated" not in capfd.readouterr().err


def test_no_index_is_said_to_have_the_package():
    """The name is not ours on any index yet, so `pip install vwn` would install nothing or something else."""
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("src/**/*.py"), *ROOT.glob("examples/**/*.py")]
    found = [page.name for page in pages if re.search(r"pip install ['\"`]*vwn\b", page.read_text(encoding="utf-8"))]
    assert not found


@pytest.mark.install
def test_the_install_lines_of_the_readme_in_a_fresh_environment(tmp_path):
    """Its `pip install` lines give a package that imports, runs a model and has a command."""
    lines = [shlex.split(line) for line in re.findall(r"^pip install [^#\n]+", (ROOT / "README.md").read_text(), re.M)]
    assert any(line[-1].startswith(".") for line in lines)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env/bin/python"
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    for line in lines:
        done = subprocess.run([python, "-m", *line], cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode and re.search("No matching distribution|Connection|Temporary failure", done.stderr):
            pytest.skip(f"pip cannot reach a package index: {done.stderr.strip().splitlines()[-1]}")
        assert not done.returncode, done.stderr
    program = """
import torch, vwn
from transformers import LlamaConfig
backbone = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
model = vwn.VirtualWidthForCausalLM(vwn.VirtualWidthConfig(backbone=backbone, m=2, n=3, num_mtp_modules=1))
ids = torch.arange(8)[None]
model(ids, labels=ids).loss.backward()
print(tuple(model.generate(ids, max_new_tokens=2, do_sample=False).shape))
"""
    run = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([python, "-W", "error::UserWarning:vwn", "-c", program], **run)
    assert done.stdout.strip() == "(1, 10)", done.stderr
    done = subprocess.run([tmp_path / "env/bin/vwn", "--help"], **run)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout
