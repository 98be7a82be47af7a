"""Parameter groups: every parameter once, tuned rates, what is not decayed, and which matrices Muon gets."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import vwn
from conftest import perturb
from runs import config, without_seconds
from tiny import backbone_config, vwn_config
from vwn import Geometry, OverWidthEmbedding, OverWidthReduce, UserError, no_weight_decay, parameter_groups
from vwn.hf import VirtualWidthForCausalLM
from vwn.nn.groups import default_factors, group_of_parameters
from vwn.training.run import train
from vwn.training.trainer import MuonWithAdamW


class Own(nn.Module):
    """A model that is not Hugging Face's, with everything that has a group."""

    def __init__(self, n: int = 8, tied: bool = False, **embedding) -> None:
        super().__init__()
        g = Geometry(16, 2, n)
        self.embedding = OverWidthEmbedding(g, 11, **embedding)
        self.connections = nn.ModuleList(vwn.GeneralizedHyperConnection(16, 2, n) for _ in range(2))
        self.linear = nn.Linear(16, 16)
        self.positions = nn.Embedding(99, 16)
        nn.init.normal_(self.positions.weight, std=0.02)  # more rows than the token table, and another scale
        self.norm = nn.Sequential(OverWidthReduce(g), nn.LayerNorm(16))
        self.head = nn.Linear(16, 11, bias=False)
        if tied:
            self.head.weight = self.embedding.table.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding.table


def rates(groups):
    return {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}


def wide(**fields):
    model = VirtualWidthForCausalLM(vwn_config(m=2, n=6, num_mtp_modules=1, **fields))
    nn.init.normal_(model.get_input_embeddings().weight)
    return model


@pytest.mark.parametrize("model", [Own(), wide(), wide(embedding="factorised"), wide(ngram_order=2, ngram_buckets=7)])
def test_every_trainable_parameter_is_in_one_group_with_its_rate_and_decay(model):
    model.get_parameter(next(iter(no_weight_decay(model)))).requires_grad_(False)
    groups = parameter_groups(model, 0.1, weight_decay=0.3, factors={"routing": 0.5, "head": 2.0})
    found, kinds, spared = rates(groups), group_of_parameters(model), no_weight_decay(model)
    shares = default_factors(model) | {"routing": 0.5, "head": 2.0}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == {id(p) for p in trainable.values()}
    assert sum(len(g["params"]) for g in groups) == len(trainable)
    for name, p in trainable.items():
        expected = (pytest.approx(0.1 * shares.get(kinds[name], 1.0)), 0.0 if name in spared else 0.3)
        assert found[id(p)] == expected, name


def test_groups_of_a_model_of_ones_own():
    groups = group_of_parameters(Own())
    assert {name for name, kind in groups.items() if kind == "table"} == {"embedding.table.weight", "positions.weight"}
    assert {name for name, kind in groups.items() if kind == "head"} == {"head.weight"}
    assert {name for name, kind in groups.items() if kind == "reduce"} == {
        "norm.0.weight", "norm.0.group_norm", "norm.0.group_norm_bias",
    }  # fmt: skip
    assert {name.split(".")[0] for name, kind in groups.items() if kind == "routing"} == {"connections"}
    assert groups["linear.weight"] == groups["norm.1.weight"] == "backbone"


@pytest.mark.parametrize(
    ("model", "factors"),
    [
        (Own(), {"table": 10.0, "reduce": 0.1}),
        (Own(n=2), {"table": 10.0}),
        (Own(form="replicated", tied=True), {"reduce": 0.1}),
        (Own(form="replicated"), {"table": 10.0, "reduce": 0.1}),
        (Own(table_factor=2), {"table": 10.0, "reduce": 0.1}),
        (Own(form="factorised", ngram_order=2, ngram_buckets=99), {"table": 10.0, "reduce": 0.1}),
        (nn.Sequential(OverWidthEmbedding(Geometry(16, 2, 4), 5, ngram_order=2, ngram_buckets=99)), {"table": 10.0}),
        (nn.Linear(4, 5), {}),
        (AutoModelForCausalLM.from_config(backbone_config("llama")), {}),  # rows of 0.02
    ],
)
def test_default_factors(model, factors):
    assert default_factors(model) == factors


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_muon_gets_the_backbones_matrices_alone(kind):
    model = VirtualWidthForCausalLM(vwn_config(kind, m=2, n=6, num_mtp_modules=1))
    muon, adamw = parameter_groups(model, 0.1, optimizer="muon")
    names = {id(p): name for name, p in model.named_parameters()}
    by_muon = {names[id(p)] for g in muon for p in g["params"]}
    by_adamw = {names[id(p)] for g in adamw for p in g["params"]}
    assert not by_muon & by_adamw
    assert by_muon | by_adamw == set(names.values())
    assert all(p.ndim == 2 for g in muon for p in g["params"])
    last = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "fuse", "mlp.gate")
    assert by_muon
    assert all(name.removesuffix(".weight").endswith(last) for name in by_muon)
    for part in ("connections", "embed_tokens", "reduce", "lm_head", "norm", "experts"):
        assert not any(part in name for name in by_muon), part
    torch.optim.Muon(muon)
    torch.optim.AdamW(adamw)


def test_both_optimisers_step_as_each_alone_would():
    """Also from a state dict, whose groups and state a Trainer's checkpoint holds."""
    first = perturb(Own().double(), 1)
    models = [first, copy.deepcopy(first), copy.deepcopy(first)]
    muon, adamw = parameter_groups(models[0], 0.01, optimizer="muon")
    alone = torch.optim.Muon(muon, adjust_lr_fn="match_rms_adamw"), torch.optim.AdamW(adamw, betas=(0.9, 0.95))
    together = MuonWithAdamW(*parameter_groups(models[1], 0.01, optimizer="muon"), (0.9, 0.95))
    draw = torch.Generator().manual_seed(0)
    for step in range(4):
        if step == 2:  # go on from a checkpoint
            models[2].load_state_dict(models[1].state_dict())
            models[1] = models[2]
            stored, together = (
                together.state_dict(),
                MuonWithAdamW(*parameter_groups(models[1], 0.5, optimizer="muon"), (0.9, 0.95)),
            )
            together.load_state_dict(stored)
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=draw, dtype=a.dtype)
            b.grad = a.grad.clone()
        for optimizer in (*alone, together):
            optimizer.step()
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.slow
def test_a_run_with_muon_learns_and_goes_on_as_if_it_had_not_stopped(tmp_path, text):
    run = config(tmp_path / "a", text, optim={"steps": 8, "optimizer": "muon"})
    whole = train(run)
    assert whole.curve[-1]["loss"] < whole.curve[0]["loss"] - 0.3
    for path in (tmp_path / "a" / "result.json", *(tmp_path / "a").glob("*.safetensors")):
        path.rename(path.with_suffix(".before"))
    (tmp_path / "a" / "checkpoint-8" / "manifest.json").unlink()
    assert without_seconds(train(dataclasses.replace(run, resume=True)).curve) == without_seconds(whole.curve)
    before, after = (load_file(tmp_path / "a" / f"model.{end}") for end in ("before", "safetensors"))
    assert all(torch.equal(before[name], value) for name, value in after.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer must be 'adamw' or 'muon', got 'sgd'"),
        ({"factors": {"tabel": 2.0}}, "no parameter group 'tabel'"),
        ({"factors": {"table": 0.0}}, "'table' must be above 0, got 0.0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(UserError, match=message):
        parameter_groups(Own(), 0.1, **options)
