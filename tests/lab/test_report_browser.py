"""The report page in headless Chromium: it draws, keeps quiet, and fits a phone and a desktop."""

from __future__ import annotations

import json
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

from curves import STUDY_ARMS, realistic, study, sweep_of
from vwn.lab.report.write import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (Debian: apt-get install chromium)"),
]

FLAGS = [
    *["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"],
    *["--disable-component-update", "--disable-sync", "--virtual-time-budget=10000", "--window-size=1400,1000"],
    "--dump-dom",
]

# Goes first in the page, so that nothing is missed, and reports to the frame's parent when all is drawn.
PROBE = """<script>
const errors = [];
const plain = console.error;
console.error = (...parts) => { errors.push(parts.join(" ")); plain(...parts); };
addEventListener("error", (event) => errors.push(String(event.message || event.target.outerHTML)), true);
addEventListener("unhandledrejection", (event) => errors.push(String(event.reason)));
document.addEventListener("securitypolicyviolation", (event) => errors.push("policy: " + event.blockedURI));
const right = (svg) => svg.getBoundingClientRect().right;
const cloud = (plot) => [plot._context.showSendToCloud, plot._context.plotlyServerURL];
const lines = (id) => document.querySelectorAll(`#${id} .scatterlayer .trace`).length;
const hovered = (plot) => {
  const spoken = plot.data.flatMap((trace, curveNumber) => (trace.customdata ? [{ curveNumber, pointNumber: 0 }] : []));
  Plotly.Fx.hover(plot, spoken);
  return plot.querySelector(".hoverlayer")?.textContent ?? "";
};
addEventListener("load", () => setTimeout(() => {
  const shown = lines("loss-over-tokens");
  const hovers = [...document.querySelectorAll(".plot")].map(hovered);
  document.querySelector("[data-plot=loss-over-tokens][data-arm='1']")?.click();
  setTimeout(() => parent.postMessage(JSON.stringify({
    errors,
    width: innerWidth,
    scrollWidth: document.documentElement.scrollWidth,
    plots: [...document.querySelectorAll(".plot")].map((plot) => lines(plot.id)),
    widest: Math.max(...[...document.querySelectorAll(".plot .main-svg")].map(right)),
    shown,
    left: lines("loss-over-tokens"),
    hovers,
    cloud: [...document.querySelectorAll(".plot")].map(cloud),
    requests: performance.getEntriesByType("resource").map((entry) => entry.name),
    text: document.querySelector("main")?.innerText ?? "",
  }), "*"), 500);
}, 1500));
</script>"""


def probe(html: str, width: int, folder: Path) -> dict[str, Any]:
    """Show `html` in a frame of `width` pixels (Chromium's own window has a minimum) and return what it reports."""
    assert CHROMIUM is not None
    (folder / "page.html").write_text(html.replace("<head>", f"<head>{PROBE}", 1), encoding="utf-8")
    (folder / "frame.html").write_text(
        "<!doctype html><pre>nothing</pre><script>addEventListener('message', (event) => {"
        "document.querySelector('pre').textContent = event.data; });</script>"
        f'<iframe src="page.html" style="border:0;width:{width}px;height:900px"></iframe>'
    )
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", (folder / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(unescape(done.stdout.split("<pre>")[1].split("</pre>")[0]))


@pytest.mark.parametrize("width", [375, 1200])
def test_page_draws_quietly_and_fits(width: int, tmp_path: Path) -> None:
    hostile = "<img src=x onerror=\"console.error('in')\"></script>" + "long" * 30
    write_report(realistic(("plain", hostile, "4x16")), tmp_path / "report")
    seen = probe((tmp_path / "report/report.html").read_text(encoding="utf-8"), width, tmp_path)
    assert seen["errors"] == []
    assert seen["requests"] == []
    assert seen["width"] == width
    assert seen["scrollWidth"] <= width
    assert seen["widest"] <= width
    # Three arms: three seeds and a mean each; gaps and speed-ups lack the baseline, and have a mean and a band.
    assert seen["plots"] == [8, 4, 4, 12, 4, 4]
    assert (seen["shown"], seen["left"]) == (12, 8)
    assert seen["cloud"] == [[False, ""]] * 6
    assert all("<img src=x" in text and "4x16" in text and ("±" in text or "95 %" in text) for text in seen["hovers"])
    assert "Next-2-token loss" in seen["text"]


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("name", STUDY_ARMS)
def test_every_study_draws_quietly_and_fits(name: str, width: int, tmp_path: Path) -> None:
    source = study(name, seeds=2, noise=0.03)
    # One arm diverges in one seed, and the sweep of another ends at its edge.
    source["arms"][-1]["curve"][-1]["loss"] = None
    source["sweep"][0] = sweep_of("plain", 0, bracketed=False)
    write_report(source, tmp_path / "report")
    seen = probe((tmp_path / "report/report.html").read_text(encoding="utf-8"), width, tmp_path)
    assert seen["errors"] == []
    assert seen["requests"] == []
    assert seen["scrollWidth"] <= width
    assert seen["widest"] <= width
    assert len(seen["plots"]) >= 6 - 2 * (name == "mtp")
    assert min(seen["plots"]) >= 1
    assert all(any(arm in text for arm in STUDY_ARMS[name]) for text in seen["hovers"])
    order = ["Verdicts", "Next-token loss", "Next-2-token loss", "Read with care", "Arms and their cost"]
    order += ["Learning rates", "Every arm against every other", "At equal tokens, FLOPs and time", "What was run"]
    places = [seen["text"].index(f"{title}\n") for title in order]
    assert places == sorted(places)


def test_probe_would_notice_errors_requests_and_overflow(tmp_path: Path) -> None:
    broken = (
        '<!doctype html><html><head></head><body><main style="width:2000px">x</main>'
        f'<script>console.error({escape("1")}); nowhere();</script><img src="http://127.0.0.1:9/x.png"></body></html>'
    )
    seen = probe(broken, 375, tmp_path)
    assert any("nowhere" in error for error in seen["errors"])
    assert "1" in seen["errors"]
    assert seen["requests"] == ["http://127.0.0.1:9/x.png"]
    assert seen["scrollWidth"] > 375
