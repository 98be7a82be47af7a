"""The first lines of a report: what the best arm gained, over budgets and beside recorded runs; and caveats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vwn.common.errors import UserError
from vwn.lab.analysis import wording
from vwn.lab.analysis.budgets import BudgetStudy, Measured
from vwn.lab.analysis.compute import is_uneven
from vwn.lab.analysis.estimates import Estimate
from vwn.lab.analysis.paired import differences
from vwn.lab.analysis.runs import LOSS_KEYS, baseline_by_seed, judged_points, runs_by_arm, with_judged_points
from vwn.lab.analysis.wording import LOSS_NAMES, PERCENT, PLUS_MINUS, budget

Summary = dict[str, Any]


def baseline_summary(report: dict[str, Any]) -> Summary | None:
    """Return the baseline's entry in an analysed report's summary, or None if it was not run."""
    return next((arm for arm in report["summary"] if arm["is_baseline"]), None)


def lead_arm(report: dict[str, Any]) -> Summary | None:
    """Choose the arm of the first lines: the lowest next-token loss, significantly lower ones first; or None."""
    judged = [a for a in report["summary"] if not a["is_baseline"] and a["loss"]["difference"]["mean"] is not None]
    return min(
        judged, key=lambda arm: (arm["loss"]["verdict"] != "lower", arm["loss"]["difference"]["mean"]), default=None
    )


def first_lines(report: dict[str, Any], studies: dict[str, BudgetStudy]) -> list[str]:
    """Return the sentences that the report begins with and the terminal ends with."""
    gained = budget_sentence(report, studies)
    found = [gained or headline(report), recorded_sentence(report)]
    found += [budget_explanation(report, study) for study in list(studies.values())[:1] if gained]
    return [sentence for sentence in found if sentence]


def headline(report: dict[str, Any]) -> str:
    """Say in one sentence on an analysed report: what was gained in both losses, or why nothing can be said."""
    name, lead = report.get("baseline"), lead_arm(report)
    arms = [arm for arm in report["summary"] if not arm["is_baseline"]]
    if baseline_summary(report) is None:
        return f"The baseline {name} was not run, so there is nothing to compare with."
    if not arms:
        return f"Only the baseline {name} was run, so there is nothing to compare."
    if lead is None:
        return " ".join(f"{arm['name']} cannot be compared with {name}: {arm['loss']['reason']}." for arm in arms)
    clauses = [_clause(lead[key], str(name), key) for key in LOSS_NAMES if _has_difference(lead[key])]
    seeds = lead["loss"]["difference"]["n"]
    best = f", the best of {len(arms)} arms," if len(arms) > 1 else ""
    runs = "in one seed" if seeds == 1 else f"over {seeds} seeds"
    return f"{lead['name']}{best} ended {' and '.join(clauses)}, {runs}."


def read_recorded(path: Path) -> dict[str, Any]:
    """Return what `report["recorded"]` holds, from an earlier comparison's folder or report.json: see `recorded_runs`.

    Raises:
        UserError: the file cannot be read or holds no report.
    """
    path = path / "report.json" if path.is_dir() else path
    try:
        return recorded_runs(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"--recorded: {path} holds no comparison ({error!r}); give a folder with a report.json"
        ) from error


def recorded_runs(report: dict[str, Any]) -> dict[str, Any]:
    """Summarise a report: {"tokens": the budget, "arms": {name: {"loss": [one per seed], "loss_2": [...]}}}."""
    report, arms = {**report, "arms": with_judged_points(report["arms"])}, {}
    references = baseline_by_seed(report)
    for name, runs in runs_by_arm(report).items():
        if name != report.get("baseline"):
            arms[name] = {key: differences(runs, list(references.values()), key)[0] for key in LOSS_KEYS}
    return {"tokens": _budget(report), "arms": arms}


def recorded(report: dict[str, Any], name: str, key: str) -> list[float]:
    """Return the recorded differences of an arm of the same budget; empty if there are none."""
    known = report.get("recorded") or {}
    return known.get("arms", {}).get(name, {}).get(key, []) if known.get("tokens") == _budget(report) else []


def recorded_sentence(report: dict[str, Any]) -> str:
    """Say how the lead compares with the recorded runs of its name; empty if there are none."""
    lead = lead_arm(report)
    known = {} if lead is None else {key: recorded(report, lead["name"], key) for key in LOSS_NAMES}
    clauses, within, count = [], True, 0
    for key, values in known.items():
        if lead is not None and values and _has_difference(lead[key]):
            found, count = Estimate.over(values), len(values)
            word = "significant" if found.sign() else "not significant"
            clauses.append(f"{wording.estimate(found.described(), signed=True)} in {LOSS_NAMES[key]} ({word})")
            within = within and min(values) <= lead[key]["difference"]["mean"] <= max(values)
    if not clauses:
        return ""
    runs = "One recorded run has" if count == 1 else f"{count} recorded runs have"
    return f"{runs} {' and '.join(clauses)}; this result is {'within' if within else 'outside'} their range."


def budget_sentence(report: dict[str, Any], studies: dict[str, BudgetStudy]) -> str:
    """Say how many times fewer tokens the best arm needs for the baseline's losses, at the last budget of most seeds.

    Only losses in which it is significant, or of one seed; empty without it in next-token loss.
    """
    lead, clauses = lead_arm(report), list[str]()
    if lead is None or "loss" not in studies:
        return ""
    factors = {key: study.tokens_factors.get(lead["name"], {}) for key, study in studies.items()}
    known = factors["loss"]
    last = max(known, key=lambda tokens: (known[tokens].over_seeds.n, tokens), default=0)
    for key, of_loss in factors.items():
        found = of_loss.get(last)
        if found and found.over_seeds.mean is not None and min(found.bounds or found.by_seed.values()) > 1:
            clauses.append(f"{_factor(found)} fewer{'' if clauses else ' tokens'} in {LOSS_NAMES[key]}")
        elif key == "loss":
            return ""
    at = f"{budget(last)} tokens ({wording.seeds_text(known[last].over_seeds.n)})"
    return f"{lead['name']} reaches {report.get('baseline')}’s losses at {at} with {wording.listed(clauses)}."


def budget_explanation(report: dict[str, Any], study: BudgetStudy) -> str:
    """Say why the tokens saved grow with the budget, by the first and the last slope; empty without a slope."""
    first, last = study.baseline[0], study.baseline[-1]
    if first.slope is None or last.slope is None:
        return ""
    return (
        f"The flatter the curves, the more tokens a gap saves: {report.get('baseline')}’s decayed loss falls by "
        f"{first.slope:.3f} nats per e-fold of tokens at {budget(first.tokens)} and by {last.slope:.3f} at "
        f"{budget(last.tokens)}."
    )


def cautions(report: dict[str, Any]) -> list[str]:
    """Return what a reader must know before trusting the numbers of an analysed report, one sentence each."""
    found = []
    for key, loss in LOSS_NAMES.items():
        for arm in report["summary"]:
            if arm[key] and arm[key]["diverged_seeds"]:
                seeds = wording.listed(map(str, arm[key]["diverged_seeds"]))
                found.append(f"{arm['name']}: the final {loss} is not finite in seed {seeds}, so there is no mean.")
    if any(arm["loss"]["difference"]["n"] == 1 for arm in report["summary"] if not arm["is_baseline"]):
        found.append("One seed gives no interval: another seed could differ by more than the arms do.")
    statuses = [(run["name"], run["paired"]["loss"]["status"]) for run in report["arms"]]
    unpaired = dict.fromkeys(name for name, status in statuses if status in ("no baseline", "different budgets"))
    if unpaired and baseline_summary(report):
        found.append(
            f"{wording.listed(unpaired)}: the differences leave out seeds that {report['baseline']} was not trained "
            "with, or to another token count."
        )
    known = report.get("recorded")
    if known and known.get("tokens") != _budget(report):
        found.append(f"The recorded runs have {wording.scaled(known.get('tokens'))} tokens each and are not compared.")
    edge = [entry["arm"] for entry in report.get("sweep") or [] if entry["rates"] and not entry["bracketed"]]
    if edge:
        found.append(
            f"{wording.listed(edge)}: the best learning rate lies at the edge of those tried; a better one may lie "
            "beyond."
        )
    uneven = dict.fromkeys(run["name"] for run in report["arms"] if is_uneven(run))
    if uneven:
        found.append(f"{wording.listed(uneven)}: the speed was uneven, so times and speeds are rough.")
    slow = dict.fromkeys(  # whose connections run in plain PyTorch
        run["name"]
        for run in report["arms"]
        if run.get("connection") in ("hc", "mhc") or "doubly_stochastic" in run.get("options", {}).values()
    )
    if slow:
        found.append(
            f"{wording.listed(slow)}: these run in plain PyTorch and virtual width on kernels, so speeds compare "
            "implementations. Sinkhorn’s scaling is not counted in the FLOPs."
        )
    parts = [report, *(report.get("continued") or [])]
    if any(part.get(name) != report.get(name) for part in parts for name in ("versions", "machine")):
        found.append("The comparison was continued with other versions or on another machine; see each run.json.")
    return found


def _clause(loss: Summary, baseline: str, key: str) -> str:
    difference = loss["difference"]
    distance = wording.estimate({**difference, "mean": abs(difference["mean"])})
    side = "below" if difference["mean"] < 0 else "above"
    nats, against = (" nats per token", f" {baseline}") if key == "loss" else ("", "")
    notes = [_fewer_tokens(loss, baseline, " for the same loss" if key == "loss" else "")]
    notes += ["not significant"] if loss["verdict"] == "undecided" and difference["n"] > 1 else []
    noted = "; ".join(note for note in notes if note)
    return f"{distance}{nats} {side}{against} in {LOSS_NAMES[key]}{f' ({noted})' if noted else ''}"


def _fewer_tokens(loss: Summary, baseline: str, ending: str) -> str:
    share = loss["tokens_fraction"]
    if loss["tokens_pairs"] == 0:
        return ""
    if share["mean"] is None:
        seeds = "" if share["n"] == 0 else f" in {loss['tokens_pairs'] - share['n']} of {loss['tokens_pairs']} seeds"
        return f"{baseline}’s final loss not reached{seeds}"
    saved = 100 * (1 - share["mean"])
    if round(saved) == 0:
        return f"as many tokens{ending}"
    bound = "at least " if loss["tokens_at_most"] else ""
    spread = f"{PLUS_MINUS}{100 * share['std']:.0f}" if share["std"] and round(100 * share["std"]) else ""
    return f"{bound}{abs(saved):.0f}{spread}{PERCENT} {'fewer' if saved > 0 else 'more'} tokens{ending}"


def _factor(speedup: Measured) -> str:
    notes = [f"{speedup.bounds[0]:.2f} to {speedup.bounds[1]:.2f}"] if speedup.bounds else []
    notes += ["extrapolated"] if speedup.extrapolated else []
    factor = f"{speedup.over_seeds.mean:.2f}×"
    return f"{factor} ({', '.join(notes)})" if notes else factor


def _has_difference(loss: Summary | None) -> bool:
    return loss is not None and loss["difference"]["mean"] is not None


def _budget(report: dict[str, Any]) -> int | None:
    return max((judged_points(run)[-1]["tokens"] for run in report["arms"] if judged_points(run)), default=None)
