"""The first lines of a report: what the best arm gained, against recorded runs, over budgets; and what weakens that."""

from __future__ import annotations

from typing import Any

from vwn.lab.analysis import wording
from vwn.lab.analysis.budgets import BudgetPoint, BudgetStudy
from vwn.lab.analysis.compute import is_uneven, speed_ratio
from vwn.lab.analysis.estimates import Estimate
from vwn.lab.analysis.runs import (
    LOSS_KEYS,
    baseline_by_seed,
    has_loss,
    judged_points,
    pair_status,
    read_curve,
    runs_by_arm,
)
from vwn.lab.analysis.wording import LOSS_NAMES, PERCENT, PLUS_MINUS

Summary = dict[str, Any]


def baseline_summary(report: dict[str, Any]) -> Summary | None:
    """The baseline's entry in an analysed report's summary, or None if it was not run."""
    return next((arm for arm in report["summary"] if arm["is_baseline"]), None)


def lead_arm(report: dict[str, Any]) -> Summary | None:
    """The arm that the first lines are about: the lowest next-token loss, significantly lower ones first; or None."""
    judged = [a for a in report["summary"] if not a["is_baseline"] and a["loss"]["difference"]["mean"] is not None]
    return min(
        judged, key=lambda arm: (arm["loss"]["verdict"] != "lower", arm["loss"]["difference"]["mean"]), default=None
    )


def headline(report: dict[str, Any]) -> str:
    """One plain sentence on an analysed report: what was gained in both losses, or why nothing can be said."""
    name, lead = report.get("baseline"), lead_arm(report)
    arms = [arm for arm in report["summary"] if not arm["is_baseline"]]
    if baseline_summary(report) is None:
        return f"The baseline {name} was not run, so there is nothing to compare with."
    if not arms:
        return f"Only the baseline {name} was run, so there is nothing to compare."
    if lead is None:
        return " ".join(f"{arm['name']} cannot be compared: {_reason(arm, report)}." for arm in arms)
    clauses = [_clause(lead[key], str(name), key) for key in LOSS_NAMES if _has_difference(lead[key])]
    seeds = lead["loss"]["difference"]["n"]
    best = f", the best of {len(arms)} arms," if len(arms) > 1 else ""
    runs = "in one seed" if seeds == 1 else f"over {seeds} seeds"
    return f"{lead['name']}{best} ended {' and '.join(clauses)}, {runs}."


def details(report: dict[str, Any]) -> list[str]:
    """Sentences behind the first lines: the other arms and what the best one costs."""
    lead, baseline = lead_arm(report), baseline_summary(report)
    if lead is None or baseline is None:
        return []
    found = []
    others = [arm for arm in report["summary"] if not arm["is_baseline"] and arm is not lead]
    for verdict, word in wording.VERDICT_WORDS.items():
        names = [arm["name"] for arm in others if arm["loss"]["verdict"] == verdict]
        if names:
            found.append(f"{wording.listed(names)} against {baseline['name']} in next-token loss: {word}.")
    costs = [("params", "parameters"), ("flops_per_token", "FLOPs per token")]
    has = [f"{r} the {label}" for field, label in costs if (r := wording.ratio(lead[field], baseline[field]))]
    runs, references = runs_by_arm(report)[lead["name"]], baseline_by_seed(report)
    pairs = [(run, references[run["seed"]]) for run in runs if run["seed"] in references]
    speed = Estimate.over([ratio for run, other in pairs if (ratio := speed_ratio(run, other))]).mean
    if speed is not None:
        has.append(f"{speed:.2f}× the training speed")
    if has:
        found.append(f"{lead['name']} has {wording.listed(has)} of {baseline['name']}.")
    return found


def recorded_runs(report: dict[str, Any]) -> dict[str, Any]:
    """What `report["recorded"]` holds, from the report.json of an earlier comparison.

    {"tokens": the budget, "arms": {name: {"loss": [differences to the baseline, one per seed], "loss_2": [...]}}}.
    """
    references, arms = baseline_by_seed(report), {}
    for name, runs in runs_by_arm(report).items():
        if name != report.get("baseline"):
            arms[name] = {key: _differences(runs, references, key) for key in LOSS_KEYS}
    return {"tokens": _budget(report), "arms": arms}


def recorded(report: dict[str, Any], name: str, key: str) -> list[float]:
    """Recorded differences of an arm of the same budget; empty if there are none."""
    known = report.get("recorded") or {}
    return known.get("arms", {}).get(name, {}).get(key, []) if known.get("tokens") == _budget(report) else []


def recorded_sentence(report: dict[str, Any]) -> str:
    """How the lead compares with the recorded runs of its name; empty if there are none."""
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
    """What the widest arm gained at its largest budget, and at its first; empty without decayed losses."""
    width = {arm["name"]: (arm["r"], -place) for place, arm in enumerate(report["summary"])}
    names = {name for study in studies.values() for name in study.arms}
    if not names:
        return ""
    name, baseline = max(names, key=lambda arm: width[arm]), report.get("baseline")
    found = {
        LOSS_NAMES[key]: {point.tokens: point for point in study.arms.get(name, []) if point.speedup.mean is not None}
        for key, study in studies.items()
    }
    points = {loss: known for loss, known in found.items() if known}
    if not points:
        return f"{name} has no speed-up over {baseline} at any budget."
    budgets = sorted(set.intersection(*map(set, points.values())))
    if not budgets:
        loss, known = next(iter(points.items()))
        points, budgets = {loss: known}, sorted(known)
    first, last = budgets[0], budgets[-1]
    factors = [f"{_speedup(known[last])} the tokens for {name}’s {loss}" for loss, known in points.items()]
    start = wording.listed(_speedup(known[first]) for known in points.values())
    before = f" (at {wording.scaled(first)}: {start})" if first != last else ""
    seeds = wording.seeds_text(next(iter(points.values()))[last].speedup.n)
    return f"At {wording.scaled(last)} tokens {baseline} needs {wording.listed(factors)}{before}, over {seeds}."


def budget_explanation(report: dict[str, Any], study: BudgetStudy) -> str:
    """Why the speed-up changes with the budget, by the slope at the first and the last one; empty without a slope."""
    first, last = study.baseline[0], study.baseline[-1]
    if first.slope is None or last.slope is None:
        return ""
    return (
        f"The speed-up is about exp(gap ÷ slope): a gap saves more tokens where {report.get('baseline')}’s decayed "
        f"loss falls by {last.slope:.3f} nats per e-fold of tokens ({wording.scaled(last.tokens)}) than where it falls "
        f"by {first.slope:.3f} ({wording.scaled(first.tokens)})."
    )


def cautions(report: dict[str, Any]) -> list[str]:
    """What a reader must know before trusting the numbers of an analysed report, one sentence each."""
    found = [
        text
        for key, loss in LOSS_NAMES.items()
        for arm in report["summary"]
        if arm[key]
        for text in _arm_cautions(arm, key, loss, report)
    ]
    return [
        *found,
        *_seed_cautions(report),
        *_rate_cautions(report),
        *_speed_cautions(report),
        *_origin_cautions(report),
    ]


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


def _speedup(point: BudgetPoint) -> str:
    return f"{point.speedup.mean:.2f}×" + (" (extrapolated)" if point.equal["tokens"].speedup_extrapolated else "")


def _has_difference(loss: Summary | None) -> bool:
    return loss is not None and loss["difference"]["mean"] is not None


def _differences(runs: list[Summary], references: dict[int, Summary], key: str) -> list[float]:
    pairs = [(run, references.get(run["seed"])) for run in runs if has_loss(run, key)]
    compared = [(run, other) for run, other in pairs if pair_status(run, other, key) == "compared"]
    finals = [(read_curve(run, key).final_loss, read_curve(other, key).final_loss) for run, other in compared]
    return [own - other for own, other in finals if own is not None and other is not None]


def _budget(report: dict[str, Any]) -> int | None:
    return max((judged_points(run)[-1]["tokens"] for run in report["arms"] if judged_points(run)), default=None)


def _reason(arm: Summary, report: dict[str, Any]) -> str:
    statuses = {run["paired"]["loss"]["status"] for run in report["arms"] if run["name"] == arm["name"]}
    if "diverged" in statuses:
        return f"it or {report['baseline']} ended with a loss that is not finite"
    if statuses == {"no baseline"}:
        return f"it shares no seed with {report['baseline']}"
    if "different budgets" in statuses:
        return f"it and {report['baseline']} ended at different token counts"
    return f"it or {report['baseline']} has no validation point"


def _arm_cautions(arm: Summary, key: str, loss_name: str, report: dict[str, Any]) -> list[str]:
    loss, name, baseline = arm[key], arm["name"], report.get("baseline")
    runs = [run for run in report["arms"] if run["name"] == name and run["paired"][key]]
    found = []
    if loss["diverged_seeds"]:
        seeds = wording.listed(str(seed) for seed in loss["diverged_seeds"])
        found.append(f"{name}: the final {loss_name} is not finite in seed {seeds}, so no mean over seeds is given.")
    if key == "loss" and any(run["paired"][key]["status"] == "different budgets" for run in runs):
        found.append(f"{name}: runs that end at another token count than {baseline}’s are not in the differences.")
    if loss["tokens_at_most"]:
        found.append(
            f"{name}: its {loss_name} is below {baseline}’s final one at the first validation point already, so its "
            "share of the tokens is an upper bound."
        )
    if arm["is_baseline"] and any(_rose(run, key) for run in runs):
        found.append(
            f"{name}: its final {loss_name} is not its lowest. Tokens are counted to where each curve stays at or "
            "below the final one."
        )
    return found


def _rose(run: dict[str, Any], key: str) -> bool:
    curve = read_curve(run, key)
    return curve.is_finite and curve.losses.min() < curve.losses[-1]


def _seed_cautions(report: dict[str, Any]) -> list[str]:
    counts = [arm["loss"]["difference"]["n"] for arm in report["summary"] if not arm["is_baseline"]]
    found = []
    if any(count == 1 for count in counts):
        found.append("One seed gives no interval: another seed could differ by more than the arms do.")
    unpaired = dict.fromkeys(run["name"] for run in report["arms"] if run["paired"]["loss"]["status"] == "no baseline")
    if unpaired and baseline_summary(report):
        found.append(
            f"{wording.listed(unpaired)}: seeds without a run of {report['baseline']} are not in the differences."
        )
    known = report.get("recorded")
    if known and known.get("tokens") != _budget(report):
        found.append(f"The recorded runs have {wording.scaled(known.get('tokens'))} tokens each and are not compared.")
    return found


def _rate_cautions(report: dict[str, Any]) -> list[str]:
    edge = [entry["arm"] for entry in report.get("sweep") or [] if entry["rates"] and not entry["bracketed"]]
    if not edge:
        return []
    return [
        f"{wording.listed(edge)}: the best learning rate lies at the edge of those tried; a better one may lie beyond."
    ]


def _speed_cautions(report: dict[str, Any]) -> list[str]:
    """Arms whose seconds say more about the code or the machine than about the method."""
    uneven = dict.fromkeys(run["name"] for run in report["arms"] if is_uneven(run))
    slow = dict.fromkeys(
        run["name"]
        for run in report["arms"]
        if run.get("connection") in ("hc", "mhc") or run.get("options", {}).get("carry_constraint", "none") != "none"
    )
    found = []
    if uneven:
        found.append(f"{wording.listed(uneven)}: the speed was uneven, so times and speeds are rough.")
    if slow:
        found.append(
            f"{wording.listed(slow)}: these run in plain PyTorch and virtual width on kernels, so speeds compare "
            "implementations. Sinkhorn’s scaling is not counted in the FLOPs."
        )
    return found


def _origin_cautions(report: dict[str, Any]) -> list[str]:
    """Where the runs were not all made by one version on one machine."""
    changed = []
    for name in ("versions", "machine"):
        values = [part.get(name) for part in (report, *(report.get("continued") or []))]
        changed += [name] if any(value != values[0] for value in values) else []
    if not changed:
        return []
    which = wording.listed(["other versions" if name == "versions" else "another machine" for name in changed])
    return [f"The comparison was continued with {which}; each run’s own are in its run.json."]
