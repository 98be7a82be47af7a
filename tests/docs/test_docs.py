"""The pages: their code runs, what comes from code or results is up to date, the site builds without a warning."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
FRONT = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
RUNS = re.compile(r"<!-- runs(: on meta)? -->\n```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MARKED = [(page, *match.groups()) for page in PAGES for match in RUNS.finditer(page.read_text())]
blocks = runpy.run_path(str(ROOT / "docs" / "tools" / "blocks.py"))


@pytest.mark.parametrize(
    ("code", "on_meta"), [pytest.param(code, bool(meta), id=page.stem) for page, meta, code in MARKED]
)
def test_marked_code_runs(code, on_meta):
    with torch.device("meta" if on_meta else "cpu"):
        exec(compile(code, "<docs>", "exec"), {})


@pytest.mark.parametrize("code", PYTHON.findall(FRONT[0].read_text()))
def test_code_of_the_readme_runs_as_pasted(code, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    trained = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(trained).save_pretrained(tmp_path)
    large = "hidden_size=512, intermediate_size" in code
    with torch.device("meta" if large else "cpu"):
        exec(compile(code.replace("path/or/hub-id", str(tmp_path)), "<README>", "exec"), {})


def test_python_blocks_are_python():
    for page in [*PAGES, *FRONT]:
        for code in PYTHON.findall(page.read_text()):
            compile(code, str(page), "exec")
    assert len(MARKED) >= 6


@pytest.mark.parametrize("page", FRONT, ids=lambda page: page.stem)
def test_links_of_the_front_pages_lead_somewhere(page):
    text = page.read_text()
    targets = [t for t in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text) for t in t if t and ":" not in t]
    assert len(targets) >= 5
    for target in targets:
        assert (ROOT / target.partition("#")[0]).exists(), target


def test_the_map_of_the_code_names_what_there_is():
    text = FRONT[1].read_text()
    tree = text[text.index("src/vwn/\n") : text.index("tests/  ")]
    packages = {path.name for path in (ROOT / "src" / "vwn").iterdir() if (path / "__init__.py").exists()}
    assert {name for name in packages if f"{name}/" not in tree} == set()
    assert set(re.findall(r"[a-z_]+\.py", tree)) <= {path.name for path in (ROOT / "src" / "vwn").rglob("*.py")}
    for name in re.findall(r"`((?:[a-z_]+/)+[a-z_]*(?:\.py)?)`", text):
        assert name.startswith("build/") or (ROOT / name).exists() or (ROOT / "src" / "vwn" / name).exists(), name
    source = "\n".join(path.read_text() for path in (ROOT / "src" / "vwn").rglob("*.py"))
    step = text[text.index("## One training step") : text.index("## Where to add")]
    for row in [line.split("|")[2] for line in step.splitlines() if line.startswith("| ")][2:]:
        for name in re.findall(r"`([A-Za-z_.]+)`", row):
            word = name.rpartition(".")[2]
            assert re.search(rf"(?:def|class) {word}\b", source), name


def test_commands_of_the_pages_have_the_options_that_they_are_given():
    from vwn.cli import COMMANDS

    checked = 0
    for page in [*PAGES, *FRONT]:
        for line in re.findall(r"vwn (?:[a-z]+ .*)", page.read_text().replace("\\\n", " ")):
            command = line.split()[1]
            if command not in COMMANDS:
                continue
            known = {f"--{option.name}" for option in COMMANDS[command].options} | {"--help"}
            for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", line.split("`")[0].split("|")[0].split("#")[0]):
                assert option in known, (page.name, line)
                checked += 1
    assert checked > 60


@pytest.mark.slow
def test_blocks_made_from_code_are_up_to_date():
    pages = [page for page in PAGES if "<!-- made by" in page.read_text()]
    assert {page.stem for page in pages} >= {"choosing", "scale", "train", "widen", "your_own_model"}
    for page in pages:
        assert blocks["renewed"](page.read_text()) == page.read_text(), f"python docs/tools/blocks.py ({page.name})"


def test_our_numbers_are_those_of_the_report():
    summary = {
        arm["name"]: arm for arm in json.loads((ROOT / "results" / "widths" / "report.json").read_text())["summary"]
    }
    choosing, index = ((ROOT / "docs" / name).read_text() for name in ("choosing.md", "index.md"))
    rows = {name: line for line in choosing.splitlines() for name in summary if f"`{name}` |" in line}
    rows["plain"] = next(line for line in choosing.splitlines() if line.startswith("| plain |"))
    assert rows.keys() == summary.keys()
    for name, row in rows.items():
        arm = summary[name]
        assert f"{arm['params'] / 1e6:.2f} M" in row
        assert f" {arm['flops_per_token'] / summary['plain']['flops_per_token']:.2f} " in row
        for cell, key in zip(row.split("|")[4:6], ("loss", "loss_2"), strict=True):
            if name != "plain":
                assert estimate(arm[key]["difference"]) in cell
                assert ("not significant" in cell) == (arm[key]["verdict"] == "undecided")
    long = json.loads((ROOT / "results" / "long" / "report.json").read_text())["summary"]
    for arm in [summary["4x16"], *(arm for arm in long if arm["name"] in ("1x4", "4x32"))]:
        for gap in (arm[key]["difference"] for key in ("loss", "loss_2")):
            assert estimate(gap) in index


def test_the_tables_of_the_results_are_those_of_the_json():
    subprocess.run([sys.executable, ROOT / "results" / "tables.py", "--check"], check=True)


def estimate(value):
    return f"−{-value['mean']:.3f} ± {value['std']:.3f}"


def test_every_page_is_in_the_navigation():
    def leaves(entry):
        return [entry] if isinstance(entry, str) else [leaf for part in entry for leaf in leaves(
            part if isinstance(part, str) else next(iter(part.values())))]  # fmt: skip

    named = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    ours = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES}
    results = {page.relative_to(ROOT).as_posix() for page in (ROOT / "results").rglob("*.md")}
    assert len(named) == len(set(named))
    assert set(named) == ours | results | {"CONTRIBUTING.md"}


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_takes_nothing_from_the_network(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"})
    assert done.returncode == 0, done.stderr
    pages = [p for p in (tmp_path / "site").rglob("*.html") if p.name != "report.html"]
    assert len(pages) > 15
    for page in pages:
        html = page.read_text()
        assert not re.search(r"""(?:src=|<link[^>]* href=)["']?(?:https?:)?//""", html), page
        assert not re.search(r":(class|func|meth|mod|attr):`", html), page
    api = (tmp_path / "site" / "api" / "vwn.html").read_text()
    assert "H&#39;" in api or "H'" in api
    shutil.rmtree(tmp_path / "site")
