"""The paper's four claims about virtual width, judged by fixed rules.

A claim is a list of tests, of every width arm and not of one picked afterwards: "supported" if all of them support it,
"contradicted" if one contradicts it, else "inconclusive". Each is judged at 95 %, uncorrected for their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from vwn.lab.analysis.budgets import BudgetStudy, Measured
from vwn.lab.analysis.compute import cost_ratio
from vwn.lab.analysis.estimates import Estimate
from vwn.lab.analysis.runs import Run, baseline_by_seed, is_width_arm, runs_by_arm
from vwn.lab.analysis.scaling import FEWEST_WIDTHS
from vwn.lab.analysis.wording import LOSS_NAMES, NOTHING, fixed, interval, seeds_text

SUPPORTED, CONTRADICTED, INCONCLUSIVE, UNTESTED = "supported", "contradicted", "inconclusive", "not tested"
# At most this many times the baseline's FLOPs per token is near-constant compute.
NEAR_CONSTANT = 1.15
# The least share of the variance of the mean losses that a line over log2 r must explain.
LOG_LINEAR_R2 = 0.95
# Studies whose arms differ in more than their width.
OTHER_STUDIES = ("family", "mtp", "embedding", "controls", "widen")
BY_VERDICT = {"lower": SUPPORTED, "higher": CONTRADICTED}

COMPUTE = f"Supported if the FLOPs per token are at most {NEAR_CONSTANT} times the baseline’s."
TOKENS = (
    "Supported if the 95 % interval of the speed-up in each loss lies above 1, and that of their difference, paired by "
    "seed, above 0. Contradicted if one lies below, or if the arm ends above the baseline."
)
GROWTH = (
    "Change of the gap in nats per token, and of the speed-up, from the first budget to the last. Supported if the 95 "
    "% interval of every change, paired by seed, lies above 0 and the arm ends significantly below the baseline. One "
    "validation curve cannot tell: this takes decayed losses at several budgets."
)

Summary = dict[str, Any]
Test = tuple[str, str, str]
"""What is tested, the numbers that decide it, and one of the four words."""


@dataclass(frozen=True)
class Claim:
    """A claim with its verdict.

    Args:
        title: the claim.
        word: one of the four words above.
        rows: (arm or loss, what is tested, the numbers that decide, one of the words).
        rule: how the verdict was found, or why there is none.
    """

    title: str
    word: str
    rows: tuple[tuple[str, str, str, str], ...]
    rule: str


def claims(report: dict[str, Any], studies: dict[str, BudgetStudy]) -> list[Claim]:
    """Return the claims on a report with `summary` and `scaling`; a study of other things has none."""
    if report.get("study") in OTHER_STUDIES:
        return []
    name, runs, references = report.get("baseline"), runs_by_arm(report), baseline_by_seed(report)
    arms = [arm for arm in report["summary"] if is_width_arm(runs[arm["name"]][0], name)]

    def claim(title: str, test: Callable[[Summary, list[Run]], list[Test]], rule: str) -> Claim:
        if not arms or not references:
            missing = f"the baseline {name} was not run" if arms else "no virtual width was run"
            return Claim(title, UNTESTED, (), f"Not tested: {missing}.")
        paired = {arm["name"]: [run for run in runs[arm["name"]] if run["seed"] in references] for arm in arms}
        rows = tuple((arm["name"], *found) for arm in arms for found in test(arm, paired[arm["name"]]))
        return Claim(title, combined(word for *_, word in rows), rows, rule)

    def compute(_: Summary, runs: list[Run]) -> list[Test]:
        ratio = cost_ratio(runs[0], references[runs[0]["seed"]], "flops") if runs else None
        if ratio is None:
            return [("FLOPs", "not known", UNTESTED)]
        return [("FLOPs", f"{ratio:.3f}×", SUPPORTED if ratio <= NEAR_CONSTANT else CONTRADICTED)]

    return [
        claim("(a) near-constant compute", compute, COMPUTE),
        claim("(b) fewer tokens to the baseline’s loss, more so for next-2-token", _tokens, TOKENS),
        claim("(c) gap and speed-up grow with the training budget", lambda arm, _: _growth(arm, studies), GROWTH),
        _log_linear(report),
    ]


def combined(words: Iterable[str]) -> str:
    """Judge what holds only if all its parts do: a contradicted part decides, an open one leaves it open."""
    found = list(words)
    return next(
        (word for word in (CONTRADICTED, INCONCLUSIVE, UNTESTED) if word in found), SUPPORTED if found else UNTESTED
    )


def _tokens(arm: Summary, runs: list[Run]) -> list[Test]:
    statuses = [run["paired"]["loss"]["status"] for run in runs]
    if blocked := next((status for status in ("diverged", "different budgets") if status in statuses), None):
        return [("speed-up", blocked, INCONCLUSIVE)]
    found = [(f"speed-up in {name}", *_speedup(arm[key])) for key, name in LOSS_NAMES.items()]
    pairs = [[run["paired"][key] for key in LOSS_NAMES] for run in runs]
    pairs = [pair for pair in pairs if all(p is not None and p["tokens_defined"] for p in pair)]
    known = all(p["speedup"] is not None and not p["tokens_at_most"] for pair in pairs for p in pair)
    more = Estimate.over([second["speedup"] - first["speedup"] for first, second in pairs] if known else [])
    if not pairs:
        return [*found, ("their difference", NOTHING, UNTESTED)]
    numbers = "not known in every seed" if more.mean is None else interval(more.described(), "+.2f")
    return [*found, ("their difference", numbers, _by_sign(more))]


def _speedup(loss: Summary | None) -> tuple[str, str]:
    if loss is None or loss["tokens_pairs"] == 0:
        return "no target", UNTESTED
    speedup = _estimate(loss["speedup"])
    if speedup.mean is None:
        numbers = f"reached in {speedup.n} of {seeds_text(loss['tokens_pairs'])}"
    else:
        numbers = ("≥ " if loss["tokens_at_most"] else "") + interval(loss["speedup"], ".2f", "×")
    below = speedup.sign(1.0) < 0 and not loss["tokens_at_most"]
    if below or loss["verdict"] == "higher":
        return numbers, CONTRADICTED
    return numbers, SUPPORTED if speedup.sign(1.0) > 0 else INCONCLUSIVE


def _growth(arm: Summary, studies: dict[str, BudgetStudy]) -> list[Test]:
    found = []
    for key, study in studies.items():
        points = [point.equal["tokens"] for point in study.arms.get(arm["name"], [])]
        if len(points) > 1:
            name, verdict = LOSS_NAMES[key], "unknown" if arm[key] is None else arm[key]["verdict"]
            found += [
                (f"change of the gap, {name}", *_change(points[0].gap, points[-1].gap, -1, "+.4f")),
                (f"change of the speed-up, {name}", *_change(points[0].speedup, points[-1].speedup, 1, "+.2f")),
                (f"end, {name}", verdict, BY_VERDICT.get(verdict, INCONCLUSIVE)),
            ]
    return found or [("change", "fewer than two budgets", UNTESTED)]


def _change(first: Measured, last: Measured, sign: int, form: str) -> tuple[str, str]:
    """Judge `sign` times the change between two budgets, over the seeds that both have."""
    pairs = [(first.by_seed[seed], last.by_seed[seed]) for seed in first.by_seed if seed in last.by_seed]
    known = first.over_seeds.mean is not None and last.over_seeds.mean is not None
    change = Estimate.over([sign * (end - start) for start, end in pairs], honest=known)
    return interval(change.described(), form), _by_sign(change)


def _log_linear(report: dict[str, Any]) -> Claim:
    title, paper = "(d) the loss falls log-linearly in r", report["scaling"]["paper"]
    fits = {key: report["scaling"][key] for key in LOSS_NAMES}
    fit = fits["loss"]
    if fit is None or fit["slope"] is None:
        few = fit is None or len(set(fit["widths"])) < FEWEST_WIDTHS
        reason = "no virtual width was run" if fit is None else fit["reason"]
        return Claim(title, UNTESTED if few else INCONCLUSIVE, (), f"No fit: {reason}.")
    rows = [
        (
            LOSS_NAMES[key],
            "slope per doubling of r, and R²",
            f"{interval(found['slope'], '+.4f')}, {fixed(found['r2'], '.3f')}",
            log_linear(found),
        )
        for key, found in fits.items()
        if found and found["slope"] is not None
    ]
    rule = (
        f"The paper has {paper['slope']} with R² {paper['r2']}. Supported if the 95 % interval of the slope lies below "
        f"0 and R² is at least {LOG_LINEAR_R2}; the next-token loss decides."
    )
    return Claim(title, log_linear(fit), tuple(rows), rule)


def log_linear(fit: dict[str, Any]) -> str:
    """Contradicted if the loss rises, or falls and bends: R² is low and the quadratic term’s interval excludes 0."""
    if fit["verdict"] != "falls":
        return CONTRADICTED if fit["verdict"] == "rises" else INCONCLUSIVE
    if fit["r2"] is not None and fit["r2"] >= LOG_LINEAR_R2:
        return SUPPORTED
    return CONTRADICTED if _estimate(fit["curvature"]).sign() else INCONCLUSIVE


def _estimate(found: dict[str, Any]) -> Estimate:
    return Estimate(found["mean"], found["std"], found["n"])


def _by_sign(difference: Estimate) -> str:
    return {1: SUPPORTED, 0: INCONCLUSIVE, -1: CONTRADICTED}[difference.sign()]
