"""The four claims about virtual width (section 8 of the method's page), each judged by what was measured.

A claim is judged for every width arm, not for one that was picked afterwards: it is "held" if it is held for all of
them, "not held" if it is not for one, and "not decided by this budget" else. Arms are judged one by one at 95 %,
without a correction for their number, which the text names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vwn.lab.analysis import wording
from vwn.lab.analysis.estimates import Estimate
from vwn.lab.analysis.pairwise import uncertainty
from vwn.lab.analysis.runs import Run, is_width_arm, runs_by_arm
from vwn.lab.analysis.scaling import FEWEST_WIDTHS

HELD, NOT_HELD = "held", "not held"
UNDECIDED, UNTESTED = "not decided by this budget", "not tested"
# At most this many times the baseline's FLOPs per token is near-constant compute.
NEAR_CONSTANT = 1.15
# The least share of the variance of the mean losses that a line over log2 r must explain.
LOG_LINEAR_R2 = 0.95
OTHER_STUDIES = ("family", "mtp", "embedding", "controls")

Part = dict[str, Any]


def judge_claims(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Claims "a" to "d" of an analysed report (with `summary` and `scaling`), or nothing for a study of other things.

    Each: `claim`, `title`, `verdict` ("held", "not held", "not decided by this budget" or "not tested"), `text`, and
    `numbers`: {"arms": [...]} with one object per width arm (`arm`, `verdict`, `parts`), for "d" the fits of
    `fit_scaling`. A part is {"part", "verdict", "estimate" ({"mean", "std", "n", "interval"} or None), "text"}.
    """
    if report.get("study") in OTHER_STUDIES:
        return []
    return [
        _by_arm(report, "a", "near-constant compute", _compute_parts, _COMPUTE_RULE),
        _by_arm(
            report, "b", "fewer tokens to the baseline’s loss, more so for next-2-token", _token_parts, _TOKEN_RULE
        ),
        _by_arm(report, "c", "gap and speed-up grow during training", _growth_parts, _GROWTH_RULE),
        _scaling_claim(report),
    ]


def combined(verdicts: list[str]) -> str:
    """The verdict on what holds only if all its parts do: a failed part decides it, an untested one leaves it open."""
    for word in (NOT_HELD, UNDECIDED, UNTESTED):
        if word in verdicts:
            return word
    return HELD if verdicts else UNTESTED


def _by_arm(
    report: dict[str, Any], claim: str, title: str, parts_of: Callable[[Any, Any, Any], list[Part]], rule: str
) -> dict[str, Any]:
    baseline_name = report.get("baseline")
    runs = runs_by_arm(report)
    baseline = wording.baseline_summary(report)
    widths = [arm for arm in report["summary"] if is_width_arm(runs[arm["name"]][0], baseline_name)]
    about = {"claim": claim, "title": title}
    if baseline is None or not widths:
        missing = "no virtual width was run" if not widths else f"the baseline {baseline_name} was not run"
        return {**about, "verdict": UNTESTED, "text": f"Not tested: {missing}.", "numbers": {"arms": []}}
    judged = []
    for arm in widths:
        parts = parts_of(arm, baseline, (runs[arm["name"]], runs[str(baseline_name)]))
        judged.append({"arm": arm["name"], "verdict": combined([p["verdict"] for p in parts]), "parts": parts})
    details = [f"{arm['arm']}: {'; '.join(part['text'] for part in arm['parts'])}." for arm in judged]
    looked_at = "1 width arm was looked at."
    if len(judged) > 1:
        looked_at = f"{len(judged)} width arms were looked at, each judged alone, uncorrected for their number."
    text = " ".join([_groups(judged), looked_at, *details, rule])
    verdict = combined([arm["verdict"] for arm in judged])
    return {**about, "verdict": verdict, "text": text, "numbers": {"arms": judged}}


def _groups(judged: list[dict[str, Any]]) -> str:
    groups = []
    for word in (HELD, NOT_HELD, UNDECIDED, UNTESTED):
        names = [arm["arm"] for arm in judged if arm["verdict"] == word]
        groups += [f"{word} for {wording.listed(names)}"] if names else []
    text = "; ".join(groups)
    return f"{text[0].upper()}{text[1:]}."


_COMPUTE_RULE = (
    f"The verdict is on FLOPs, at most {NEAR_CONSTANT}× the baseline’s; equal FLOPs are not equal time, for which the "
    "measured speed stands."
)


def _compute_parts(arm: Part, baseline: Part, runs: tuple[list[Run], list[Run]]) -> list[Part]:
    """Claim (a): the FLOPs per token are at most `NEAR_CONSTANT` times the baseline's; the measured speed beside it."""
    own, reference = arm["flops_per_token"], baseline["flops_per_token"]
    speed = _speed_ratio(*runs)
    pace = "its speed was not measured"
    if speed.mean is not None:
        spread = "" if speed.std is None else f"{wording.PLUS_MINUS}{speed.std:.2f}"
        pace = f"{speed.mean:.2f}×{spread} its tokens per second"
    if not own or not reference:
        return [_part("FLOPs per token", UNTESTED, None, f"its FLOPs per token are not known, {pace}")]
    ratio = own / reference
    part = _part(
        "FLOPs per token",
        HELD if ratio <= NEAR_CONSTANT else NOT_HELD,
        None,
        f"{ratio:.3f}× the baseline’s FLOPs per token and {pace}",
    )
    return [{**part, "flops_ratio": ratio, "speed_ratio": speed.described()}]


def _speed_ratio(runs: list[Run], references: list[Run]) -> Estimate:
    speeds = {run["seed"]: run.get("tokens_per_second") for run in references}
    pairs = [(run.get("tokens_per_second"), speeds.get(run["seed"])) for run in runs]
    return Estimate.over([own / reference for own, reference in pairs if own and reference])


_TOKEN_RULE = (
    "The rule: the 95 % interval of the speed-up over seeds lies above 1 in both losses, and the paired difference of "
    "the two speed-ups above 0."
)


def _token_parts(arm: Part, baseline: Part, runs: tuple[list[Run], list[Run]]) -> list[Part]:
    """Claim (b): the interval of the speed-up at the baseline's final loss lies above 1, in both losses, and the
    next-2-token speed-up exceeds the next-token one, paired by seed.

    Not held where the interval lies below 1 or the arm ends above the baseline. A loss that some seed did not reach
    has no mean speed-up, and decides nothing; nor do runs that diverged or ended at different token counts.
    """
    statuses = {run["paired"]["loss"]["status"] for run in runs[0]}
    blocked = [text for status, text in _BLOCKED.items() if status in statuses]
    if blocked:
        return [_part("next-token loss", UNDECIDED, None, blocked[0])]
    parts = [_speedup_part(arm[key], name) for key, name in wording.LOSS_NAMES.items()]
    return [*parts, _more_so(runs[0])]


_BLOCKED = {
    "diverged": "it or its baseline diverged",
    "different budgets": "it and its baseline ended at different tokens",
}


def _speedup_part(loss: Part | None, name: str) -> Part:
    if loss is None or loss["tokens_pairs"] == 0:
        return _part(name, UNTESTED, None, f"{name} gives no target to reach")
    found = loss["speedup"]
    speedup = Estimate(found["mean"], found["std"], found["n"])
    bound = "at least " if loss["tokens_at_most"] else ""
    if speedup.mean is None:
        text = f"{name} of the baseline reached in {speedup.n} of {wording.seeds_text(loss['tokens_pairs'])}"
    else:
        text = f"{name} speed-up {bound}{speedup.mean:.2f}× ({_ratio_uncertainty(speedup)})"
    below = speedup.sign(1.0) < 0 and not loss["tokens_at_most"]
    if below or loss["verdict"] == "higher":
        return _part(name, NOT_HELD, speedup, text)
    return _part(name, HELD if speedup.sign(1.0) > 0 else UNDECIDED, speedup, text)


def _more_so(runs: list[Run]) -> Part:
    name = "more so for next-2-token"
    pairs = [[run["paired"][key] for key in wording.LOSS_NAMES] for run in runs]
    pairs = [pair for pair in pairs if all(p is not None and p["tokens_defined"] for p in pair)]
    if not pairs:
        return _part(name, UNTESTED, None, "next-2-token speed-up not comparable")
    known = all(p["speedup"] is not None and not p["tokens_at_most"] for pair in pairs for p in pair)
    values = [second["speedup"] - first["speedup"] for first, second in pairs] if known else []
    difference = Estimate.over(values)
    if difference.mean is None:
        return _part(name, UNDECIDED, None, "next-2-token minus next-token speed-up not known in every seed")
    text = f"next-2-token minus next-token speed-up {difference.mean:+.2f} ({_ratio_uncertainty(difference)})"
    return _part(name, {1: HELD, 0: UNDECIDED, -1: NOT_HELD}[difference.sign()], difference, text)


_GROWTH_RULE = (
    "The rule: from half of the budget to its end, within one run and its decaying learning rate, the 95 % interval of "
    "the paired change lies above 0, and the arm ends below the baseline."
)


def _growth_parts(arm: Part, baseline: Part, runs: tuple[list[Run], list[Run]]) -> list[Part]:
    """Claim (c): gap and speed-up each grow (see `growth`) in each loss measured, and the arm ends below the baseline.

    Not held where one shrinks, or where the arm ends above the baseline, so that there is no lead to grow.
    """
    parts = []
    for key, name in wording.LOSS_NAMES.items():
        loss = arm[key]
        if loss is not None:
            parts += [_growth_part(loss, kind, name) for kind in ("gap", "speedup")]
    return parts


def _growth_part(loss: Part, kind: str, loss_name: str) -> Part:
    grown = loss[f"{kind}_growth"]
    label = f"{loss_name} {'speed-up' if kind == 'speedup' else 'gap'}"
    change = grown["change"]
    if change["mean"] is None:
        return _part(label, UNDECIDED, None, f"{label}: {grown['reason']}")
    text = (
        f"{label} {grown['verdict']}, {grown['half']['mean']:.4f} to {grown['end']['mean']:.4f}, "
        f"change {change['mean']:+.4f} ({uncertainty(change)})"
    )
    verdict = {"grows": HELD, "shrinks": NOT_HELD, "not decided": UNDECIDED}[grown["verdict"]]
    if loss["verdict"] == "higher":
        verdict, text = NOT_HELD, f"{text}, but it ends above the baseline"
    elif verdict == HELD and loss["verdict"] != "lower":
        verdict, text = UNDECIDED, f"{text}, but whether it ends below the baseline is not decided"
    return {"part": label, "verdict": verdict, "estimate": change, "text": text}


def _scaling_claim(report: dict[str, Any]) -> dict[str, Any]:
    """Claim (d): the slope of the fit without the baseline is below 0 and the line explains `LOG_LINEAR_R2`.

    Not held if the slope is above 0, or if the losses fall but bend: the line explains less and the interval of the
    quadratic coefficient leaves 0 out. Not tested below three widths. The next-token loss decides.
    """
    scaling = report["scaling"]
    about = {"claim": "d", "title": "loss falls log-linearly in r"}
    fits = {key: (scaling[key] or {}).get("without_baseline") for key in wording.LOSS_NAMES}
    fit, numbers = fits["loss"], {"arms": [], **fits, "paper": scaling["paper"]}
    if fit is None or fit["slope"] is None:
        reason = "no virtual width was run" if fit is None else fit["reason"]
        few = fit is None or len(set(fit["widths"])) < FEWEST_WIDTHS
        text = f"{'Not tested' if few else 'Not decided by this budget'}: {reason}."
        return {**about, "verdict": UNTESTED if few else UNDECIDED, "text": text, "numbers": numbers}
    verdict = _log_linear(fit)
    parts = [_fit_text(wording.LOSS_NAMES[key], found) for key, found in fits.items() if found]
    paper = scaling["paper"]
    text = (
        f"{verdict[0].upper()}{verdict[1:]} for {wording.listed(fit['arms'])}, the baseline left out. "
        f"{'; '.join(parts)}. "
        f"The paper: slope {paper['slope']}, R² {paper['r2']}. The rule: the 95 % t-interval of the per-seed slopes in "
        f"next-token loss lies below 0 and R² is at least {LOG_LINEAR_R2}."
    )
    return {**about, "verdict": verdict, "text": text, "numbers": numbers}


def _log_linear(fit: dict[str, Any]) -> str:
    if fit["verdict"] == "rises":
        return NOT_HELD
    if fit["verdict"] == "not decided":
        return UNDECIDED
    if fit["r2"] is not None and fit["r2"] >= LOG_LINEAR_R2:
        return HELD
    bend = fit["curvature"]
    return NOT_HELD if Estimate(bend["mean"], bend["std"], bend["n"]).sign() else UNDECIDED


def _fit_text(name: str, fit: dict[str, Any]) -> str:
    if fit["slope"] is None:
        return f"{name}: no fit, {fit['reason']}"
    r2 = "R² not defined, all losses are equal" if fit["r2"] is None else f"R² {fit['r2']:.4f}"
    return f"{name}: {fit['slope']['mean']:+.4f} nats per doubling of r ({uncertainty(fit['slope'])}), {r2}"


def _part(name: str, verdict: str, estimate: Estimate | None, text: str) -> Part:
    described = None if estimate is None else estimate.described()
    return {"part": name, "verdict": verdict, "estimate": described, "text": text}


def _ratio_uncertainty(estimate: Estimate) -> str:
    if estimate.interval is None:
        return "one seed, no interval"
    low, high = estimate.interval
    return f"95 % interval {low:.2f} to {high:.2f}, {wording.seeds_text(estimate.n)}"
