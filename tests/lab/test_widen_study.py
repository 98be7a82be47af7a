"""The study `widen`: arms that go on from a trained plain model, and compute what it does at first."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Phi3Config

from conftest import perturb
from runs import compare_config
from vwn.common.errors import UserError
from vwn.data.tokenizer import load_tokenizer
from vwn.hf import VirtualWidthConfig, VirtualWidthForCausalLM
from vwn.lab.compare.arms import parse_arm
from vwn.lab.compare.run import adopt, compare
from vwn.lab.compare.starts import plain_model, start_models, with_wider_ffn
from vwn.lab.compare.studies import STUDIES
from vwn.training.config import OptimConfig, WidthOptions


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain model as `vwn train --mtp 1` leaves it, no weight of which is at its start."""
    folder = tmp_path_factory.mktemp("plain") / "checkpoint-7"
    tokenizer = load_tokenizer("bytes")
    backbone = LlamaConfig(
        **{"vocab_size": len(tokenizer), "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "tie_word_embeddings": False, "max_position_embeddings": 64},
    )
    config = VirtualWidthConfig(backbone=backbone, connection="residual", num_mtp_modules=1, mtp_loss_weight=0.3)
    perturb(VirtualWidthForCausalLM(config), scale=0.1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_every_arm_computes_what_the_trained_model_does(source: Path) -> None:
    models = start_models(map(parse_arm, STUDIES["widen"].arms), str(source))
    trained = VirtualWidthForCausalLM.from_pretrained(source).eval()
    ids = torch.randint(0, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = trained(input_ids=ids).logits
    assert expected.std() > 0.1
    sizes = {name: model.num_parameters() for name, model in models.items()}
    assert sizes["plain"] < min(sizes["4x8"], sizes["1x4"]) < sizes["4x8-table"] < sizes["1x4-table"]
    assert sizes["plain-params"] == pytest.approx(sizes["1x4-table"], rel=0.01)
    for name, model in models.items():
        assert (model.eval()(input_ids=ids).logits - expected).abs().max() < 1e-5, name
    grown = models["plain-params"]
    grown(input_ids=ids, labels=ids).loss.backward()
    out = grown.model.layers[0].mlp.down_proj.weight
    assert (out[:, 40:] == 0).all()
    assert out.grad[:, 40:].abs().min() > 0


@pytest.mark.slow
def test_the_arms_go_on_from_it(source: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arms = ("plain", "4x8-table:4x8,embedding=direct", "plain-params:plain,match_params=4x8-table")
    optim = OptimConfig(steps=3, batch_size=4, learning_rate=1e-3)
    monkeypatch.chdir(shutil.copytree(source.parent, tmp_path / "here"))
    source = Path(source.name)
    asked = compare_config(
        **{"out": Path("out"), "text": text, "backbone": "tiny", "arms": arms, "seeds": (3,)},
        **{"learning_rates": (), "init_from": str(source), "optim": optim, "eval_every": 3},
    )
    report = compare(asked)
    losses = [run["curve"][0]["loss"] for run in report["arms"]]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-4)
    assert len({run["curve"][-1]["loss"] for run in report["arms"]}) == 3
    assert [run["r"] for run in report["arms"]] == [1, 2, 1]
    assert report["config"]["init_from"] == str(source)
    assert report["config"]["tokenizer"] == str(source)
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(tmp_path / "here" / source)
    more = dataclasses.replace(asked, out=Path("here", "out"), arms=("4x4",), init_from=None, resume=True)
    again = compare(adopt(more, {"out", "arms", "resume"}))
    assert again["arms"][:3] == report["arms"]
    assert again["arms"][3]["curve"][0]["loss"] == pytest.approx(losses[0], abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"study": "widen", "init_from": None}, "--study widen needs --init-from"),
        ({"backbone": "nano"}, "decides the model; drop --backbone"),
        ({"width": WidthOptions(mtp=2)}, "drop the options of a width"),
        ({"arms": ("plain", "4x8,reduce=sum")}, "sets reduce, which --init-from decides"),
        ({"arms": ("plain", "4x8"), "optim": OptimConfig(steps=3)}, "--learning-rate is needed"),
        ({"study": "widen", "optim": OptimConfig(steps=3)}, "--sweep-rates is needed"),
    ],
)
def test_refusals(source: Path, tmp_path: Path, text: Path, changes: dict, expected: str) -> None:
    options = {"backbone": "tiny", "init_from": str(source), "learning_rates": (), "arms": ("plain",)} | changes
    with pytest.raises(UserError, match=expected):
        compare(compare_config(tmp_path / "out", text, **options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [Phi3Config, MixtralConfig])
def test_ffns_whose_maps_are_in_one_weight_are_not_grown(kind: type) -> None:
    sizes = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(kind(**sizes, **heads))
    with pytest.raises(UserError, match=r"gate_up_proj.* holds several maps in one"):
        with_wider_ffn(model, round(1.2 * model.num_parameters()))


def test_a_wide_model_is_no_start(source: Path, tmp_path: Path) -> None:
    models = start_models([parse_arm("4x8")], str(source))
    models["4x8"].save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match="has virtual width"):
        plain_model(str(tmp_path / "wide"))
