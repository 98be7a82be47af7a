"""Saving, loading, copying: safetensors, a fresh process, missing tensors, precision, ties."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import reference
from tiny import build, token_ids, vwn_config
from vwn import GeneralizedHyperConnection
from vwn.hf import VirtualWidthConfig, VirtualWidthForCausalLM, VirtualWidthModel


def load(path: Path, **options) -> VirtualWidthForCausalLM:
    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


def without(path: Path, *parts: str) -> list[str]:
    """Drop all tensors whose name contains one of ``parts`` from the checkpoint; the names dropped."""
    tensors = load_file(path / "model.safetensors")
    dropped = [name for name in tensors if any(part in name for part in parts)]
    save_file({k: v for k, v in tensors.items() if k not in dropped}, path / "model.safetensors", {"format": "pt"})
    return dropped


def assert_initial(connection: GeneralizedHyperConnection) -> None:
    g = connection.geometry
    assert connection.bias_alpha.tolist() == reference.initial_read_carry(g.m, g.n)
    assert connection.bias_beta.tolist() == reference.initial_write(g.m, g.n)
    assert not connection.dynamic_alpha.any()
    assert not connection.dynamic_beta.any()
    assert all((weight == 1).all() for weight in (connection.scale_alpha, connection.scale_beta, connection.slot_norm))


# Round trips


@pytest.mark.parametrize(
    ("kind", "m", "n", "fields"),
    [
        ("qwen3", 2, 4, {"embedding": "factorised"}),
        ("mixtral", 2, 4, {"embedding": "replicated"}),
        ("qwen3_moe", 1, 1, {"connection": "residual"}),
    ],
)
def test_round_trip(tmp_path, kind, m, n, fields):
    model = build(vwn_config(kind, m, n, num_mtp_modules=1, **fields))
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert isinstance(again, VirtualWidthForCausalLM)
    assert not again.training
    ids = token_ids()
    wanted, actual = model(ids, labels=ids), again(ids, labels=ids)
    assert torch.equal(actual.logits, wanted.logits)
    assert torch.equal(actual.loss, wanted.loss)


def test_tied_tables_stay_tied_and_are_saved_once(tmp_path):
    model = build(vwn_config("llama", 2, 4, {"tie_word_embeddings": True}, embedding="replicated"))
    assert model.lm_head.weight is model.model.embed_tokens.table.weight
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert len({"lm_head.weight", "model.embed_tokens.table.weight"} & names) == 1
    again = load(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.table.weight
    assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)


@pytest.mark.parametrize("inner", [True, False])
def test_the_outer_configs_tie_decides(tmp_path, inner):
    """The backbone's own setting is what it was trained with, not what this model does."""
    model = build(
        vwn_config("llama", 2, 4, {"tie_word_embeddings": inner}, tie_word_embeddings=not inner, embedding="factorised")
    )
    model.save_pretrained(tmp_path)
    for candidate in (model, load(tmp_path)):
        assert (candidate.lm_head.weight is candidate.model.embed_tokens.table.weight) is not inner
        assert torch.equal(candidate(token_ids()).logits, model(token_ids()).logits)


def test_base_and_causal_model_load_each_others_checkpoints(tmp_path):
    model = build(vwn_config("llama", 2, 4, num_mtp_modules=1))
    model.save_pretrained(tmp_path / "causal")
    base = AutoModel.from_pretrained(tmp_path / "causal")
    assert isinstance(base, VirtualWidthModel)
    wanted = model.model(token_ids()).last_hidden_state
    assert torch.equal(base(token_ids()).last_hidden_state, wanted)
    base.save_pretrained(tmp_path / "base")
    again = load(tmp_path / "base", ignore_mismatched_sizes=True)  # it has no head
    assert torch.equal(again.model(token_ids()).last_hidden_state, wanted)


# Missing tensors


@pytest.mark.parametrize(("kind", "init"), [("llama", "first_slots"), ("mixtral", "normal")])
def test_missing_tensors_of_ours_get_their_initial_values(tmp_path, kind, init):
    model = build(vwn_config(kind, 2, 4, embedding="factorised", num_mtp_modules=1, reduce_init=init))
    model.save_pretrained(tmp_path)
    dropped = without(tmp_path, "connections", "reduce", "expand_weight", "fuse", "_norm")
    # Memory that from_pretrained may hand out unwritten: make it rubbish, not zeros.
    rubbish = [torch.full((4096,), float("nan")) for _ in range(200)]
    del rubbish
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, ignore_mismatched_sizes=True)
    assert set(info["missing_keys"]) == set(dropped)
    connections = [m for m in again.modules() if isinstance(m, GeneralizedHyperConnection)]
    assert len(connections) == 2 * 3
    for connection in connections:
        assert_initial(connection)
    for reduce in (again.model.reduce, again.model.mtp[0].reduce):
        assert (reduce.group_norm == 1).all()
        assert (reduce.group_norm_bias == 0).all()
        if init == "first_slots":
            assert torch.equal(reduce.weight, torch.eye(24, 48))
        else:
            assert 0.8 < float(reduce.weight.detach().std()) * 48**0.5 < 1.2
    assert 0.8 < float(again.model.embed_tokens.expand_weight.detach().std()) * 24**0.5 < 1.2
    assert 0.8 < float(again.model.mtp[0].fuse.weight.detach().std()) * 24**0.5 < 1.2
    loaded = again.state_dict()
    for name, value in model.state_dict().items():
        assert (name in dropped) or torch.equal(loaded[name], value), name


def test_a_checkpoint_without_multi_token_modules_gains_them(tmp_path):
    model = build(vwn_config("qwen3_moe", 2, 4))
    model.save_pretrained(tmp_path)
    again = load(tmp_path, num_mtp_modules=2, ignore_mismatched_sizes=True)
    assert len(again.model.mtp) == 2
    for layer in (predictor.layer.layers[0] for predictor in again.model.mtp):
        for connection in layer.connections:
            assert_initial(connection)
        assert (layer.input_layernorm.weight == 1).all()
        assert 0.01 < float(layer.self_attn.q_proj.weight.detach().std()) < 0.03
    assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)
    assert torch.isfinite(again(token_ids(), labels=token_ids()).loss)


# Precision


def test_bfloat16_keeps_the_connections_in_float32(tmp_path):
    model = build(vwn_config("llama", 2, 4, num_mtp_modules=1))
    model.save_pretrained(tmp_path)
    half = load(tmp_path, dtype=torch.bfloat16)
    assert half.config.dtype == torch.bfloat16
    for name, parameter in half.named_parameters():
        assert parameter.dtype == (torch.float32 if ".connections." in name else torch.bfloat16), name
    full = dict(model.named_parameters())
    assert all(torch.equal(p, full[name]) for name, p in half.named_parameters() if ".connections." in name)
    ids = token_ids()
    out = half(ids, labels=ids)
    assert out.logits.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    assert (out.loss - model(ids, labels=ids).loss).abs() < 0.2
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in half.parameters())
    half.save_pretrained(tmp_path / "half")
    again = load(tmp_path / "half", dtype="auto")
    assert {name: p.dtype for name, p in again.named_parameters()} == {n: p.dtype for n, p in half.named_parameters()}
    assert torch.equal(again(ids).logits, out.logits)


def test_frozen_connections_stay_frozen(tmp_path):
    model = build(vwn_config("llama", 2, 4, frozen=True))
    model.save_pretrained(tmp_path)
    for candidate in (model, load(tmp_path), copy.deepcopy(model)):
        connections = [m for m in candidate.modules() if isinstance(m, GeneralizedHyperConnection)]
        tensors = [value for c in connections for value in c.state_dict(keep_vars=True).values()]
        assert len(tensors) == 4 * 7
        assert not any(value.requires_grad for value in tensors)
        assert all(p.requires_grad for name, p in candidate.named_parameters() if ".connections." not in name)


def test_frozen_connections_missing_from_a_checkpoint_start_as_ever(tmp_path):
    model = build(vwn_config("llama", 2, 4, frozen=True, num_mtp_modules=1))
    model.save_pretrained(tmp_path)
    assert len(without(tmp_path, "connections")) == 6 * 7
    rubbish = [torch.full((4096,), float("nan")) for _ in range(200)]
    del rubbish
    again = load(tmp_path, ignore_mismatched_sizes=True)
    for connection in (m for m in again.modules() if isinstance(m, GeneralizedHyperConnection)):
        assert_initial(connection)
    assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)


# Configuration


NON_DEFAULT = {
    "m": 2, "n": 4, "dynamic": False, "frozen": True, "embedding": "factorised", "reduce": "linear",
    "reduce_norm": "rms_norm", "reduce_init": "normal", "num_mtp_modules": 2, "mtp_loss_weight": 0.125,
    "tie_word_embeddings": True, "ngram_order": 3, "ngram_buckets": 7,
}  # fmt: skip


def test_config_round_trip_with_every_field(tmp_path):
    backbone = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}, "initializer_range": 0.05}
    config = vwn_config("mixtral", backbone=backbone, **NON_DEFAULT)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    for again in (
        loaded,
        VirtualWidthConfig(**config.to_dict()),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
    ):
        assert type(again) is VirtualWidthConfig
        assert {name: getattr(again, name) for name in NON_DEFAULT} == NON_DEFAULT
        assert type(again.backbone) is type(config.backbone)
        assert again.backbone.to_dict() == config.backbone.to_dict()
        assert again.geometry == config.geometry
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "virtual_width"
    assert written["backbone"]["model_type"] == config.backbone.model_type


def test_state_dict_keys_are_stable():
    """Checkpoints of users depend on these names."""
    names = set(VirtualWidthForCausalLM(vwn_config("llama", 2, 4, {"num_hidden_layers": 1})).state_dict())
    ours = {name for name in names if "self_attn" not in name and "mlp" not in name}
    connection = [f"{kind}_{name}" for kind in ("bias", "dynamic", "scale") for name in ("alpha", "beta")]
    assert ours == {
        "lm_head.weight",
        "model.embed_tokens.table.weight",
        "model.norm.weight",
        "model.reduce.weight",
        "model.reduce.group_norm",
        "model.reduce.group_norm_bias",
        "model.backbone.layers.0.input_layernorm.weight",
        "model.backbone.layers.0.post_attention_layernorm.weight",
        *(f"model.backbone.layers.0.connections.{k}.{name}" for k in (0, 1) for name in (*connection, "slot_norm")),
    }
