"""The numbers of an analysed comparison in words: formatting, the headline, and what to read with care."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vwn.lab.analysis.runs import is_width_arm, read_curve, runs_by_arm

Summary = dict[str, Any]

NOTHING = "–"
# No-break spaces: a number and what belongs to it stay on one line.
PLUS_MINUS = "\u00a0±\u00a0"
PERCENT = "\u00a0%"
LOSS_NAMES = {"loss": "next-token loss", "loss_2": "next-2-token loss"}
VERDICT_WORDS = {"lower": "below", "higher": "above", "undecided": "not decided", "unknown": "not comparable"}


def fixed(value: float | None, form: str) -> str:
    """`value` by a format specification such as `+.4f`, or a dash."""
    return NOTHING if value is None else format(value, form)


def scaled(value: float | None, binary: bool = False) -> str:
    """Three significant digits with k, M, G, T (`binary`: bytes as KiB, MiB, …), or a dash."""
    if value is None:
        return NOTHING
    step, units = (1024.0, (" B", " KiB", " MiB", " GiB", " TiB")) if binary else (1000.0, ("", "k", "M", "G", "T"))
    power = 0
    # Half below the step, as it will be rounded: 999,999 is 1M, not 1000k.
    while value / step**power >= step - 0.5 and power < len(units) - 1:
        power += 1
    number = value / step**power
    digits = 0 if number >= 100 or (power == 0 and number == int(number)) else 1 if number >= 10 else 2
    return f"{number:.{digits}f}{units[power]}"


def estimate(value: Summary, signed: bool = False) -> str:
    """Mean ± sample standard deviation in nats; the mean alone for one seed; a dash where there is none."""
    if value["mean"] is None:
        return NOTHING
    digits = _digits(value["std"])
    mean = f"{value['mean']:{'+' if signed else ''}.{digits}f}"
    return mean if value["std"] is None else f"{mean}{PLUS_MINUS}{value['std']:.{digits}f}"


def tokens_needed(loss: Summary) -> str:
    """Share of the baseline's tokens needed, `63 ± 2 %`; or "not reached", "2 of 3 seeds", or a dash (no target)."""
    share, pairs = loss["tokens_fraction"], loss["tokens_pairs"]
    if pairs == 0:
        return NOTHING
    if share["mean"] is None:
        return "not reached" if share["n"] == 0 else f"{share['n']} of {pairs} seeds"
    bound = "≤ " if loss["tokens_at_most"] else ""
    digits = 0 if not share["std"] or share["std"] >= 0.005 else 1
    spread = f"{PLUS_MINUS}{100 * share['std']:.{digits}f}" if share["std"] else ""
    return f"{bound}{100 * share['mean']:.{digits}f}{spread}{PERCENT}"


def ratio(value: float | None, reference: float | None) -> str:
    """`value / reference` as `1.31×`, or an empty string where it is not defined."""
    return f"{value / reference:.2f}×" if value is not None and reference else ""


def seeds_text(count: int) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{count} seed" if count == 1 else f"{count} seeds"


def listed(names: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *head, last = names
    return f"{', '.join(head)} and {last}" if head else last


def baseline_summary(report: dict[str, Any]) -> Summary | None:
    """The baseline's entry in an analysed report's summary, or None if it was not run."""
    return next((arm for arm in report["summary"] if arm["is_baseline"]), None)


def widest_arm(report: dict[str, Any]) -> Summary | None:
    """The summary of the width arm with the largest r, the first of several; None if there is no width arm."""
    runs = runs_by_arm(report)
    widths = [arm for arm in report["summary"] if is_width_arm(runs[arm["name"]][0], report.get("baseline"))]
    return max(widths, key=lambda arm: arm["r"], default=None)


def headline(report: dict[str, Any]) -> str:
    """One plain paragraph: what the best arm does against the baseline, how sure that is, what it costs.

    `report` is an analysed one (`add_analysis`).
    """
    name = report.get("baseline")
    baseline = baseline_summary(report)
    arms = [arm for arm in report["summary"] if not arm["is_baseline"]]
    if baseline is None:
        return f"The baseline {name} was not run, so nothing here can be held against it: the losses stand alone."
    if not arms:
        return f"Only the baseline {name} was run, so there is nothing to hold against it."
    judged = [arm for arm in arms if arm["loss"]["difference"]["mean"] is not None]
    if not judged:
        reasons = " ".join(_unjudged(arm, report) for arm in arms)
        return f"This comparison decides nothing about {listed(arm['name'] for arm in arms)}. {reasons}"
    lead = min(judged, key=lambda arm: (arm["loss"]["verdict"] != "lower", arm["loss"]["difference"]["mean"]))
    parts = [_lead_sentence(lead, name, len(arms)), _second_loss_sentence(lead, name)]
    parts += [_others_sentence([arm for arm in arms if arm is not lead], name), _cost_sentence(lead, baseline)]
    return " ".join(part for part in parts if part)


def cautions(report: dict[str, Any]) -> list[str]:
    """What a reader must know before trusting the numbers of an analysed report, one sentence each."""
    found = []
    for key, loss_name in LOSS_NAMES.items():
        found += [text for arm in report["summary"] if arm[key] for text in _arm_cautions(arm, key, loss_name, report)]
    return [
        *found,
        *_seed_cautions(report),
        *_rate_cautions(report),
        *_relative_cautions(report),
        *_continuation_cautions(report),
    ]


def _relative_cautions(report: dict[str, Any]) -> list[str]:
    """Arms whose seconds say more about the code than about the method."""
    slow = dict.fromkeys(
        run["name"]
        for run in report["arms"]
        if run.get("connection") in ("hc", "mhc") or run.get("options", {}).get("carry_constraint", "none") != "none"
    )
    if not slow:
        return []
    return [
        f"{listed(slow)}: in plain PyTorch, where virtual width has kernels, so tokens per second and equal training "
        "time measure the implementation; Sinkhorn’s scaling, where there is one, is not counted in their FLOPs."
    ]


def _continuation_cautions(report: dict[str, Any]) -> list[str]:
    """Where the runs were not all made by one version on one machine."""
    changed = []
    for name in ("versions", "machine"):
        values = [part.get(name) for part in (report, *(report.get("continued") or []))]
        changed += [name] if any(value != values[0] for value in values) else []
    if not changed:
        return []
    which = listed(["other versions" if name == "versions" else "another machine" for name in changed])
    return [f"It was continued with {which} than it was started with; every run’s own are in its run.json."]


def _digits(spread: float | None) -> int:
    return 3 if not spread or spread >= 0.001 else 4


def _distance(difference: Summary) -> str:
    """The difference without its sign, which the words "below" and "above" carry."""
    return estimate({**difference, "mean": abs(difference["mean"])})


def _lead_sentence(arm: Summary, baseline: str | None, arm_count: int) -> str:
    loss = arm["loss"]
    difference, name = loss["difference"], arm["name"]
    side = "below" if difference["mean"] < 0 else "above"
    if difference["n"] == 1:
        return (
            f"In the one seed that was run, {name} ends {_distance(difference)} nats per token {side} {baseline} in "
            f"next-token loss{_reaches(loss, baseline)}; the spread over seeds is unknown, so this budget does "
            "not decide whether that is more than chance."
        )
    if loss["verdict"] == "undecided":
        return (
            f"This budget does not decide between {name} and {baseline}: the final next-token losses differ by "
            f"{estimate(difference, signed=True)} nats per token (paired, {seeds_text(difference['n'])}), which is "
            "within the 95 % interval around zero."
        )
    place = "" if arm_count == 1 else f", the {'best' if side == 'below' else 'closest'} of {arm_count} arms,"
    return (
        f"{name}{place} ends {_distance(difference)} nats per token {side} {baseline} in next-token loss (paired, "
        f"{seeds_text(difference['n'])}){_reaches(loss, baseline)}."
    )


def _reaches(loss: Summary, baseline: str | None) -> str:
    """The end of a sentence; empty where the baseline's curve gives no target."""
    share = loss["tokens_fraction"]
    if loss["tokens_pairs"] == 0:
        return ""
    if share["n"] == 0:
        return f" and does not reach {baseline}’s final loss within its budget"
    if share["mean"] is None:
        return f" and reaches {baseline}’s final loss in {share['n']} of {loss['tokens_pairs']} seeds only"
    after = "at the latest after" if loss["tokens_at_most"] else "after"
    return f" and reaches {baseline}’s final loss {after} {tokens_needed(loss).removeprefix('≤ ')} of the tokens"


def _second_loss_sentence(arm: Summary, baseline: str | None) -> str:
    loss = arm["loss_2"]
    if loss is None or loss["difference"]["mean"] is None:
        return ""
    difference = loss["difference"]
    if loss["verdict"] == "undecided" and difference["n"] > 1:
        return f"For the next-2-token loss it is not decided ({estimate(difference, signed=True)})."
    side = "below" if difference["mean"] < 0 else "above"
    return f"In next-2-token loss it ends {_distance(difference)} {side}{_reaches(loss, baseline)}."


def _others_sentence(others: list[Summary], baseline: str | None) -> str:
    words = {
        "lower": f"below {baseline}",
        "higher": f"above {baseline}",
        "undecided": "not decided",
        "unknown": "not comparable",
    }
    groups = []
    for judgement, word in words.items():
        names = [arm["name"] for arm in others if arm["loss"]["verdict"] == judgement]
        groups += [f"{listed(names)} {word}"] if names else []
    return f"The other {'arm' if len(others) == 1 else 'arms'}: {'; '.join(groups)}." if groups else ""


def _cost_sentence(arm: Summary, baseline: Summary) -> str:
    def times(field: str, label: str) -> list[str]:
        factor = ratio(arm[field], baseline[field])
        return [f"{factor} the {label}"] if factor else []

    has = times("params", "parameters") + times("flops_per_token", "FLOPs per token")
    has += times("tokens_per_second", "training speed (tokens per second)")
    return f"Against {baseline['name']}, {arm['name']} has {listed(has)}." if has else ""


def _unjudged(arm: Summary, report: dict[str, Any]) -> str:
    runs = [run for run in report["arms"] if run["name"] == arm["name"]]
    statuses = {run["paired"]["loss"]["status"] for run in runs}
    if "diverged" in statuses:
        return f"{arm['name']} or its baseline run ended with a loss that is not finite."
    if statuses == {"no baseline"}:
        return f"{arm['name']} shares no seed with {report['baseline']}."
    if "different budgets" in statuses:
        return f"{arm['name']} and {report['baseline']} ended at different token counts."
    return f"{arm['name']} or its baseline run has no validation point."


def _arm_cautions(arm: Summary, key: str, loss_name: str, report: dict[str, Any]) -> list[str]:
    loss, name, baseline = arm[key], arm["name"], report.get("baseline")
    runs = [run for run in report["arms"] if run["name"] == name and run["paired"][key]]
    found = []
    if loss["diverged_seeds"]:
        seeds = listed(str(seed) for seed in loss["diverged_seeds"])
        found.append(f"{name}: the final {loss_name} is not finite in seed {seeds}, so no mean over seeds is given.")
    if key == "loss" and any(run["paired"][key]["status"] == "different budgets" for run in runs):
        found.append(f"{name}: runs that end at another token count than {baseline}’s are left out of the differences.")
    if loss["tokens_at_most"]:
        found.append(
            f"{name}: already at its first validation point the {loss_name} is below {baseline}’s final one, so its "
            "share of the tokens is an upper bound."
        )
    if arm["is_baseline"] and any(_rose(run, key) for run in runs):
        found.append(
            f"{name}: its final {loss_name} is not its lowest; tokens are counted to where each curve stays at or "
            "below that final loss, for the baseline too."
        )
    return found


def _rose(run: dict[str, Any], key: str) -> bool:
    curve = read_curve(run, key)
    return curve.is_finite and curve.losses.min() < curve.losses[-1]


def _seed_cautions(report: dict[str, Any]) -> list[str]:
    counts = [arm["loss"]["difference"]["n"] for arm in report["summary"] if not arm["is_baseline"]]
    found = []
    if any(count == 1 for count in counts):
        found.append("One seed gives no spread: a second run of the same arm could differ by more than the arms do.")
    unpaired = dict.fromkeys(run["name"] for run in report["arms"] if run["paired"]["loss"]["status"] == "no baseline")
    if unpaired and baseline_summary(report):
        found.append(
            f"{listed(unpaired)}: seeds that {report['baseline']} was not run with are left out of the differences."
        )
    return found


def _rate_cautions(report: dict[str, Any]) -> list[str]:
    entries = [entry for entry in report.get("sweep") or [] if entry["rates"]]
    edge = [entry["arm"] for entry in entries if not entry["bracketed"]]
    found = []
    if edge:
        found.append(
            f"{listed(edge)}: the best learning rate lies at the edge of those tried; a better one may lie beyond."
        )
    if report.get("sweep") and len(report["sweep"]) > 1 and not entries:
        found.append("The learning rates were given, not swept: a rate that suits one arm may not suit another.")
    return found
