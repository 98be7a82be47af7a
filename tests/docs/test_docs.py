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
RUNS = re.compile(r"<!-- runs(: on meta)? -->\n```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MARKED = [(page, *match.groups()) for page in PAGES for match in RUNS.finditer(page.read_text())]
blocks = runpy.run_path(str(ROOT / "docs" / "tools" / "blocks.py"))


@pytest.mark.parametrize(
    ("code", "on_meta"), [pytest.param(code, bool(meta), id=page.stem) for page, meta, code in MARKED]
)
def test_marked_code_runs(code, on_meta):
    with torch.device("meta" if on_meta else "cpu"):
        exec(compile(code, "<docs>", "exec"), {})


def test_python_blocks_are_python():
    for page in PAGES:
        for code in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
            compile(code, str(page), "exec")
    assert len(MARKED) >= 4


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
                assert ("not decided" in cell) == (arm[key]["verdict"] == "undecided")
    for key in ("loss", "loss_2"):
        assert estimate(summary["4x16"][key]["difference"]) in index
    family = json.loads((ROOT / "results" / "family" / "report.json").read_text())["summary"]
    for arm in family:
        if arm["name"] in ("plain", "4x16"):
            assert f"{arm['tokens_per_second']:,.0f}" in index


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
    assert set(named) == ours | results


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
