"""Every arm against every other, each against the baseline in a sentence, and whether a control explains a gain."""

from __future__ import annotations

from typing import Any

from vwn.lab.analysis import wording
from vwn.lab.analysis.estimates import Estimate, verdict
from vwn.lab.analysis.runs import LOSS_KEYS, Run, has_loss, is_width_arm, pair_status, read_curve, runs_by_arm

Cell = dict[str, Any]


def pairwise_differences(report: dict[str, Any]) -> dict[str, Any]:
    """For each loss measured (else None): arm -> other arm -> `difference_of`, for all ordered pairs of arms."""
    arms = runs_by_arm(report)
    result: dict[str, Any] = {}
    for key in LOSS_KEYS:
        measured = {name: runs for name, runs in arms.items() if any(has_loss(run, key) for run in runs)}
        result[key] = {
            name: {other: difference_of(runs, measured[other], key) for other in measured if other != name}
            for name, runs in measured.items()
        } or None
    return result


def difference_of(runs: list[Run], others: list[Run], key: str) -> Cell:
    """The final loss of one arm minus another's, paired by seed, in nats per token.

    `difference` {"mean", "std", "n", "interval"}; no mean if a seed of either diverged; `verdict` as `verdict`;
    `reason`: None, or why it is "undecided" or "unknown".
    """
    by_seed = {run["seed"]: run for run in others}
    values, statuses = [], []
    for run in runs:
        other = by_seed.get(run["seed"])
        status = pair_status(run, other, key)
        statuses.append(status)
        final, other_final = read_curve(run, key).final_loss, read_curve(other, key).final_loss
        if status == "compared" and final is not None and other_final is not None:
            values.append(final - other_final)
    difference = Estimate.over(values, honest="diverged" not in statuses)
    found, reason = verdict(difference), None
    if found == "undecided":
        reason = "one seed" if difference.n == 1 else "within the 95 % interval"
    elif found == "unknown":
        kinds = ("diverged", "different budgets", "no data")
        reason = next((kind for kind in kinds if kind in statuses), "no shared seed")
    return {"difference": difference.described(), "verdict": found, "reason": reason}


def arm_verdicts(report: dict[str, Any], pairwise: dict[str, Any]) -> list[Cell]:
    """What each arm but the baseline does against it, in the report's order; empty without the baseline.

    In the study "mtp" each width arm is then held against the plain arm of the same MTP depth too, if that is not the
    baseline. `arm`, `against`; `loss`, `loss_2` (None if not measured in both): the pairwise cell; `text`: a sentence
    for each of them.
    """
    baseline, arms = report.get("baseline"), runs_by_arm(report)
    if baseline not in arms:
        return []
    pairs = [(name, str(baseline)) for name in arms if name != baseline]
    if report.get("study") == "mtp":
        plain = {runs[0].get("mtp"): name for name, runs in arms.items() if runs[0].get("connection") == "residual"}
        widths = {name: runs[0].get("mtp") for name, runs in arms.items() if is_width_arm(runs[0], baseline)}
        pairs += [(name, plain[mtp]) for name, mtp in widths.items() if plain.get(mtp, baseline) != baseline]
    found = []
    for name, other in pairs:
        cells = {key: (pairwise[key] or {}).get(name, {}).get(other) for key in LOSS_KEYS}
        texts = [_sentence(name, other, cell, key) for key, cell in cells.items() if cell is not None]
        found.append({"arm": name, "against": other, **cells, "text": " ".join(texts)})
    return found


def control_verdicts(report: dict[str, Any], pairwise: dict[str, Any]) -> list[Cell]:
    """Whether a control explains the gain of virtual width, in next-token loss; only in the study "controls".

    The arm that is explained is the first width arm; each other arm is a control of it: `arm`, `control`,
    `difference` (arm minus control, a pairwise cell), `gain`, `control_gain` (each minus the baseline, likewise),
    `text` and `verdict`:
      "nothing to explain"    the arm is not below the baseline
      "does not explain it"   the arm is below the control: width gives more than the control does
      "explains it"           the control is below the arm
      "not decided"           between arm and control it is not decided, which is not the same as being equal
    """
    baseline, arms = report.get("baseline"), runs_by_arm(report)
    lead = next((name for name, runs in arms.items() if is_width_arm(runs[0], baseline)), None)
    if report.get("study") != "controls" or lead is None or baseline not in arms:
        return []
    cells = pairwise["loss"]
    return [
        _control(lead, name, str(baseline), cells[lead][name], cells[lead][baseline], cells[name][baseline])
        for name in arms
        if name not in (lead, baseline)
    ]


def _control(lead: str, control: str, baseline: str, between: Cell, gain: Cell, control_gain: Cell) -> Cell:
    about = {"arm": lead, "control": control, "difference": between, "gain": gain, "control_gain": control_gain}
    if gain["verdict"] != "lower":
        word = {"higher": "is above", "undecided": "is not decided against"}.get(
            gain["verdict"], "is not comparable to"
        )
        text = f"{lead} {word} {baseline}, so there is no gain that {control} could explain."
        return {**about, "verdict": "nothing to explain", "text": text}
    word, text = {
        "lower": ("does not explain it", f"{control} does not explain the gain of {lead}"),
        "higher": ("explains it", f"{control} explains the gain of {lead}, and does better"),
    }.get(between["verdict"], ("not decided", f"Whether {control} explains the gain of {lead} is not decided"))
    gains = f"against {baseline}, {lead} has {measured(gain)} and {control} {measured(control_gain)}"
    return {**about, "verdict": word, "text": f"{text}: {lead} minus {control} is {measured(between)}; {gains}."}


def measured(cell: Cell) -> str:
    """A paired difference with its uncertainty, or the reason why there is none."""
    difference = cell["difference"]
    if difference["mean"] is None:
        return f"no number ({cell['reason']})"
    return f"{difference['mean']:+.4f} ({uncertainty(difference)})"


def uncertainty(estimate: dict[str, Any]) -> str:
    """`95 % interval -0.012 to -0.004, 3 seeds`, or `one seed, no interval`."""
    if estimate["interval"] is None:
        return "one seed, no interval"
    low, high = estimate["interval"]
    return f"95 % interval {low:+.4f} to {high:+.4f}, {wording.seeds_text(estimate['n'])}"


def _sentence(name: str, baseline: str, cell: Cell, key: str) -> str:
    loss = wording.LOSS_NAMES[key]
    if cell["verdict"] == "unknown":
        return f"{name} cannot be held against {baseline} in {loss}: {cell['reason']}."
    if cell["verdict"] == "undecided":
        return f"Between {name} and {baseline} it is not decided in {loss}: {measured(cell)}."
    return f"{name} ends {cell['verdict']} than {baseline} in {loss}: {measured(cell)}."
