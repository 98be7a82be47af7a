"""What works with torch and transformers alone, and the sentence of everything else."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import vwn
from vwn.common.extras import EXTRAS

ROOT = Path(vwn.__file__).parent
PROJECT = Path(__file__).parents[2] / "pyproject.toml"
CORE = {
    "torch",
    "transformers",
    "safetensors",
    "huggingface_hub",
    "tokenizers",
    "numpy",
    "packaging",
    "filelock",
    "tqdm",
    "yaml",
}
ELSEWHERE = {"vllm"}  # a plug-in that vLLM loads


def run_without_extras(code: str, *arguments: str, kept: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run code in a process in which no extra is installed but the packages in `kept`."""
    blocked = [package for package in [*EXTRAS, "peft", "spmd_types"] if package not in kept]
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n{code}"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_core_needs_torch_and_transformers_only(tmp_path: Path) -> None:
    code = """
import torch, vwn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from vwn.hf import VirtualWidthConfig, VirtualWidthForCausalLM, widen
sizes = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
model = VirtualWidthForCausalLM(VirtualWidthConfig(backbone=LlamaConfig(**sizes), m=2, n=3, num_mtp_modules=1)).eval()
ids = torch.arange(1, 9)[None]
model(input_ids=ids, labels=ids).loss.backward()
generated = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
model.save_pretrained(sys.argv[1])
loaded = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert generated.shape == (1, 12)
torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
plain = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
torch.testing.assert_close(widen(plain, m=2, n=4).eval()(ids).logits, plain(ids).logits)
from vwn.cost import model_cost
assert model_cost(model.config, sequence_length=8).parameters == model.num_parameters()
del sys.modules["tyro"]  # all that the command line needs for this
from vwn.cli import main
sys.argv[1:] = "cost --backbone nano --window 16 --arms plain 2x3 --json".split()
main()
"""
    done = run_without_extras(code, str(tmp_path / "model"))
    assert done.returncode == 0, done.stderr
    assert [row["name"] for row in json.loads(done.stdout)] == ["plain", "2x3"]


@pytest.mark.slow
def test_text_is_prepared_without_extras(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a line of text\n" * 100)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    code = """
from pathlib import Path
from vwn.data import prepare
folder = Path(sys.argv[1])
assert prepare(str(folder / "text.txt"), window=16, cache_dir=folder / "cache").train_tokens > 1000
for data in (str(folder / "rows.parquet"), "owner/name"):
    try:
        prepare(data, window=16, cache_dir=folder / "cache")
    except ValueError as error:
        print(error)
"""
    done = run_without_extras(code, str(tmp_path))
    assert done.returncode == 0, done.stderr
    parquet, hub = done.stdout.splitlines()
    assert parquet == "reading a .parquet file needs pyarrow; install vwn with [train]: pip install '.[train]'"
    assert hub == "the data set owner/name needs datasets; install vwn with [train]: pip install '.[train]'"


@pytest.mark.parametrize(
    ("arguments", "kept", "sentence"),
    [
        (["--help"], (), "vwn: the command line needs tyro; install vwn with [train]: pip install '.[train]'"),
        (
            ["train", "--out", "x"],
            ("tyro",),
            "vwn: vwn train needs accelerate; install vwn with [train]: pip install '.[train]'",
        ),
        (
            ["compare", "--out", "x"],
            ("tyro", "accelerate", "tensorboard", "jinja2"),
            "vwn: vwn compare needs matplotlib; install vwn with [lab]: pip install '.[lab]'",
        ),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_a_command_whose_extra_is_missing_names_it(arguments: list[str], kept: tuple[str, ...], sentence: str) -> None:
    done = run_without_extras("from vwn.cli import main; main()", *arguments, kept=kept)
    assert done.returncode == 2
    assert done.stderr == f"{sentence}\n"


@pytest.mark.parametrize(("start", "said"), [("", "vwn.common.extras.MissingExtra"), ("sys.argv[0] = '-m'; ", "vwn")])
def test_torchtitan_is_named(start: str, said: str) -> None:
    done = run_without_extras(f"{start}import vwn.titan")
    sentence = f"{said}: vwn.titan needs torchtitan; install vwn with [titan]: pip install '.[titan]'"
    assert done.stderr.splitlines()[-1] == sentence
    assert ("Traceback" in done.stderr) == (start == "")


def test_every_import_is_of_the_core_or_of_an_extra() -> None:
    found = set()
    for file in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(str(node.module).partition(".")[0])
    assert (found - set(sys.stdlib_module_names) - {"vwn", "spmd_types", "triton"}) <= CORE | ELSEWHERE | set(EXTRAS)


def test_extras_are_those_of_the_project() -> None:
    extras = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]
    for package, extra in EXTRAS.items():
        assert package in [re.split(r"[^\w-]", spec)[0].replace("-", "_") for spec in extras[extra]], (package, extra)
    assert {e for spec in extras["dev"] for e in re.findall(r"vwn\[(.*)\]", spec) for e in e.split(",")} == set(
        extras
    ) - {"dev"}
