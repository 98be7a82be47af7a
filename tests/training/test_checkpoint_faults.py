"""Checkpoints that are damaged, incomplete, pickled or of another model: one sentence, and no model."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from tiny import build, stock, token_ids, vwn_config
from vwn.common.errors import UserError
from vwn.hf import VirtualWidthForCausalLM

LOADERS = pytest.mark.parametrize("loader", [VirtualWidthForCausalLM, AutoModelForCausalLM], ids=["class", "auto"])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A sound checkpoint to spoil."""
    build(vwn_config("llama", 2, 4, num_mtp_modules=1)).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    build(vwn_config("llama", 2, 4)).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


def refused(loader, folder: Path, message: str, **options) -> None:
    with pytest.raises(UserError, match=message) as error:
        loader.from_pretrained(folder, **options)
    assert "\n" not in str(error.value)


def edit_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_weights(folder: Path, drop: str = "", **more) -> list[str]:
    weights = load_file(folder / "model.safetensors")
    dropped = [name for name in weights if drop and drop in name]
    kept = {name: value for name, value in weights.items() if name not in dropped}
    save_file(kept | more, folder / "model.safetensors", {"format": "pt"})
    return dropped


# Damaged files


def cut(pattern: str, keep: int):
    def spoil(folder: Path) -> None:
        path = next(folder.glob(pattern))
        path.write_bytes(path.read_bytes()[:keep])

    return spoil


def lose_an_entry(folder: Path) -> None:
    """The files are whole, the model is not."""
    index = folder / INDEX
    shards = json.loads(index.read_text())["weight_map"]
    gone = shards["lm_head.weight"]
    (folder / gone).unlink()
    index.write_text(json.dumps({"metadata": {}, "weight_map": {k: v for k, v in shards.items() if v != gone}}))


INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
PAGE = "not tensors, but a page that says the file was not found " * 20
DAMAGED = [
    *((False, cut(WEIGHTS, keep), r"the weights in .* are damaged.*again") for keep in (0, 100, -1)),
    (False, lambda folder: (folder / WEIGHTS).write_text(PAGE), r"the weights in .* are damaged"),
    (True, cut("model-00002-of-*.safetensors", -1), r"the weights in .* are damaged"),
    (True, lose_an_entry, r"weights of this model .* are missing .*lm_head"),
]
ABSENT = [
    (False, lambda folder: (folder / WEIGHTS).unlink()),
    (True, lambda folder: next(folder.glob("*.safetensors")).unlink()),
    (True, lambda folder: (folder / INDEX).write_text("{")),
]


@pytest.mark.parametrize(("in_shards", "spoil", "message"), DAMAGED)
def test_damaged_files(request, in_shards, spoil, message):
    folder = request.getfixturevalue("sharded" if in_shards else "saved")
    spoil(folder)
    refused(AutoModelForCausalLM, folder, message)


@pytest.mark.parametrize(("in_shards", "spoil"), ABSENT)
def test_absent_files(request, in_shards, spoil):
    """transformers says which."""
    folder = request.getfixturevalue("sharded" if in_shards else "saved")
    spoil(folder)
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(folder)


def test_variants(saved):
    model = build(vwn_config())
    model.save_pretrained(saved, variant="ema")
    again = VirtualWidthForCausalLM.from_pretrained(saved, variant="ema")
    assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)


# Pickles


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@LOADERS
@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_a_pickle_is_refused_unread(saved, loader, name):
    (saved / "model.safetensors").unlink()
    with open(saved / name, "wb") as file:
        pickle.dump(Payload(saved / "trace"), file)
    for options in ({}, {"use_safetensors": False}, {"ignore_mismatched_sizes": True}):
        with pytest.raises((OSError, UserError), match=r"safetensors"):
            loader.from_pretrained(saved, **options)
    assert not (saved / "trace").exists()


def test_a_pickle_beside_sound_weights_is_not_read(saved):
    with open(saved / "pytorch_model.bin", "wb") as file:
        pickle.dump(Payload(saved / "trace"), file)
    VirtualWidthForCausalLM.from_pretrained(saved)
    refused(VirtualWidthForCausalLM, saved, "use_safetensors = False", use_safetensors=False)
    assert not (saved / "trace").exists()


# Weights that do not fit


@LOADERS
@pytest.mark.parametrize("part", ["lm_head", "layers.1.connections.0.bias_beta", "mtp.0.fuse"])
def test_missing_weights(saved, loader, part):
    gone = edit_weights(saved, drop=part)
    refused(
        loader, saved, rf"{len(gone)} weights of this model \(m = 2, n = 4.* are missing .*{gone[0].split('.')[-2]}"
    )


@pytest.mark.parametrize("fields", [{"m": 4, "n": 8}, {"m": 4, "n": 4, "reduce": "identity", "reduce_norm": "none"}])
def test_a_config_of_another_width(saved, fields):
    edit_config(saved, **fields)
    message = rf"\(m = {fields.get('m', 2)}, n = {fields.get('n', 4)},"
    message += r".* (have other shapes|are missing)|have other shapes .*" + message
    refused(AutoModelForCausalLM, saved, message)


@pytest.mark.parametrize(
    "options", [{"n": 6}, {"num_mtp_modules": 2}, {"connection": "mhc", "m": 1}, {"embedding": "factorised"}]
)
def test_other_options_at_loading(saved, options):
    refused(VirtualWidthForCausalLM, saved, r"have other shapes|are missing", **options)


def test_routing_weights_are_not_dropped_silently(tmp_path):
    """Equal shapes everywhere else: what is left would be the plain model."""
    build(vwn_config("llama", 1, 1)).save_pretrained(tmp_path)
    edit_config(tmp_path, connection="residual")
    refused(VirtualWidthForCausalLM, tmp_path, r"routing weights that this model .*'residual'.* has no place for")
    again = VirtualWidthForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert again.config.connection == "residual"


def test_leaving_out_multi_token_modules_is_fine(saved):
    whole = VirtualWidthForCausalLM.from_pretrained(saved)
    less = VirtualWidthForCausalLM.from_pretrained(saved, num_mtp_modules=0)
    assert torch.equal(less(token_ids()).logits, whole(token_ids()).logits)
    assert len(less.model.mtp) == 0
    AutoModel.from_pretrained(saved)


def test_a_model_that_may_be_incomplete_starts_the_rest_afresh(saved):
    loader = AutoModelForCausalLM
    dropped = edit_weights(saved, drop="bias_beta")
    model, info = loader.from_pretrained(saved, ignore_mismatched_sizes=True, output_loading_info=True)
    assert set(info["missing_keys"]) == set(dropped)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    model, info = loader.from_pretrained(saved, ignore_mismatched_sizes=True, output_loading_info=True, n=6)
    assert info["mismatched_keys"]
    assert torch.isfinite(model(token_ids()).logits).all()


def test_a_state_dict_in_memory_must_be_whole_too(saved):
    model = VirtualWidthForCausalLM.from_pretrained(saved)
    weights = model.state_dict()
    again = VirtualWidthForCausalLM.from_pretrained(None, config=model.config, state_dict=dict(weights))
    assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)
    del weights["lm_head.weight"]
    with pytest.raises(UserError, match="lm_head"):
        VirtualWidthForCausalLM.from_pretrained(None, config=model.config, state_dict=weights)


# Another model


def test_a_checkpoint_of_another_model_type(tmp_path):
    stock("qwen3").save_pretrained(tmp_path)
    refused(VirtualWidthForCausalLM, tmp_path, r"model type 'qwen3', not 'virtual_width'.*vwn\.widen")
    refused(VirtualWidthForCausalLM, tmp_path, "the config is of model type 'qwen3'", config=stock("qwen3").config)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)).__name__ == "Qwen3ForCausalLM"
