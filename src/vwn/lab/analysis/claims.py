"""The paper's four claims about virtual width, judged by fixed rules.

A claim is judged for every width arm, not for one picked afterwards: it is "supported" if all of them support it,
"contradicted" if one contradicts it, else "inconclusive". Each arm is judged at 95 %, uncorrected for their number.
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
OTHER_STUDIES = ("family", "mtp", "embedding", "controls")

Summary = dict[str, Any]
Pairs = list[tuple[Run, Run]]
"""An arm's runs, each with the baseline's run of its seed."""
Part = tuple[str, str]
"""One of the four words, and the numbers that decide it."""


@dataclass(frozen=True)
class Claim:
    """A claim with its verdict.

    Args:
        title: the claim.
        word: one of the four words above.
        rows: (arm or loss, the numbers that decide, its own word).
        rule: how the verdict was found, or why there is none.
    """

    title: str
    word: str
    rows: tuple[tuple[str, str, str], ...]
    rule: str


def claims(report: dict[str, Any], studies: dict[str, BudgetStudy]) -> list[Claim]:
    """The claims on a report with `summary` and `scaling`; a study of other things has none."""
    if report.get("study") in OTHER_STUDIES:
        return []

    def growth(arm: Summary, _: Pairs) -> Part:
        return _growth(arm, studies)

    return [
        _claim(report, "(a) near-constant compute", _compute, COMPUTE),
        _claim(report, "(b) fewer tokens to the baseline’s loss, more so for next-2-token", _tokens, TOKENS),
        _claim(report, "(c) gap and speed-up grow with the training budget", growth, GROWTH),
        _log_linear(report),
    ]


def combined(words: Iterable[str]) -> str:
    """The verdict on what holds only if all its parts do: a contradicted part decides, an open one leaves it open."""
    found = list(words)
    return next(
        (word for word in (CONTRADICTED, INCONCLUSIVE, UNTESTED) if word in found), SUPPORTED if found else UNTESTED
    )


def _claim(report: dict[str, Any], title: str, judge: Callable[[Summary, Pairs], Part], rule: str) -> Claim:
    name, runs, references = report.get("baseline"), runs_by_arm(report), baseline_by_seed(report)
    arms = [arm for arm in report["summary"] if is_width_arm(runs[arm["name"]][0], name)]
    if not arms or not references:
        missing = f"the baseline {name} was not run" if arms else "no virtual width was run"
        return Claim(title, UNTESTED, (), f"Not tested: {missing}.")
    rows = []
    for arm in arms:
        pairs = [(run, references[run["seed"]]) for run in runs[arm["name"]] if run["seed"] in references]
        word, numbers = judge(arm, pairs)
        rows.append((arm["name"], numbers, word))
    return Claim(title, combined(word for *_, word in rows), tuple(rows), rule)


COMPUTE = f"Supported if the FLOPs per token are at most {NEAR_CONSTANT} times the baseline’s."


def _compute(arm: Summary, pairs: Pairs) -> Part:
    ratio = cost_ratio(*pairs[0], "flops") if pairs else None
    if ratio is None:
        return UNTESTED, "FLOPs not known"
    return (SUPPORTED if ratio <= NEAR_CONSTANT else CONTRADICTED), f"{ratio:.3f}× the FLOPs"


TOKENS = (
    "Speed-up in next-token loss, in next-2-token loss, and their difference. Supported if the 95 % interval of both "
    "speed-ups lies above 1, and that of their difference, paired by seed, above 0. Contradicted if one lies below, or "
    "if the arm ends above the baseline."
)


def _tokens(arm: Summary, pairs: Pairs) -> Part:
    runs = [run for run, _ in pairs]
    statuses = [run["paired"]["loss"]["status"] for run in runs]
    blocked = next((status for status in ("diverged", "different budgets") if status in statuses), None)
    if blocked:
        return INCONCLUSIVE, blocked
    parts = [*(_speedup(arm[key]) for key in LOSS_NAMES), _more_so(runs)]
    return combined(word for word, _ in parts), "; ".join(numbers for _, numbers in parts)


def _speedup(loss: Summary | None) -> Part:
    if loss is None or loss["tokens_pairs"] == 0:
        return UNTESTED, "no target"
    speedup = _estimate(loss["speedup"])
    if speedup.mean is None:
        numbers = f"reached in {speedup.n} of {seeds_text(loss['tokens_pairs'])}"
    else:
        numbers = ("≥ " if loss["tokens_at_most"] else "") + interval(loss["speedup"], ".2f", "×")
    below = speedup.sign(1.0) < 0 and not loss["tokens_at_most"]
    if below or loss["verdict"] == "higher":
        return CONTRADICTED, numbers
    return (SUPPORTED if speedup.sign(1.0) > 0 else INCONCLUSIVE), numbers


def _more_so(runs: list[Run]) -> Part:
    pairs = [[run["paired"][key] for key in LOSS_NAMES] for run in runs]
    pairs = [pair for pair in pairs if all(p is not None and p["tokens_defined"] for p in pair)]
    if not pairs:
        return UNTESTED, NOTHING
    known = all(p["speedup"] is not None and not p["tokens_at_most"] for pair in pairs for p in pair)
    difference = Estimate.over([second["speedup"] - first["speedup"] for first, second in pairs] if known else [])
    if difference.mean is None:
        return INCONCLUSIVE, "not known in every seed"
    return _by_sign(difference), interval(difference.described(), "+.2f")


GROWTH = (
    "Change of the gap in nats per token, and of the speed-up, from the first budget to the last, in next-token and in "
    "next-2-token loss. Supported if the 95 % interval of every change, paired by seed, lies above 0 and the arm ends "
    "significantly below the baseline. One validation curve cannot tell: this takes decayed losses at several budgets."
)


def _growth(arm: Summary, studies: dict[str, BudgetStudy]) -> Part:
    words, numbers = [], []
    for key, study in studies.items():
        points = [point.equal["tokens"] for point in study.arms.get(arm["name"], [])]
        if len(points) < 2:
            continue
        first, last = points[0], points[-1]
        gap_word, gap = _change(first.gap, last.gap, -1, "+.4f")
        speedup_word, speedup = _change(first.speedup, last.speedup, 1, "+.2f")
        verdict = "unknown" if arm[key] is None else arm[key]["verdict"]
        words += [gap_word, speedup_word, {"lower": SUPPORTED, "higher": CONTRADICTED}.get(verdict, INCONCLUSIVE)]
        numbers.append(f"{LOSS_NAMES[key]}: gap {gap}, speed-up {speedup}")
    return (combined(words), "; ".join(numbers)) if numbers else (UNTESTED, "fewer than two budgets")


def _change(first: Measured, last: Measured, sign: int, form: str) -> Part:
    """`sign` times the change between two budgets, over the seeds that both have."""
    if first.over_seeds.mean is None or last.over_seeds.mean is None:
        return INCONCLUSIVE, NOTHING
    pairs = [(first.by_seed[seed], last.by_seed[seed]) for seed in first.by_seed if seed in last.by_seed]
    change = Estimate.over([sign * (end - start) for start, end in pairs])
    return INCONCLUSIVE if change.mean is None else _by_sign(change), interval(change.described(), form)


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
            f"{interval(found['slope'], '+.4f')} per doubling of r, R² {fixed(found['r2'], '.3f')}",
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
