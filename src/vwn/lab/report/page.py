"""The report as one self-contained HTML page without scripts: no request leaves it, and its policy forbids any."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from vwn.lab.analysis import story, wording
from vwn.lab.analysis.budgets import BudgetStudy, budget_studies
from vwn.lab.analysis.verdicts import CONTRADICTED, SUPPORTED, Verdict, verdicts
from vwn.lab.analysis.wording import LOSS_NAMES, NOTHING, PERCENT
from vwn.lab.report import tables
from vwn.lab.report.colours import DARK, LIGHT
from vwn.lab.report.draw import inline
from vwn.lab.report.figures import Figure
from vwn.lab.report.tables import Table

CONTENT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
)
SIDES = {SUPPORTED: "for", CONTRADICTED: "against"}
# Arms whose text samples stand beside each other at the top.
MOST_SAMPLES = 4

Drawn = Mapping[str, tuple[Figure, str]]
"""Figures with their SVG, by identifier."""


@dataclass(frozen=True)
class Section:
    """One section of the page."""

    id: str
    title: str
    note: str = ""
    tables: tuple[Table, ...] = ()
    figures: tuple[dict[str, str], ...] = ()
    more: Table | None = None
    """Behind a disclosure."""


def style_sheet() -> str:
    """The style sheet of the page with the colours of both modes."""
    light, dark = (" ".join(f"--{name}: {colour};" for name, colour in mode.items()) for mode in (LIGHT, DARK))
    modes = (
        f":root {{ color-scheme: light dark; {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
    )
    return modes + files(__package__).joinpath("style.css").read_text(encoding="utf-8")


def render_page(report: dict[str, Any], drawn: Drawn) -> str:
    """The HTML text of an analysed report (`add_analysis`) and its figures; every string from the report is escaped."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["prose"] = prose
    template = environment.from_string(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    studies = budget_studies(report)
    leads = lead_figures(drawn)
    commands = [report.get("command", NOTHING), *(part["command"] for part in report.get("continued") or [])]
    return template.render(
        title=f"Virtual width against {report.get('baseline')}",
        policy=CONTENT_POLICY,
        style=style_sheet(),
        question=report.get("question"),
        facts=_facts(report),
        first_lines=first_lines(report, studies),
        lead_figures=_figures(drawn, leads),
        samples=_samples(report),
        details=story.details(report),
        verdicts=[_verdict(found) for found in verdicts(report)],
        cautions=story.cautions(report),
        sections=[section for section in _sections(report, drawn, studies, leads) if section is not None],
        commands="\n".join(dict.fromkeys(commands)),
        config=tables.settings(report.get("config", {})),
        versions=tables.settings(report.get("versions", {})),
        machine=tables.settings(report.get("machine", {})),
        created=report.get("created", NOTHING),
    )


def first_lines(report: dict[str, Any], studies: dict[str, BudgetStudy]) -> list[str]:
    """The sentences that the report begins with and the terminal ends with."""
    gained = story.budget_sentence(report, studies)
    found = [gained or story.headline(report), story.recorded_sentence(report)]
    found += [story.budget_explanation(report, study) for study in list(studies.values())[:1] if gained]
    return [sentence for sentence in found if sentence]


def lead_figures(drawn: Drawn) -> list[str]:
    """The identifiers of the figures of the first lines: the budgets, or the loss, and what was recorded."""
    budgets = [name for name in ("speedup-over-budget", "speedup-over-budget-2") if name in drawn]
    first = budgets or ["fewer-tokens" if "fewer-tokens" in drawn else "loss-over-tokens"]
    return [name for name in (*first, "gain-over-seeds") if name in drawn]


def is_measured(report: dict[str, Any], key: str) -> bool:
    """Whether any arm has this loss."""
    return any(arm[key] is not None for arm in report["summary"])


def prose(sentence: str) -> str:
    """With true minus signs, and no line broken before a percent sign."""
    return re.sub(r"(?<!\w)-(?=\d)", "−", str(sentence)).replace(" %", PERCENT)


def _facts(report: dict[str, Any]) -> str:
    config = report.get("config", {})
    budget = max(
        (point["tokens"] for run in report["arms"] for point in (run.get("decayed") or run["curve"])), default=None
    )
    facts = [f"study {report['study']}"] if report.get("study") else []
    facts += [config[field] for field in ("backbone", "data") if isinstance(config.get(field), str)]
    facts.append(wording.seeds_text(len({run["seed"] for run in report["arms"]})))
    if budget is not None:
        facts.append(f"{wording.scaled(budget)} tokens per run")
    if report.get("created"):
        facts.append(str(report["created"])[:10])
    return " · ".join(facts)


def _samples(report: dict[str, Any]) -> list[tuple[str, str]]:
    """A text that each arm generated, of the first seed that has one."""
    found: dict[str, str] = {}
    for run in report["arms"]:
        if run.get("sample"):
            found.setdefault(run["name"], run["sample"])
    return list(found.items())[:MOST_SAMPLES]


def _verdict(verdict: Verdict) -> dict[str, Any]:
    table = Table(verdict.title, verdict.heads, tuple(map(tables.cells, verdict.rows)))
    side = SIDES.get(verdict.word, "open")
    return {"title": verdict.title, "word": verdict.word, "side": side, "table": table, "rule": verdict.rule}


def _figures(drawn: Drawn, names: list[str]) -> tuple[dict[str, str], ...]:
    found = []
    for name in names:
        figure, svg = drawn[name]
        label = f"{figure.title}. All points are in curves.csv."
        found.append({"title": figure.title, "caption": figure.caption, "svg": inline(svg, name, label)})
    return tuple(found)


def _sections(
    report: dict[str, Any], drawn: Drawn, studies: dict[str, BudgetStudy], leads: list[str]
) -> list[Section | None]:
    rest = [name for name in drawn if name not in (*leads, "fewer-tokens", "sweep")]
    losses = [
        Section(
            *(key, name.capitalize(), _result_note(report) if key == "loss" else ""),
            tables=(tables.result_table(report, key),),
            figures=_figures(drawn, [figure for figure in rest if drawn[figure][0].key == key]),
            more=tables.run_table(report, key),
        )
        for key, name in LOSS_NAMES.items()
        if is_measured(report, key)
    ]
    return [
        _budget_section(report, studies),
        *losses,
        Section("arms", "Arms and their cost", tables=(tables.cost_table(report),)),
        _sweep_section(report, drawn),
        _pairwise_section(report),
        _equal_cost_section(report),
    ]


def _result_note(report: dict[str, Any]) -> str:
    baseline = report.get("baseline")
    return (
        f"Validation loss in nats per token, mean ± standard deviation over seeds. The difference to {baseline} is "
        "paired by seed; it is significant if its 95 % interval (Student’s t) excludes zero. Tokens needed: the share "
        f"of {baseline}’s tokens after which the loss stays at or below {baseline}’s final loss."
    ) + (" The losses are the decayed ones at the budgets that every run has." if report["budgets"] else "")


def _budget_section(report: dict[str, Any], studies: dict[str, BudgetStudy]) -> Section | None:
    if not studies:
        return None
    shown = [tables.budget_table(report, studies, key) for key in studies]
    shown += [tables.budget_width_table(studies, key) for key in studies if len(studies[key].widths)]
    baseline = report.get("baseline")
    note = (
        "Each budget is a cool-down branched off one run at a constant rate. Gap: decayed loss minus "
        f"{baseline}’s in nats per token, with its 95 % interval over seeds. Slope: fall of {baseline}’s decayed loss "
        f"per e-fold of tokens. Speed-up: the cost {baseline} needs for the arm’s decayed loss, over the arm’s cost. "
        "Extrapolated numbers come from the fit E + B·T^−β."
    )
    return Section("budgets", "Over training budgets", note, tuple(shown))


def _sweep_section(report: dict[str, Any], drawn: Drawn) -> Section | None:
    if not report.get("sweep"):
        return None
    swept = next((entry for entry in report["sweep"] if entry["rates"]), None)
    note = "No learning rate was swept: they were given or are those of the preset."
    if swept is not None:
        note = (
            f"Runs of {swept['steps']:,} steps with seed {swept['seed']}, which no measured run has. The criterion is "
            "the loss that was trained on (next-token loss; with multi-token prediction plus λ times the next-2-token "
            "loss) on the validation text of the results, in nats per token. Bracketed: a lower and a higher rate were "
            "tried, and both are worse."
        )
    figures = _figures(drawn, [name for name in drawn if name == "sweep"])
    return Section("rates", "Learning rates", note, (tables.sweep_table(report),), figures)


def _pairwise_section(report: dict[str, Any]) -> Section | None:
    """Nothing for two arms: the results say it already."""
    if len(report["summary"]) < 3:
        return None
    note = (
        "Final loss of the row’s arm minus the column’s in nats per token, paired by seed. Each pair is judged alone "
        "at 95 %, uncorrected for their number."
    )
    shown = tuple(tables.pairwise_table(report, key) for key in LOSS_NAMES if report["pairwise"][key])
    return Section("pairwise", "Every arm against every other", note, shown)


def _equal_cost_section(report: dict[str, Any]) -> Section | None:
    if story.baseline_summary(report) is None or len(report["summary"]) < 2 or report["budgets"]:
        return None
    shown = tuple(
        tables.equal_cost_table(report, key)
        for key in LOSS_NAMES
        if any(arm[key] is not None and arm[key]["difference"]["n"] for arm in report["summary"])
    )
    note = (
        f"Loss minus {report.get('baseline')}’s in nats per token where the run that spent less ended. The other run "
        "is read before its learning rate has decayed, which makes it look worse than a run planned for that budget; "
        "the share of its tokens is named."
    )
    return Section("equal", "At equal tokens, FLOPs and time", note, shown)
