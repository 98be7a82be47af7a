"""Arms by their words, the studies' presets, and plain backbones of another size."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from vwn.common.errors import UserError
from vwn.cost import model_cost
from vwn.lab.compare.arms import Arm, check_arms, parse_arm
from vwn.lab.compare.config import CompareConfig
from vwn.lab.compare.models import arm_models, matched_sizes
from vwn.lab.compare.studies import STUDIES
from vwn.training.config import OptimConfig, WidthOptions
from vwn.training.model import load_backbone, model_config, resize_backbone

MTP = WidthOptions(mtp=1)


@pytest.mark.parametrize(
    ("word", "arm"),
    [
        ("plain", Arm("plain")),
        ("4x16", Arm("4x16", 4, 16)),
        ("wide:4x16", Arm("wide", 4, 16)),
        ("4x16,mtp=0", Arm("4x16,mtp=0", 4, 16, {"mtp": 0})),
        ("hc:1x4,connection=hc,static=true", Arm("hc", 1, 4, {"connection": "hc", "static": True})),
        ("plain,hidden_scale=1.5", Arm("plain,hidden_scale=1.5", run={"hidden_scale": 1.5})),
        ("a:plain,match_params=4x16", Arm("a", run={"match_params": "4x16"})),
        (
            "b:4x16,learning_rate=3e-3,rate_factors=routing=0.2+reduce=0.1",
            Arm("b", 4, 16, run={"learning_rate": 3e-3, "rate_factors": "routing=0.2+reduce=0.1"}),
        ),
    ],
)
def test_words(word, arm):
    assert parse_arm(word) == arm


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("wide", "MxN"),
        ("4x16,depth=3", "no option 'depth'"),
        ("4x16,mtp=one", "whole number"),
        ("4x16,static=yes", "one of true"),
        ("4x16,mtp_loss_weight=", "a number"),
        ("4x16,embedding=tied", "one of direct"),
        ("4x16,mtp=1,mtp=0", "mtp twice"),
        ("4x16,hidden_size=64", "for 'plain' arms"),
        ("plain,hidden_size=64,hidden_scale=2", "size twice"),
        ("plain,embedding=direct", "needs a virtual width"),
        ("../up:plain", "letters, digits"),
    ],
)
def test_words_that_mean_nothing_are_refused(word, expected):
    with pytest.raises(UserError, match=expected):
        parse_arm(word)


def test_an_arm_matches_another_one_that_is_there():
    with pytest.raises(UserError, match="not another arm"):
        check_arms(map(parse_arm, ["plain", "a:plain,match_params=4x16"]))
    with pytest.raises(UserError, match="not another arm"):
        check_arms(map(parse_arm, ["plain,match_flops=b", "b:plain,match_params=a", "a:4x16"]))


def test_an_arm_changes_its_own_run_alone(tmp_path):
    words = ("plain", "a:4x16,mtp=0,rate_factors=routing=0.2+table=2", "4x16")
    config = CompareConfig(out=tmp_path, arms=words, optim=OptimConfig(rate_factors=("head=0.5",)))
    plain, a, wide = (config.run(arm, 3) for arm in config.parsed)
    assert (plain.m, plain.width.mtp, plain.seed, plain.optim.rate_factors) == (None, 1, 3, ("head=0.5",))
    assert (a.m, a.n, a.width.mtp, a.optim.rate_factors) == (4, 16, 0, ("routing=0.2", "table=2"))
    assert a.out.name == "a-seed3"
    assert dataclasses.replace(wide, out=a.out, width=a.width, optim=a.optim) == a


def test_options_of_a_width_do_not_reach_the_plain_arm(tmp_path):
    config = CompareConfig(out=tmp_path, width=WidthOptions(mtp=1, reduce="sum", static=True))
    plain, wide = (config.run(arm, 0) for arm in config.parsed)
    assert plain.width == MTP
    assert wide.width.reduce == "sum"


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_every_study_is_arms_that_can_be_built_and_given_by_hand(name, tmp_path):
    study = CompareConfig(out=tmp_path, study=name, init_from="trained" if name == "widen" else None)
    study.check()
    assert study.parsed[0].name == "plain"
    assert CompareConfig(out=tmp_path, arms=STUDIES[name].arms).parsed == study.parsed
    models, _ = arm_models(study.parsed, load_backbone("micro", 512, 64), study.width, 64)
    assert list(models) == [arm.name for arm in study.parsed]
    assert len({model.to_json_string(use_diff=False) for model in models.values()}) == len(models)


def test_arms_are_added_to_a_study(tmp_path):
    config = CompareConfig(out=tmp_path, study="widths", arms=("plain", "8x64"))
    assert [a.name for a in config.parsed] == ["plain", "4x6", "4x8", "4x16", "4x32", "8x64"]


@pytest.mark.slow
def test_matched_backbones_cost_what_they_should():
    backbone = load_backbone("nano", 1024, 64)
    target = model_config(backbone, 4, 16, MTP)
    wanted = model_cost(target, sequence_length=64)
    for what, tolerance in (("params", 0.01), ("flops", 0.02)):
        sizes = matched_sizes(backbone, MTP, target, what, 64)
        config = model_config(resize_backbone(backbone, *sizes), None, None, MTP)
        model = AutoModelForCausalLM.from_config(config)
        got = model_cost(config, sequence_length=64)
        if what == "params":
            assert sum(p.numel() for p in model.parameters()) == pytest.approx(wanted.parameters, rel=tolerance)
        else:
            assert got.forward_flops_per_token == pytest.approx(wanted.forward_flops_per_token, rel=tolerance)


@pytest.mark.slow
def test_what_cannot_be_matched_is_refused():
    backbone = load_backbone("nano", 256, 64)
    with pytest.raises(UserError, match="by hand"):
        matched_sizes(backbone, MTP, model_config(load_backbone("large", 256, 64), 8, 64, MTP), "params", 64)


def test_a_resized_backbone_keeps_its_heads_and_runs():
    backbone = LlamaConfig(
        vocab_size=31, hidden_size=64, intermediate_size=100, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=64**-0.5,
    )  # fmt: skip
    wider = resize_backbone(backbone, 96, None)
    assert (wider.num_attention_heads, wider.num_key_value_heads, wider.head_dim) == (6, 3, 16)
    assert (wider.intermediate_size, wider.initializer_range) == (150, 96**-0.5)
    assert backbone.hidden_size == 64
    assert AutoModelForCausalLM.from_config(wider)(torch.zeros(1, 3, dtype=torch.long)).logits.shape == (1, 3, 31)
    assert resize_backbone(backbone, None, 40).intermediate_size == 40
    with pytest.raises(UserError, match="multiple of"):
        resize_backbone(backbone, 72, None)
