"""The report as one self-contained HTML page: no request leaves it, and its content policy forbids any."""

from __future__ import annotations

import json
from typing import Any

from vwn.compare import wording
from vwn.compare.figures import Figure, arm_styles, gap_figure, hides_points, is_empty, loss_figure
from vwn.compare.page_assets import SCRIPT, STYLE
from vwn.compare.tables import VERDICT_WORDS, cost_table, definition_list, result_table, run_table, text
from vwn.compare.wording import LOSS_NAMES, NOTHING

CONTENT_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)
CSS_DASHES = {"solid": "solid", "dash": "dashed", "dot": "dotted"}


def render_page(report: dict[str, Any]) -> str:
    """The HTML text of an analysed report (`add_analysis`); every string from the report is escaped."""
    # 4.8 MB of script that only this page needs.
    from plotly.offline import get_plotlyjs

    figures: dict[str, Figure] = {}
    title = text(f"Virtual width against {report.get('baseline')}")
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>",
            f'<header><h1>{title}</h1>\n<p class="facts">{text(_facts(report))}</p>',
            f'<p class="headline">{text(wording.headline(report))}</p>{_cautions(report)}</header>',
            *[_loss_section(report, key, figures) for key in LOSS_NAMES if _is_measured(report, key)],
            f'<section aria-labelledby="cost"><h2 id="cost">Arms and their cost</h2>{cost_table(report)}</section>',
            _run_section(report),
            "</main>",
            f'<script type="application/json" id="figures">{_json_for_script(figures)}</script>',
            f"<script>{get_plotlyjs()}</script>\n<script>{SCRIPT}</script>\n</body>\n</html>\n",
        ]
    )


def _json_for_script(value: Any) -> str:
    # "<" could close the script element or open a comment in it.
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


def _is_measured(report: dict[str, Any], key: str) -> bool:
    return any(arm[key] is not None for arm in report["summary"])


def _facts(report: dict[str, Any]) -> str:
    config = report.get("config", {})
    budget = max((run["curve"][-1]["tokens"] for run in report["arms"] if run["curve"]), default=None)
    facts = [config[field] for field in ("backbone", "data") if isinstance(config.get(field), str)]
    facts.append(wording.seeds_text(len({run["seed"] for run in report["arms"]})))
    if budget is not None:
        facts.append(f"{wording.scaled(budget)} tokens per run")
    if report.get("created"):
        facts.append(str(report["created"])[:10])
    return " · ".join(facts)


def _cautions(report: dict[str, Any]) -> str:
    items = "".join(f"<li>{text(sentence)}</li>" for sentence in wording.cautions(report))
    heading = '<h2 id="cautions">Read with care</h2>'
    return f'<section class="cautions" aria-labelledby="cautions">{heading}<ul>{items}</ul></section>' if items else ""


def _loss_section(report: dict[str, Any], key: str, figures: dict[str, Figure]) -> str:
    """The section of one loss; its plots are added to `figures` under the ids of their elements."""
    name, baseline = LOSS_NAMES[key], report.get("baseline")
    gap_caption = f"Below the dotted line: better than {baseline} after as many tokens."
    curves = loss_figure(report, key)
    plots = [
        (f"{key}-curve", f"Validation {name}", _curve_caption(report, curves), curves),
        (f"{key}-gap", f"Difference to {baseline}", gap_caption, gap_figure(report, key)),
    ]
    drawn = [plot for plot in plots if not is_empty(plot[3])]
    figures.update({identifier: figure for identifier, _, _, figure in drawn})
    shown = "".join(_plot(report, key, *plot) for plot in drawn)
    return (
        f'<section aria-labelledby="{key}-title"><h2 id="{key}-title">{name.capitalize()}</h2>'
        f"{result_table(report, key)}{_result_note(report) if key == 'loss' else ''}"
        f'<div class="plots">{shown}</div>'
        f"<details><summary>Every run</summary>{run_table(report, key)}</details></section>"
    )


def _result_note(report: dict[str, Any]) -> str:
    baseline = text(report.get("baseline"))
    return (
        '<p class="note">Validation loss in nats per token, mean ± standard deviation over seeds. '
        f"<em>Against {baseline}</em>: the difference, taken seed by seed; a side is named only if zero lies outside "
        "its 95 % interval (Student’s t). "
        f"<em>Tokens needed</em> to reach {baseline}’s final loss and stay there, as a share of the tokens that "
        f"{baseline} needed.</p>"
    )


def _curve_caption(report: dict[str, Any], figure: Figure) -> str:
    several = any(len(arm["seeds"]) > 1 for arm in report["summary"])
    lines = "Thick: mean over seeds; faint: each seed. " if several else ""
    target = f"Dotted: {report.get('baseline')}’s final loss. " if wording.baseline_summary(report) else ""
    start = "A double click shows the steep start." if hides_points(figure) else ""
    return f"{lines}{target}{start}".strip()


def _plot(report: dict[str, Any], key: str, identifier: str, title: str, caption: str, figure: Figure) -> str:
    arms = [(arm["name"], arm[key]) for arm in report["summary"] if arm[key] is not None]
    ends = "; ".join(f"{name} {wording.estimate(loss['final'])} ({_side(loss)})" for name, loss in arms)
    label = f"{title} over training tokens, line plot. At the end: {ends}. All points are in curves.csv."
    missing = "<noscript>The plots need JavaScript; their points are in curves.csv.</noscript>"
    return (
        f"<figure><h3>{text(title)}</h3>{_legend(report, identifier, figure)}"
        f'<div class="plot" id="{identifier}" role="img" aria-label="{text(label)}">'
        f"{missing}</div><figcaption>{text(caption)}</figcaption></figure>"
    )


def _legend(report: dict[str, Any], identifier: str, figure: Figure) -> str:
    """A button per arm that hides and shows it; Plotly's own legend would take its room from the plot."""
    drawn = {trace["meta"] for trace in figure["data"]}
    items = "".join(
        f'<li><button type="button" aria-pressed="true" data-plot="{identifier}" data-arm="{style.index}">'
        f'<span class="line" style="border-top:2px {CSS_DASHES[style.dash]} {style.colour}"></span>{text(name)}'
        "</button></li>"
        for name, style in arm_styles(report).items()
        if style.index in drawn
    )
    return f'<ul class="legend" aria-label="Arms shown">{items}</ul>'


def _side(loss: dict[str, Any]) -> str:
    if loss["verdict"] == "baseline":
        return "baseline"
    return f"{wording.estimate(loss['difference'], signed=True)}, {VERDICT_WORDS[loss['verdict']]}"


def _run_section(report: dict[str, Any]) -> str:
    config = definition_list("Configuration", report.get("config", {}))
    versions = definition_list("Versions", report.get("versions", {}))
    machine = definition_list("Machine", report.get("machine", {}))
    return (
        '<section aria-labelledby="run"><h2 id="run">What was run</h2>'
        f"<pre><code>{text(report.get('command', NOTHING))}</code></pre>"
        f'<div class="run"><div>{config}</div><div>{versions}{machine}</div></div>'
        f'<p class="note">Written {text(report.get("created", NOTHING))}. '
        "The numbers are in report.json and curves.csv.</p></section>"
    )
