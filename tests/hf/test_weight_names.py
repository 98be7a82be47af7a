"""Names of weights: transformers' Trainer decays by them, and earlier checkpoints have others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

import vwn
from conftest import perturb
from tiny import build, token_ids, vwn_config
from vwn.nn.embedding import OverWidthReduce
from vwn.nn.generalized import GeneralizedHyperConnection
from vwn.nn.multi_token import BlockLinear
from vwn.nn.relatives import HyperConnection, ManifoldHyperConnection

MODELS = pytest.mark.parametrize(
    ("m", "n", "options"),
    [
        (2, 4, {"num_mtp_modules": 1, "ngram_order": 2, "ngram_buckets": 7}),
        (2, 3, {"embedding": "factorised", "dynamic": False}),
        (2, 4, {"reduce_norm": "rms_norm", "carry_constraint": "doubly_stochastic"}),
        (1, 2, {"connection": "mhc", "embedding": "replicated", "reduce": "sum", "num_mtp_modules": 1}),
        (1, 3, {"connection": "hc", "embedding": "replicated", "reduce": "sum", "frozen": True}),
    ],
    ids=["mtp-ngrams", "static", "constrained", "mhc", "hc-frozen"],
)


@MODELS
def test_trainers_own_rule_spares_what_parameter_groups_spare(tmp_path, m, n, options):
    model = build(vwn_config("llama", m, n, **options))
    names = {id(p): name for name, p in model.named_parameters()}
    trainer = Trainer(model, TrainingArguments(tmp_path, weight_decay=0.1, report_to=[], use_cpu=True))
    ours = vwn.parameter_groups(model, lr=1e-3, weight_decay=0.1)
    theirs = trainer.create_optimizer().param_groups

    def spared(groups) -> set[str]:
        return {names[id(p)] for group in groups if group["weight_decay"] == 0 for p in group["params"]}

    assert spared(theirs) == spared(ours) == vwn.no_weight_decay(model)
    assert len({*names.values()} - spared(theirs)) > 10


OLD = [
    (".bias_alpha", ".static_alpha"),
    (".bias_beta", ".static_beta"),
    (".slot_norm", ".norm_weight"),
    (".slot_norm_bias", ".norm_bias"),
    (".group_norm", ".norm_weight"),
    (".group_norm_bias", ".norm_bias"),
    (".state_norm", ".state_norm_weight"),
    (".embedding_norm", ".embedding_norm_weight"),
]


def as_before(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights under the names, and in the shapes, that they had before."""
    old = {}
    for name, weight in weights.items():
        stem, dot, leaf = f".{name}".rpartition(".")
        leaf = dict(OLD).get(dot + leaf, dot + leaf)
        old[(stem + leaf)[1:]] = weight.reshape(()) if "scale" in leaf and weight.numel() == 1 else weight
    assert old.keys() != weights.keys()
    return old


def rename(folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file(as_before(load_file(file)), file, {"format": "pt"})


@MODELS
def test_earlier_checkpoints_load_and_are_saved_under_todays_names(tmp_path, m, n, options):
    model = perturb(build(vwn_config("llama", m, n, **options)))
    model.save_pretrained(tmp_path / "old")
    wanted = load_file(tmp_path / "old" / "model.safetensors")
    rename(tmp_path / "old")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "old", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)
    again.save_pretrained(tmp_path / "new")
    saved = load_file(tmp_path / "new" / "model.safetensors")
    assert saved.keys() == wanted.keys()
    assert all(torch.equal(saved[name], wanted[name]) for name in wanted)


def test_a_base_model_loads_an_earlier_checkpoint_of_a_causal_one(tmp_path):
    model = perturb(build(vwn_config("llama", 1, 2, connection="hc", embedding="replicated", reduce="sum")))
    cached = tmp_path / "models--ada--old"  # as the hub's cache keeps a download
    model.save_pretrained(cached / "snapshots" / ("0" * 40))
    rename(cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    base = AutoModel.from_pretrained("ada/old", cache_dir=tmp_path, local_files_only=True)
    assert torch.equal(base(token_ids()).last_hidden_state, model.model(token_ids()).last_hidden_state)


def test_a_backbone_with_conversions_of_its_own(tmp_path):
    """Mixtral's experts are saved one by one."""
    model = perturb(build(vwn_config("mixtral", 2, 4)))
    model.save_pretrained(tmp_path / "old")
    wanted = load_file(tmp_path / "old" / "model.safetensors")
    rename(tmp_path / "old")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "old")
    assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)
    again.save_pretrained(tmp_path / "new")
    assert load_file(tmp_path / "new" / "model.safetensors").keys() == wanted.keys()


def test_modules_load_earlier_state_dicts():
    made = lambda: nn.ModuleDict(  # noqa: E731
        {
            "ghc": GeneralizedHyperConnection(8, 2, 4),
            "hc": HyperConnection(8, 1, 2),
            "mhc": ManifoldHyperConnection(8, 2),
            "reduce": OverWidthReduce(GeneralizedHyperConnection(8, 2, 4).geometry),
            "fuse": BlockLinear(4, 2),
        }
    )
    model, again = perturb(made()), made()
    again.load_state_dict(as_before(model.state_dict()))
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    alone = GeneralizedHyperConnection(8, 2, 4)
    alone.load_state_dict(
        {name.removeprefix("ghc."): w for name, w in as_before(model.state_dict()).items() if name.startswith("ghc.")}
    )
    assert torch.equal(alone.bias_alpha, model["ghc"].bias_alpha)
