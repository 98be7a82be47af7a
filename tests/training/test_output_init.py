"""How output matrices start: which they are, for every kind of backbone, and what the options make of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, OPTConfig

from runs import config
from tiny import backbone_config, vwn_config
from vwn.common.errors import UserError
from vwn.hf import VirtualWidthForCausalLM
from vwn.training import run as run_module
from vwn.training.config import WidthOptions
from vwn.training.model import build_model, load_backbone, model_config
from vwn.training.output_init import output_matrices
from vwn.training.run import train

WIDTHS = [(None, None, 0), (None, None, 1), (4, 10, 1), (1, 4, 1)]


def preset(name, m, n, mtp, how="config", seed=3):
    width = WidthOptions(mtp=mtp, connection="hc" if m == 1 else "ghc")
    return build_model(model_config(load_backbone(name, 300, 32), m, n, width), seed, 1.0, how)


def endings(names):
    return {name.split(".", 1)[1] for name in (n.rpartition("layers.")[2] for n in names)}


@pytest.mark.parametrize(("m", "n", "mtp"), WIDTHS)
@pytest.mark.parametrize(("name", "last"), [("nano", "mlp.down_proj.weight"), ("tiny-moe", "mlp.experts.down_proj")])
def test_the_output_matrices_of_presets(name, last, m, n, mtp):
    found = output_matrices(preset(name, m, n, mtp))
    assert endings(found) == {"self_attn.o_proj.weight", last}
    assert len(found) == 2 * (4 + mtp)  # every layer's, the MTP module's too


@pytest.mark.parametrize(("m", "n", "mtp"), WIDTHS)
def test_they_alone_change_and_pairing_stays(m, n, mtp):
    as_config = preset("nano", m, n, mtp).state_dict()
    for how, factor in (("zero", 0.0), ("depth", 8**-0.5)):
        model = preset("nano", m, n, mtp, how)
        changed = output_matrices(model)
        for key, value in model.state_dict().items():
            assert torch.equal(value, as_config[key] * factor if key in changed else as_config[key]), key
        assert all(as_config[key].std() == pytest.approx(0.125 / (2 if m == 1 else 1), rel=0.05) for key in changed)


def test_experts_start_at_zero_and_learn(tmp_path):
    model = preset("tiny-moe", 4, 8, 0, "zero")
    before = {name: p.detach().clone() for name, p in output_matrices(model).items()}
    assert not any(p.any() for p in before.values())
    ids = torch.randint(0, 300, (4, 32))
    model(ids, labels=ids).loss.backward()
    assert all(model.get_parameter(name).grad.abs().sum() > 0 for name in before)


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        (GPT2Config(n_embd=24, n_head=2, n_layer=2, vocab_size=50), {"attn.c_proj.weight", "mlp.c_proj.weight"}),
        (
            OPTConfig(
                hidden_size=24, word_embed_proj_dim=24, ffn_dim=40, num_hidden_layers=2, num_attention_heads=2,
                vocab_size=50,
            ),
            {"self_attn.out_proj.weight", "fc2.weight"},
        ),
        (backbone_config("qwen3_moe"), {"self_attn.o_proj.weight", "mlp.experts.down_proj"}),
    ],
    ids=["gpt2", "opt", "qwen3_moe"],
)  # fmt: skip
def test_other_backbones(backbone, expected):
    assert endings(name.replace(".h.", ".layers.") for name in output_matrices(build_model(backbone, 0))) == expected


def test_a_sublayer_whose_output_cannot_be_told_is_named():
    model = VirtualWidthForCausalLM(vwn_config("llama"))
    layer = model.model.layers[1]
    layer.mlp = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.0\.weight.*--output-init config"):
        output_matrices(model)


@pytest.mark.parametrize("how", ["config", "zero"])
def test_streams_that_cannot_be_scaled_are_refused_with_another_way_out(monkeypatch, how):
    monkeypatch.setattr("vwn.training.output_init._outputs", lambda *_: [])
    with pytest.raises(UserError, match=r"use --connection ghc or mhc$"):
        preset("nano", 1, 2, 0, how)


@pytest.mark.parametrize(
    ("backbone", "asked", "expected"),
    [("nano", None, "zero"), ("nano", "depth", "depth"), ("file", None, "config"), ("file", "zero", "zero")],
)
def test_what_a_run_takes(tmp_path, text, monkeypatch, backbone, asked, expected):
    if backbone == "file":
        backbone_config("llama", vocab_size=300).save_pretrained(tmp_path / "backbone")
        backbone = str(tmp_path / "backbone")
    seen = []
    monkeypatch.setattr(run_module, "build_model", lambda *args: seen.append(args[3]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(config(tmp_path / "run", text, 2, 3, backbone=backbone, output_init=asked, width=WidthOptions()))
    assert seen == [expected]
