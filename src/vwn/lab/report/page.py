"""The report as one self-contained HTML page without scripts: no request leaves it, and its policy forbids any."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from vwn.lab.analysis import story, wording
from vwn.lab.analysis.budgets import BudgetStudy, budget_studies
from vwn.lab.analysis.runs import measured_losses
from vwn.lab.analysis.wording import LOSS_NAMES, NOTHING, PERCENT
from vwn.lab.report import tables
from vwn.lab.report.colours import DARK, LIGHT
from vwn.lab.report.draw import Figure, inline
from vwn.lab.report.tables import Table

CONTENT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
)
# Arms whose text samples stand beside each other at the top.
MOST_SAMPLES = 4

RESULTS = (
    "Validation loss in nats per token, mean ± standard deviation over seeds. The difference to {baseline} is paired "
    "by seed; it is significant if its 95 % interval (Student’s t) excludes zero. Tokens needed: the share of "
    "{baseline}’s tokens after which the loss stays at or below {baseline}’s final loss."
)
DECAYED = " The losses are the decayed ones at the budgets that every run has."
BUDGETS = (
    "Each budget is a cool-down branched off one run at a constant rate. Gap: decayed loss minus {baseline}’s in nats "
    "per token. Slope: fall of {baseline}’s decayed loss per e-fold of tokens. Fewer tokens: {baseline}’s "
    "tokens over those after which the arm has the same decayed loss, as the paper counts; seeds with smaller budgets "
    "count where all come to that loss. Speed-up: the cost {baseline} needs for the arm’s decayed loss, over the arm’s "
    "cost. In brackets: the 95 % interval over three seeds "
    "or more, the range of two. Extrapolated numbers come from the fit E + B·T^−β, and are rough far beyond the "
    "budgets. After ≥ stands what every seed reaches without extrapolation."
)
SWEPT = (
    "Runs of {steps:,} steps with seed {seed}, which no measured run has. The criterion is the loss that was trained "
    "on (next-token loss; with multi-token prediction plus λ times the next-2-token loss) on the validation text of "
    "the results, in nats per token. Bracketed: a lower and a higher rate were tried, and both are worse."
)
PAIRWISE = (
    "Final loss of the row’s arm minus the column’s in nats per token, paired by seed. Each pair is judged alone at "
    "95 %, uncorrected for their number."
)
EQUAL_COST = (
    "Loss minus {baseline}’s in nats per token where the run that spent less ended. The other run is read before its "
    "learning rate has decayed, which makes it look worse than a run planned for that budget; the share of its tokens "
    "is named."
)

Drawn = Mapping[str, Figure]
"""Figures by identifier."""


@dataclass(frozen=True)
class Section:
    """One section of the page."""

    id: str
    title: str
    note: str = ""
    tables: tuple[Table, ...] = ()
    figures: tuple[dict[str, str], ...] = ()


def style_sheet() -> str:
    """Return the style sheet of the page with the colours of both modes."""
    light, dark = (" ".join(f"--{name}: {colour};" for name, colour in mode.items()) for mode in (LIGHT, DARK))
    modes = (
        f":root {{ color-scheme: light dark; {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
    )
    return modes + files(__package__).joinpath("style.css").read_text(encoding="utf-8")


def render_page(report: dict[str, Any], drawn: Drawn) -> str:
    """Render an analysed report (`add_analysis`) and its figures; every string from the report is escaped."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["prose"] = prose
    template = environment.from_string(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    studies = budget_studies(report)
    budgets = [name for name in ("speedup-over-budget", "speedup-over-budget-2") if name in drawn]
    curves = [name for name in ("fewer-tokens", "loss-over-tokens") if name in drawn][:1]
    leads = budgets or curves or [name for name in ("gain", "gain-2") if name in drawn]
    commands = [report.get("command", NOTHING), *(part["command"] for part in report.get("continued") or [])]
    return template.render(
        title=f"Virtual width against {report.get('baseline')}",
        policy=CONTENT_POLICY,
        style=style_sheet(),
        question=report.get("question"),
        facts=_facts(report),
        first_lines=story.first_lines(report, studies),
        lead_figures=_figures(drawn, leads),
        samples=_samples(report),
        cautions=story.cautions(report),
        sections=_sections(report, drawn, studies, leads),
        commands="\n".join(dict.fromkeys(commands)),
        config=tables.settings(report.get("config", {})),
        versions=tables.settings(report.get("versions", {})),
        machine=tables.settings(report.get("machine", {})),
        created=report.get("created", NOTHING),
    )


def prose(sentence: str) -> str:
    """Return text with true minus signs, and no line broken before a percent sign."""
    return re.sub(r"(?<!\w)-(?=\d)", "−", str(sentence)).replace(" %", PERCENT)


def _facts(report: dict[str, Any]) -> str:
    config = report.get("config", {})
    ends = [point[-1]["tokens"] for run in report["arms"] if (point := run.get("decayed") or run["curve"])]
    facts = [f"study {report['study']}"] if report.get("study") else []
    facts += [config[field] for field in ("backbone", "data") if isinstance(config.get(field), str)]
    facts.append(wording.seeds_text(len({run["seed"] for run in report["arms"]})))
    if ends:
        facts.append(f"{'up to ' if min(ends) < max(ends) else ''}{wording.budget(max(ends))} tokens per run")
    if report.get("created"):
        facts.append(str(report["created"])[:10])
    return " · ".join(facts)


def _samples(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a text that each arm generated, of the first seed that has one."""
    found: dict[str, str] = {}
    for run in report["arms"]:
        if run.get("sample"):
            found.setdefault(run["name"], run["sample"])
    return list(found.items())[:MOST_SAMPLES]


def _figures(drawn: Drawn, names: list[str]) -> tuple[dict[str, str], ...]:
    found = []
    for name in names:
        figure = drawn[name]
        svg = inline(figure.svg, name, f"{figure.title}. All points are in report.json and curves.csv.")
        found.append({"title": figure.title, "caption": figure.caption, "svg": svg})
    return tuple(found)


def _sections(report: dict[str, Any], drawn: Drawn, studies: dict[str, BudgetStudy], leads: list[str]) -> list[Section]:
    baseline, found = report.get("baseline"), []
    if any(len(study.baseline) > 1 for study in studies.values()):
        shown = [tables.budget_table(report, studies, key) for key in studies]
        shown += [tables.budget_width_table(studies, key) for key in studies if studies[key].widths]
        found.append(Section("budgets", "Over training budgets", BUDGETS.format(baseline=baseline), tuple(shown)))
    rest = [name for name in drawn if name not in (*leads, "fewer-tokens")]
    measured = measured_losses(report)
    for key in measured:
        note = RESULTS.format(baseline=baseline) + (DECAYED if studies else "") if key == "loss" else ""
        figures = _figures(drawn, [name for name in rest if drawn[name].key == key])
        found.append(Section(key, LOSS_NAMES[key].capitalize(), note, (tables.result_table(report, key),), figures))
    found.append(Section("arms", "Arms and their cost", tables=(tables.cost_table(report),)))
    if swept := next((entry for entry in report.get("sweep") or [] if entry["rates"]), None):
        found.append(Section("rates", "Learning rates", SWEPT.format(**swept), (tables.sweep_table(report),)))
    if len(report["summary"]) > 2:
        pairs = tuple(tables.pairwise_table(report, key) for key in measured)
        found.append(Section("pairwise", "Every arm against every other", PAIRWISE, pairs))
    if story.lead_arm(report) is not None and not studies:
        compared = [
            key for key in measured if any(arm[key] and arm[key]["difference"]["n"] for arm in report["summary"])
        ]
        equal = tuple(tables.equal_cost_table(report, key) for key in compared)
        found.append(Section("equal", "At equal tokens, FLOPs and time", EQUAL_COST.format(baseline=baseline), equal))
    return found
