"""A checkpoint in other hands: a process that never imported us, plain classes, the hub, and its model card."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import vwn
from conftest import perturb
from tiny import build, token_ids, vwn_config
from vwn.hf import VirtualWidthConfig, VirtualWidthForCausalLM
from vwn.hf.checkpoint.card import without_folders

FRESH = """
import json, os, sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
for auto in (AutoConfig, AutoModel, AutoModelForCausalLM):
    try:
        auto.from_pretrained(sys.argv[1])
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
    else:
        raise AssertionError("loaded without being trusted")
assert not [name for name in sys.modules if name.split(".")[0] == "vwn"]
for path in sys.argv[1:]:
    expected = torch.load(path + "/expected.pt")
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    assert type(model).__module__ == "vwn.hf.causal_lm", type(model).__module__
    assert torch.equal(model(expected["ids"]).logits, expected["logits"]), path
    pickled = torch.load(path + "/pickled.pt", weights_only=False)
    assert torch.equal(pickled(expected["ids"]).logits, expected["logits"]), path
    assert type(pickled.model.backbone.layers[0]) is type(model.model.backbone.layers[0])
    base = AutoModel.from_pretrained(path, trust_remote_code=True)
    assert torch.equal(base(expected["ids"]).last_hidden_state, expected["hidden"]), path
    model.save_pretrained(path + "/again")
    assert "configuration.py" not in os.listdir(path + "/again"), os.listdir(path + "/again")
    shims, maps = [], []
    for folder in (path, path + "/again"):
        shims.append(open(folder + "/modeling_virtual_width.py").read())
        maps.append(json.load(open(folder + "/config.json"))["auto_map"])
    assert shims[0] == shims[1] and maps[0] == maps[1], maps
    again = AutoModelForCausalLM.from_pretrained(path + "/again", trust_remote_code=True)
    assert torch.equal(again(expected["ids"]).logits, expected["logits"]), path
print("all equal")
"""


@pytest.mark.slow
def test_a_process_that_never_imported_us_loads_and_unpickles_what_it_trusts(tmp_path, with_code):
    tied = {"tie_word_embeddings": True, "embedding": "factorised"}
    built = {
        "tied": (build(vwn_config("qwen3_moe", 2, 4, num_mtp_modules=1, **tied)), {"max_shard_size": "5KB"}),
        "bf16": (perturb(AutoModelForCausalLM.from_config(vwn_config("llama", 2, 4), dtype=torch.bfloat16)), {}),
    }
    for name, (model, options) in built.items():
        model.save_pretrained(tmp_path / name, **options)
        ids = token_ids()
        hidden = model.model(ids).last_hidden_state.detach()
        saved = {"ids": ids, "logits": model(ids).logits.detach(), "hidden": hidden}
        torch.save(saved, tmp_path / name / "expected.pt")
        torch.save(model, tmp_path / name / "pickled.pt")
    assert len(list((tmp_path / "tied").glob("*.safetensors"))) > 1
    paths = [str(tmp_path / name) for name in built]
    env = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = subprocess.run(
        [sys.executable, "-c", FRESH, *paths], capture_output=True, text=True, env=env, stdin=subprocess.DEVNULL
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "all equal" in run.stdout


@pytest.fixture
def with_code(monkeypatch):
    """Have folders carry the module that `trust_remote_code` runs, in this test alone."""
    monkeypatch.setattr(VirtualWidthForCausalLM, "_carries_code", False)
    VirtualWidthForCausalLM.register_for_auto_class()


def test_once_imported_the_installed_classes_are_taken_without_a_word(tmp_path, monkeypatch, capfd, with_code):
    model = build(vwn_config())
    model.save_pretrained(tmp_path)
    capfd.readouterr()

    def forbidden(*args, **kwargs):
        raise AssertionError("asked for, or ran, the checkpoint's code")

    monkeypatch.setattr("builtins.input", forbidden)
    for module in ("auto_factory", "configuration_auto"):
        monkeypatch.setattr(f"transformers.models.auto.{module}.get_class_from_dynamic_module", forbidden)
    for auto in (AutoModel, AutoModelForCausalLM):
        assert torch.equal(
            auto.from_pretrained(tmp_path)(token_ids())[0],
            (model if auto is AutoModelForCausalLM else model.model)(token_ids())[0],
        )
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is VirtualWidthConfig
    assert type(AutoModelForCausalLM.from_config(config)) is VirtualWidthForCausalLM
    assert re.search("warn|code|trust", capfd.readouterr().err, re.I) is None


FILES = {"README.md", "config.json", "generation_config.json", "model.safetensors"}


def test_what_is_saved(tmp_path):
    build(vwn_config()).save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == FILES
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


def test_what_is_saved_for_programs_that_do_not_import_us(tmp_path, with_code):
    build(vwn_config()).save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == FILES | {"modeling_virtual_width.py"}
    for target in json.loads((tmp_path / "config.json").read_text())["auto_map"].values():
        module, name = target.split(".")
        assert module == "modeling_virtual_width"
        assert name in vwn.hf.__all__


def test_a_plain_class_does_not_load_a_widened_checkpoint(tmp_path):
    """It would find its config inside ours, and start all its layers afresh."""
    model = build(vwn_config("llama", 1, 1, embedding="replicated"))
    model.save_pretrained(tmp_path)
    plain = type(AutoModelForCausalLM.from_config(model.config.backbone))
    assert plain.__name__ != "VirtualWidthForCausalLM"
    with pytest.raises(ValueError, match=r"virtual width.*import vwn\.hf.*AutoModelForCausalLM"):
        plain.from_pretrained(tmp_path)


# The model card


def test_the_card_says_what_the_model_is(tmp_path):
    model = build(vwn_config("mixtral", 2, 3, embedding="factorised", tie_word_embeddings=True, num_mtp_modules=1))
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.license is None
    assert "mixtral" in card.data.tags
    for said in ("virtual width 1.5", "| `m` | 2 |", "| `n` | 3 |", "| `embedding` | factorised |",
                 "| `tie_word_embeddings` | True |", "mixtral, width D = 24, 2 layers", "| vocabulary | 61 |",
                 f"| {model.num_parameters():,} |", "import vwn.hf", "## Licence"):  # fmt: skip
        assert said in card.text, said
    assert "## Training" not in card.text


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("stdlib", "stdlib"),
        ("owner/name", "owner/name"),
        ("/data/a b.txt,books", "a b.txt,books"),
        ("~/x.txt", "x.txt"),
        ("../up/x.txt", "x.txt"),
        ("/", "/"),
        ("bpe:4096", "bpe:4096"),
    ],
)
def test_folders_are_left_out(path, shown):
    assert without_folders(path) == shown


def test_a_users_card_is_left_alone(tmp_path):
    model = build(vwn_config())
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_training_run_describes_itself(finished):
    run, result = finished
    text = (run.out / "README.md").read_text()
    tokens = 20 * run.optim.batch_size * run.corpus.window
    for said in ("| data | text.txt |", f"| tokens | {tokens:,} |", f"{result.curve[-1]['loss']:.4f}",
                 f"{result.curve[-1]['loss_2']:.4f}", "| `n` | 10 |"):  # fmt: skip
        assert said in text, said
    assert str(Path(run.corpus.data).parent) not in text
    assert str(run.out.parent) not in text


class FakeHub:
    """What a push needs of the hub; keeps what it is sent."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}

    def create_repo(self, repo_id, **kwargs):
        return type("Repo", (), {"repo_id": repo_id})

    def create_commit(self, operations, **kwargs):
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()


@pytest.mark.parametrize(
    ("way", "own_card"), [("push_to_hub", False), ("save_pretrained", True), ("save_pretrained twice", False)]
)
def test_a_push_carries_a_card(tmp_path, monkeypatch, way, own_card):
    from huggingface_hub.errors import EntryNotFoundError

    hub = FakeHub()
    for module in ("modeling_utils", "utils.hub"):
        monkeypatch.setattr(f"transformers.{module}.hf_api", lambda: hub, raising=False)

    load = ModelCard.load.__func__

    def stored_card(cls, where, **kwargs):
        if os.path.exists(where):
            return load(cls, where, **kwargs)
        if own_card:
            return ModelCard("---\nlicense: mit\n---\nmine")
        raise EntryNotFoundError("no card")

    monkeypatch.setattr(ModelCard, "load", classmethod(stored_card))
    model = build(vwn_config())
    model.add_model_tags("sft")
    if way == "push_to_hub":
        model.push_to_hub("ada/wide", tags=["mine"])
    else:
        if way.endswith("twice"):
            model.save_pretrained(tmp_path)
        model.save_pretrained(tmp_path, push_to_hub=True, repo_id="ada/wide")
    assert {"config.json", "model.safetensors", "README.md"} <= set(hub.files)
    card = hub.files["README.md"].decode()
    if own_card:
        assert card.endswith("mine")
    else:
        assert "| `connection` | ghc |" in card
        tags = ["vwn", "virtual-width-networks", "llama", "sft", *["mine"] * (way == "push_to_hub")]
        assert ModelCard(card).data.tags == tags
