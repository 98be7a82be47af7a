"""The examples: they run, and the one that widens a GPT by hand changes ten lines and starts as that GPT."""

import difflib
import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import vwn
from conftest import perturb

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZES = dict(width=32, depth=2, heads=2, window=32)


def module(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # where dataclasses look their annotations up
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def gpt():
    return module("gpt")


@pytest.fixture(scope="module")
def wide():
    return module("gpt_vwn")


@pytest.fixture
def run(monkeypatch, capsys):
    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_ten_lines_turn_the_gpt_into_a_vwn():
    old, new = ((EXAMPLES / name).read_text().splitlines() for name in ("gpt.py", "gpt_vwn.py"))
    lines = list(difflib.unified_diff(old, new, n=0, lineterm=""))[2:]
    added = [line for line in lines if line.startswith("+")]
    assert 0 < len(added) <= 10
    assert not any(line.strip("+ ").startswith(";") or ";" in line for line in added)  # no two statements in a line


@pytest.mark.parametrize(("m", "n"), [(4, 16), (2, 3), (1, 1)])
def test_the_wide_gpt_starts_as_the_gpt(gpt, wide, m, n):
    plain = perturb(gpt.GPT(gpt.Config(**SIZES)))
    model = wide.GPT(wide.Config(**SIZES, m=m, n=n))
    theirs = {name.replace("norm.weight", "norm.1.weight") if name.startswith("norm.") else name: value
              for name, value in plain.state_dict().items()}  # fmt: skip
    theirs["norm.1.bias"] = theirs.pop("norm.bias")
    table = theirs.pop("embedding.weight")
    missing, unexpected = model.load_state_dict(theirs, strict=False)
    assert not unexpected
    assert all("connections" in name or name.startswith(("embedding.", "norm.0.")) for name in missing)
    with torch.no_grad():
        model.embedding.table.weight[:, : SIZES["width"]] = table  # what is in the other slots must not matter
    ids = torch.randint(256, (2, 20))
    torch.testing.assert_close(model(ids), plain(ids), rtol=1e-3, atol=1e-3)
    assert (perturb(model)(ids) - plain(ids)).abs().max() > 0.1  # the test can fail


@pytest.mark.parametrize("name", ["gpt", "gpt_vwn"])
def test_both_are_causal_and_learn(name, request, text):
    example = module(name)
    torch.manual_seed(0)
    model = example.GPT(example.Config(**SIZES))
    data = torch.tensor(list(text.read_bytes()))
    losses = example.train(model, data, steps=30, batch_size=8, rate=1e-2)
    assert len(losses) == 30
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 1.0
    ids = data[None, :12]
    changed = ids.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 256
    before, after = perturb(model)(ids), model(changed)
    assert torch.equal(before[:, :8], after[:, :8])
    assert not torch.equal(before[:, 8:], after[:, 8:])
    assert model.continued(ids, 3).shape == (1, 15)
    assert F.cross_entropy(before[0, :-1], ids[0, 1:]).isfinite()


def test_gpt_from_the_command_line(run, text):
    sizes = [f"--{name}={value}" for name, value in SIZES.items()]
    assert "step     2" in run("gpt_vwn", text, "--steps=2", "--sample=4", "--m=2", "--n=3", *sizes)


@pytest.mark.parametrize("name", ["gpt", "gpt_vwn", "train_with_trainer", "widen_pretrained", "lora"])
def test_a_text_shorter_than_a_window_is_refused(run, tmp_path, capsys, name):
    if name == "lora":
        pytest.importorskip("peft")
    (tmp_path / "short.txt").write_text("few")
    with pytest.raises(SystemExit) as stopped:
        run(name, tmp_path / "short.txt", *([] if name.startswith("gpt") else [tmp_path / "out"]))
    assert "short.txt has 3 bytes; a window takes 12" in f"{stopped.value} {capsys.readouterr().err}"


def test_trainer(run, text, tmp_path):
    out = tmp_path / "out"
    printed = run("train_with_trainer", text, out, "--steps=3", "--window=32", "--width=32", "--layers=1", "--n=6")
    assert "nats per byte" in printed
    assert json.loads((out / "config.json").read_text())["n"] == 6
    assert (out / "model.safetensors").exists()


@pytest.mark.slow
def test_the_notebook(monkeypatch):
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    assert "steps = 300" in cells[0]
    cells[0] = cells[0].replace("steps = 300", "steps = 5")
    names = {}
    for cell in cells:
        exec(compile(cell, "<notebook>", "exec"), names)
    assert [len(curve) for curve in names["curves"].values()] == [5, 5]
    assert names["slots"].shape == (5, 16)
    for curve in names["curves"].values():
        assert curve[-1][1] < curve[0][1]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["sft", "dpo", "reward"])
def test_trl(run, tmp_path, monkeypatch, task):
    pytest.importorskip("trl")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert f"{task}: 3 steps" in run("with_trl", task, tmp_path)
    if task == "dpo":
        assert (tmp_path / "adapter_model.safetensors").exists()
        return
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "start", tmp_path))
    moved = {name for name, value in after.items() if name in before and not torch.equal(before[name], value)}
    for part in (".connections.", ".mtp.") if task == "sft" else (".connections.",):
        assert any(part in name for name in moved)


def test_widen(run, text, tmp_path):
    printed = run("widen_pretrained", text, tmp_path, "--steps=3", "--window=32", "--batch-size=2")
    assert float(printed.split("largest change of a logit: ")[1].split()[0]) < 1e-5
    losses = [float(line.split()[-1]) for line in printed.splitlines() if line.startswith("step")]
    assert losses[-1] < losses[0]
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["model_type"] == "virtual_width"


def test_lora(run, text, tmp_path):
    pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=2)  # fmt: skip
    plain = perturb(AutoModelForCausalLM.from_config(config), scale=0.1)
    plain.save_pretrained(tmp_path / "plain")
    before = vwn.widen(plain, m=1, n=4).state_dict()
    options = ["--steps=3", "--window=32", "--batch-size=2", "--rank=2", "--checkpoint", tmp_path / "plain"]
    assert "trainable params" in run("lora", text, tmp_path / "out", *options)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() <= before.keys()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    adapted = ("q_proj", "v_proj", "up_proj", "down_proj")
    assert all(any(part in name for part in (*adapted, ".connections.")) for name in moved)
    assert all(any(part in name for name in moved) for part in (*adapted, "bias_alpha", "bias_beta"))


def test_steering_a_slot(run, tmp_path):
    from tiny import build, vwn_config
    from vwn.data.tokenizer import load_tokenizer

    example = module("steer_slots")
    model = build(vwn_config(n=4, backbone={"vocab_size": 300}))
    ids = torch.randint(3, 60, (2, 7))
    states = example.read_slots(model, ids)
    assert states.shape == (4, 2, 7, 4, 12)
    plain = model(ids, output_hidden_states=True)
    assert torch.equal(states[0].flatten(-2), plain.over_width_hidden_states[0])
    handle = example.steer(model, sublayer=1, slot=3, direction=torch.ones(12))
    steered = example.read_slots(model, ids)
    moved = (steered[2] - states[2])[..., 3, :]
    torch.testing.assert_close(moved, torch.ones_like(moved))
    assert torch.equal(steered[:2], states[:2])
    assert (model(ids).logits - plain.logits).abs().max() > 1e-3
    handle.remove()
    assert torch.equal(model(ids).logits, plain.logits)
    model.save_pretrained(tmp_path)
    load_tokenizer("bytes").save_pretrained(tmp_path)
    printed = run("steer_slots", tmp_path, "some text", "--sublayer=1", "--slot=3", "--strength=20")
    assert printed.count("RMS by slot") == 4
    assert printed.count("next token") == 5
