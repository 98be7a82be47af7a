"""The report page in headless Chromium: it fits a phone and a desktop, and loads nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from curves import budget_runs, study
from vwn.lab.report.write import write_report

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (Debian: apt-get install chromium)"),
]

FLAGS = [
    *["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"],
    *["--disable-background-networking", "--disable-component-update", "--disable-sync"],
    *["--virtual-time-budget=10000", "--window-size=1400,1000", "--dump-dom"],
]

# Goes first in a copy of the page without its policy, which forbids scripts.
PROBE = """<script>
const errors = [];
addEventListener("error", (event) => errors.push(String(event.message || event.target.outerHTML)), true);
addEventListener("load", () => setTimeout(() => parent.postMessage(JSON.stringify({
  errors,
  width: innerWidth,
  scrollWidth: document.documentElement.scrollWidth,
  figures: [...document.querySelectorAll("figure svg")].map((svg) => svg.getBoundingClientRect().width),
  texts: [...document.querySelectorAll("figure svg text")].map((text) => text.getBoundingClientRect().height),
  right: Math.max(...[...document.querySelectorAll("figure svg *")].map((part) => part.getBoundingClientRect().right)),
  requests: performance.getEntriesByType("resource").map((entry) => entry.name),
  text: document.querySelector("main")?.innerText ?? "",
}), "*"), 500));
</script>"""


def probe(html: str, widths: tuple[int, ...], folder: Path) -> dict[int, dict[str, Any]]:
    """Show `html` in frames of so many pixels (Chromium's own window has a minimum); what each reports, by width."""
    assert CHROMIUM is not None
    open_page = html.replace("script-src 'none'", "").replace("default-src 'none';", "")
    (folder / "page.html").write_text(open_page.replace("<head>", f"<head>{PROBE}", 1), encoding="utf-8")
    frames = [f'<iframe src="page.html" style="border:0;width:{width}px;height:900px"></iframe>' for width in widths]
    (folder / "frame.html").write_text(
        "<!doctype html><pre>nothing</pre><script>const found = []; addEventListener('message', (event) => {"
        "found.push(JSON.parse(event.data)); document.querySelector('pre').textContent = JSON.stringify(found); });"
        f"</script>{''.join(frames)}"
    )
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", (folder / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(unescape(done.stdout.split("<pre>")[1].split("</pre>")[0]))
    return {seen["width"]: seen for seen in found}


def test_page_fits_and_loads_nothing(tmp_path: Path) -> None:
    source = study("widths", seeds=2, noise=0.03)
    source["arms"] += budget_runs("4x" + "9" * 60 + "<img src=x>", seeds=(0, 1))
    source["arms"][-1]["sample"] = "long" * 100
    write_report(source, tmp_path / "report")
    found = probe((tmp_path / "report/report.html").read_text(encoding="utf-8"), (400, 1280), tmp_path)
    long = probe((ROOT / "results/long/report.html").read_text(encoding="utf-8"), (400, 1280), tmp_path)
    assert found.keys() == long.keys() == {400, 1280}
    for width, seen in (*found.items(), *long.items()):
        assert seen["errors"] == seen["requests"] == []
        assert seen["scrollWidth"] <= width
        assert seen["right"] <= width
        assert len(seen["figures"]) >= 7
        assert min(seen["figures"]) > 0.35 * min(width, 1000)
        assert min(seen["texts"]) >= 10
        order = ["Virtual width against plain", "Caveats", "Next-token loss", "Next-2-token loss"]
        order += ["Arms and their cost", "Every arm against every other", "What was run"]
        if seen is found[width]:  # the other has budgets, and no sweep
            order[5:5], order[-1:-1] = ["Learning rates"], ["At equal tokens, FLOPs and time"]
        places = [seen["text"].index(title) for title in order]
        assert places == sorted(places)
