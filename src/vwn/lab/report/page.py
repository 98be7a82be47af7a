"""The report as one self-contained HTML page: no request leaves it, and its content policy forbids any."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from vwn.lab.analysis import wording
from vwn.lab.analysis.wording import LOSS_NAMES, NOTHING, PERCENT, VERDICT_WORDS
from vwn.lab.report import tables
from vwn.lab.report.draw_plotly import plotly_figure
from vwn.lab.report.figures import Figure, Series
from vwn.lab.report.page_assets import SCRIPT, STYLE
from vwn.lab.report.tables import text
from vwn.lab.report.verdicts import Verdict, verdicts

CONTENT_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)
CSS_DASHES = {"solid": "solid", "dash": "dashed", "dot": "dotted"}
SWEEP = "sweep"


def render_page(report: dict[str, Any], figures: Sequence[Figure]) -> str:
    """The HTML text of an analysed report (`add_analysis`) and its figures; every string from the report is escaped."""
    # 4.8 MB of script that only this page needs.
    from plotly.offline import get_plotlyjs

    title = text(f"Virtual width against {report.get('baseline')}")
    question = f'<p class="question">{text(report["question"])}</p>' if report.get("question") else ""
    specifications = {figure.identifier: plotly_figure(figure) for figure in figures}
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>",
            f'<header><h1>{title}</h1>\n{question}<p class="facts">{text(_facts(report))}</p>',
            f'<p class="headline">{_prose(wording.headline(report))}</p></header>',
            _verdict_section(verdicts(report)),
            *[_loss_section(report, key, figures) for key in LOSS_NAMES if is_measured(report, key)],
            _cautions(report),
            _section("arms", "Arms and their cost", tables.cost_table(report)),
            _sweep_section(report, figures),
            _pairwise_section(report),
            _equal_cost_section(report),
            _run_section(report),
            "</main>",
            f'<script type="application/json" id="figures">{_json_for_script(specifications)}</script>',
            f"<script>{get_plotlyjs()}</script>\n<script>{SCRIPT}</script>\n</body>\n</html>\n",
        ]
    )


def is_measured(report: dict[str, Any], key: str) -> bool:
    """Whether any arm has this loss."""
    return any(arm[key] is not None for arm in report["summary"])


def _json_for_script(value: Any) -> str:
    # "<" could close the script element or open a comment in it.
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


def _facts(report: dict[str, Any]) -> str:
    config = report.get("config", {})
    budget = max((run["curve"][-1]["tokens"] for run in report["arms"] if run["curve"]), default=None)
    facts = [f"study {report['study']}"] if report.get("study") else []
    facts += [config[field] for field in ("backbone", "data") if isinstance(config.get(field), str)]
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


def _verdict_section(found: list[Verdict]) -> str:
    items = "".join(f"<li>{_verdict(verdict)}</li>" for verdict in found)
    if not items:
        return ""
    return _section("verdicts", "Verdicts", f'<ul class="verdicts">{items}</ul>')


def _verdict(verdict: Verdict) -> str:
    heading = f'<h3>{_prose(verdict.title)} <span class="word {verdict.side}">{text(verdict.word)}</span></h3>'
    note = f'<p class="note">{_prose(verdict.note)}</p>' if verdict.note else ""
    arms = "".join(
        f"<li><b>{text(name)}</b> {text(word)}<ul>{''.join(f'<li>{_prose(part)}</li>' for part in parts)}</ul></li>"
        for name, word, parts in verdict.arms
    )
    every = f'<details><summary>Every arm</summary><ul class="arms">{arms}</ul></details>' if arms else ""
    return f"{heading}<p>{_prose(verdict.text)}</p>{note}{every}"


def _prose(sentence: str) -> str:
    """With true minus signs, and no line broken before a percent sign."""
    return text(re.sub(r"(?<=[ (])-(?=\d)", "−", sentence).replace(" %", PERCENT))


def _loss_section(report: dict[str, Any], key: str, figures: Sequence[Figure]) -> str:
    name = LOSS_NAMES[key]
    own = [figure for figure in figures if figure.key == key and figure.name != SWEEP]
    note = _result_note(report) if key == "loss" else ""
    every = f"<details><summary>Every run</summary>{tables.run_table(report, key)}</details>"
    body = f"{tables.result_table(report, key)}{note}{_plots(report, own)}{every}"
    return _section(key, name.capitalize(), body)


def _result_note(report: dict[str, Any]) -> str:
    baseline = text(report.get("baseline"))
    return (
        '<p class="note">Validation loss in nats per token, mean ± standard deviation over seeds. '
        f"<em>Against {baseline}</em>: the difference, taken seed by seed; a side is named only if zero lies outside "
        "its 95 % interval (Student’s t). "
        f"<em>Tokens needed</em> to reach {baseline}’s final loss and stay there, as a share of the tokens that "
        f"{baseline} needed.</p>"
    )


def _plots(report: dict[str, Any], figures: Sequence[Figure]) -> str:
    shown = "".join(_plot(report, figure) for figure in figures)
    single = " single" if len(figures) == 1 else ""
    return f'<div class="plots{single}">{shown}</div>' if shown else ""


def _plot(report: dict[str, Any], figure: Figure) -> str:
    arms = [(arm["name"], arm[figure.key]) for arm in report["summary"] if arm[figure.key] is not None]
    ends = "; ".join(f"{name} {wording.estimate(loss['final'])} ({_side(loss)})" for name, loss in arms)
    label = f"{figure.title}, plot. At the end of training: {ends}. All points are in curves.csv."
    missing = "<noscript>The plots need JavaScript; they are in the folder figures too.</noscript>"
    return (
        f"<figure><h3>{text(figure.title)}</h3>{_legend(figure)}"
        f'<div class="plot" id="{figure.identifier}" role="img" aria-label="{text(label)}">'
        f"{missing}</div><figcaption>{text(figure.caption)}</figcaption></figure>"
    )


def _legend(figure: Figure) -> str:
    """A button per arm that hides and shows it; Plotly's own legend would take its room from the plot."""
    items = "".join(
        f'<li><button type="button" aria-pressed="true" data-plot="{figure.identifier}" data-arm="{index}">'
        f"{_key(series)}{text(series.name)}</button></li>"
        for index, series in sorted(figure.legend.items())
    )
    return f'<ul class="legend" aria-label="Shown">{items}</ul>'


def _key(series: Series) -> str:
    return f'<span class="line" style="border-top:2px {CSS_DASHES[series.style.dash]} {series.style.css}"></span>'


def _side(loss: dict[str, Any]) -> str:
    if loss["verdict"] == "baseline":
        return "baseline"
    return f"{wording.estimate(loss['difference'], signed=True)}, {VERDICT_WORDS[loss['verdict']]}"


def _sweep_section(report: dict[str, Any], figures: Sequence[Figure]) -> str:
    if not report.get("sweep"):
        return ""
    swept = next((entry for entry in report["sweep"] if entry["rates"]), None)
    note = "The rates were given; none was swept."
    if swept is not None:
        note = (
            f"Runs of {swept['steps']:,} steps with seed {swept['seed']}, which no measured run has, judged by the "
            "loss that was trained on (next-token loss; with multi-token prediction plus λ times the next-2-token "
            "loss), on the validation text that the results are measured on, in nats per token. Bracketed: a lower "
            "and a higher rate were tried, and both are worse."
        )
    plots = _plots(report, [figure for figure in figures if figure.name == SWEEP])
    body = f'{tables.sweep_table(report)}<p class="note">{text(note)}</p>{plots}'
    return _section("rates", "Learning rates", body)


def _pairwise_section(report: dict[str, Any]) -> str:
    """Of two arms the results say it already."""
    if len(report["summary"]) < 3:
        return ""
    shown = []
    for key, name in LOSS_NAMES.items():
        if report["pairwise"][key]:
            shown.append(f"<h3>{name.capitalize()}</h3>{tables.pairwise_table(report, key)}")
    note = (
        "Final loss of the row’s arm minus the column’s in nats per token, paired by seed; each pair is judged alone "
        "at 95 %, uncorrected for their number."
    )
    return _section("pairwise", "Every arm against every other", f'<p class="note">{note}</p>{"".join(shown)}')


def _equal_cost_section(report: dict[str, Any]) -> str:
    if wording.baseline_summary(report) is None or len(report["summary"]) < 2:
        return ""
    shown = [
        f"<h3>{LOSS_NAMES[key].capitalize()}</h3>{tables.equal_cost_table(report, key)}"
        for key in LOSS_NAMES
        if any(arm[key] is not None and arm[key]["difference"]["n"] for arm in report["summary"])
    ]
    note = (
        f"Loss minus {report.get('baseline')}’s in nats per token where the run that spent less ended. The other run "
        "is read there before its learning rate has decayed, which makes it look worse than a run planned for that "
        "budget: the share of its tokens is named."
    )
    return _section("equal", "At equal tokens, FLOPs and time", f'<p class="note">{text(note)}</p>{"".join(shown)}')


def _run_section(report: dict[str, Any]) -> str:
    config = tables.definition_list("Configuration", report.get("config", {}))
    versions = tables.definition_list("Versions", report.get("versions", {}))
    machine = tables.definition_list("Machine", report.get("machine", {}))
    commands = [report.get("command", NOTHING), *(part["command"] for part in report.get("continued") or [])]
    shown = "\n".join(dict.fromkeys(commands))
    body = (
        f"<pre><code>{text(shown)}</code></pre>"
        f'<div class="run"><div>{config}</div><div>{versions}{machine}</div></div>'
        f'<p class="note">Written {text(report.get("created", NOTHING))}. '
        "The numbers are in report.json and curves.csv, the figures as PNG and SVG in the folder figures.</p>"
    )
    return _section("run", "What was run", body)


def _section(identifier: str, title: str, body: str) -> str:
    """`title` and `body` are ready HTML."""
    return f'<section aria-labelledby="{identifier}"><h2 id="{identifier}">{title}</h2>{body}</section>'
