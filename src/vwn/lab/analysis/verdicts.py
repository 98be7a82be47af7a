"""Verdicts as tables: the paper's four claims about virtual width, and whether a control explains its gain.

A claim is judged for every width arm, not for one picked afterwards: it is "supported" if all of them support it,
"contradicted" if one contradicts it, else "inconclusive". Each arm is judged at 95 %, uncorrected for their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from vwn.lab.analysis import wording
from vwn.lab.analysis.compute import speed_ratio
from vwn.lab.analysis.estimates import Estimate
from vwn.lab.analysis.runs import Run, baseline_by_seed, is_width_arm, runs_by_arm
from vwn.lab.analysis.scaling import FEWEST_WIDTHS
from vwn.lab.analysis.wording import LOSS_NAMES, interval

SUPPORTED, CONTRADICTED, INCONCLUSIVE, UNTESTED = "supported", "contradicted", "inconclusive", "not tested"
# At most this many times the baseline's FLOPs per token is near-constant compute.
NEAR_CONSTANT = 1.15
# The least share of the variance of the mean losses that a line over log2 r must explain.
LOG_LINEAR_R2 = 0.95
OTHER_STUDIES = ("family", "mtp", "embedding", "controls")

Summary = dict[str, Any]
Row = tuple[str, tuple[str, ...]]
"""A verdict on one arm or loss, and the cells that show why."""


@dataclass(frozen=True)
class Verdict:
    """A question with its answer.

    Args:
        title: the question.
        word: the answer, one of the four words above; empty where each row has an answer of its own.
        heads: column titles of the table that shows why.
        rows: cells, as many as `heads`; the last is the row's own answer.
        rule: how the answer was found, or why there is no table.
    """

    title: str
    word: str
    heads: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    rule: str = ""


def verdicts(report: dict[str, Any]) -> list[Verdict]:
    """The verdicts of a report with `summary`, `pairwise` and `scaling`; a study of other things has no claims."""
    study = report.get("study")
    if study == "controls":
        return _controls(report)
    if study in OTHER_STUDIES:
        return []
    return [
        _claim(report, "(a) near-constant compute", ("Arm", "FLOPs per token", "Training speed"), _compute, COMPUTE),
        _claim(
            report, "(b) fewer tokens to the baseline’s loss, more so for next-2-token", TOKEN_HEADS, _tokens, TOKENS
        ),
        _claim(report, "(c) gap and speed-up grow during training", GROWTH_HEADS, _growth, GROWTH),
        _log_linear_claim(report),
    ]


def combined(words: Iterable[str]) -> str:
    """The verdict on what holds only if all its parts do: a contradicted part decides, an open one leaves it open."""
    found = list(words)
    return next(
        (word for word in (CONTRADICTED, INCONCLUSIVE, UNTESTED) if word in found), SUPPORTED if found else UNTESTED
    )


def _claim(
    report: dict[str, Any],
    title: str,
    heads: tuple[str, ...],
    rows_of: Callable[[Summary, list[tuple[Run, Run]]], list[Row]],
    rule: str,
) -> Verdict:
    name, runs, references = report.get("baseline"), runs_by_arm(report), baseline_by_seed(report)
    widths = [arm for arm in report["summary"] if is_width_arm(runs[arm["name"]][0], name)]
    if not widths or not references:
        missing = f"the baseline {name} was not run" if widths else "no virtual width was run"
        return Verdict(title, UNTESTED, rule=f"Not tested: {missing}.")
    rows, words = [], []
    for arm in widths:
        pairs = [(run, references[run["seed"]]) for run in runs[arm["name"]] if run["seed"] in references]
        for word, cells in rows_of(arm, pairs):
            words.append(word)
            rows.append((arm["name"], *cells, word))
    return Verdict(title, combined(words), (*heads, "Verdict"), tuple(rows), rule)


COMPUTE = (
    f"Supported if the FLOPs per token are at most {NEAR_CONSTANT} times the baseline’s. Equal FLOPs are not equal "
    "time: the speed stands beside it."
)


def _compute(arm: Summary, pairs: list[tuple[Run, Run]]) -> list[Row]:
    speed = Estimate.over([ratio for run, other in pairs if (ratio := speed_ratio(run, other)) is not None])
    pace = "not measured" if speed.mean is None else f"{speed.mean:.2f}×"
    flops = [(run.get("flops_per_token"), other.get("flops_per_token")) for run, other in pairs[:1]]
    if not flops or not flops[0][0] or not flops[0][1]:
        return [(UNTESTED, ("not known", pace))]
    ratio = flops[0][0] / flops[0][1]
    return [(SUPPORTED if ratio <= NEAR_CONSTANT else CONTRADICTED, (f"{ratio:.3f}×", pace))]


TOKEN_HEADS = ("Arm", "Next-token speed-up", "Next-2-token speed-up", "Difference of the two")
TOKENS = (
    "Supported if the 95 % interval of the speed-up in tokens lies above 1 in both losses, and that of their "
    "difference, paired by seed, above 0. Contradicted if one lies below, or if the arm ends above the baseline."
)


def _tokens(arm: Summary, pairs: list[tuple[Run, Run]]) -> list[Row]:
    statuses = [run["paired"]["loss"]["status"] for run, _ in pairs]
    blocked = next((status for status in ("diverged", "different budgets") if status in statuses), None)
    if blocked:
        return [(INCONCLUSIVE, (blocked, blocked, blocked))]
    parts = [*(_speedup(arm[key]) for key in LOSS_NAMES), _more_so([run for run, _ in pairs])]
    return [(combined(word for word, _ in parts), tuple(cell for _, cell in parts))]


def _speedup(loss: Summary | None) -> tuple[str, str]:
    if loss is None or loss["tokens_pairs"] == 0:
        return UNTESTED, "no target"
    found = loss["speedup"]
    speedup = Estimate(found["mean"], found["std"], found["n"])
    if speedup.mean is None:
        cell = f"reached in {speedup.n} of {wording.seeds_text(loss['tokens_pairs'])}"
    else:
        cell = ("≥ " if loss["tokens_at_most"] else "") + interval(speedup.described(), ".2f", "×")
    below = speedup.sign(1.0) < 0 and not loss["tokens_at_most"]
    if below or loss["verdict"] == "higher":
        return CONTRADICTED, cell
    return (SUPPORTED if speedup.sign(1.0) > 0 else INCONCLUSIVE), cell


def _more_so(runs: list[Run]) -> tuple[str, str]:
    pairs = [[run["paired"][key] for key in LOSS_NAMES] for run in runs]
    pairs = [pair for pair in pairs if all(p is not None and p["tokens_defined"] for p in pair)]
    if not pairs:
        return UNTESTED, wording.NOTHING
    known = all(p["speedup"] is not None and not p["tokens_at_most"] for pair in pairs for p in pair)
    difference = Estimate.over([second["speedup"] - first["speedup"] for first, second in pairs] if known else [])
    if difference.mean is None:
        return INCONCLUSIVE, "not known in every seed"
    return _by_sign(difference.sign()), interval(difference.described(), "+.2f")


GROWTH_HEADS = (
    *("Arm", "Loss", "Gap at half", "Gap at the end", "Its change"),
    *("Speed-up at half", "Speed-up at the end", "Its change"),
)
GROWTH = (
    "From half of the tokens to the end; without decayed losses within one run, whose learning rate falls meanwhile. "
    "Supported if the 95 % interval of the change, paired by seed, lies above 0 for both and the arm ends "
    "significantly below the baseline."
)


def _growth(arm: Summary, pairs: list[tuple[Run, Run]]) -> list[Row]:
    return [_growth_row(arm[key], name) for key, name in LOSS_NAMES.items() if arm[key] is not None]


def _growth_row(loss: Summary, name: str) -> Row:
    words, cells = [], [name.removesuffix(" loss")]
    for kind, form, unit in (("gap", ".3f", ""), ("speedup", ".2f", "×")):
        grown = loss[f"{kind}_growth"]
        change = grown["change"]
        if change["mean"] is None:
            words.append(INCONCLUSIVE)
            cells += [wording.NOTHING, wording.NOTHING, str(grown["reason"])]
            continue
        cells += [f"{grown[at]['mean']:{form}}{unit}" for at in ("half", "end")] + [interval(change, f"+{form}")]
        words.append({"grows": SUPPORTED, "shrinks": CONTRADICTED}.get(grown["verdict"], INCONCLUSIVE))
        if loss["verdict"] == "higher":
            words.append(CONTRADICTED)
        elif loss["verdict"] != "lower":
            words.append(INCONCLUSIVE)
    return combined(words), tuple(cells)


def _log_linear_claim(report: dict[str, Any]) -> Verdict:
    title, paper = "(d) the loss falls log-linearly in r", report["scaling"]["paper"]
    fits = {key: report["scaling"][key] for key in LOSS_NAMES}
    fit = fits["loss"]
    if fit is None or fit["slope"] is None:
        few = fit is None or len(set(fit["widths"])) < FEWEST_WIDTHS
        reason = "no virtual width was run" if fit is None else fit["reason"]
        return Verdict(title, UNTESTED if few else INCONCLUSIVE, rule=f"No fit: {reason}.")
    rows = [
        (LOSS_NAMES[key], interval(found["slope"], "+.4f"), wording.fixed(found["r2"], ".3f"), log_linear(found))
        for key, found in fits.items()
        if found and found["slope"] is not None
    ]
    rule = (
        f"Fitted to {wording.listed(fit['arms'])}. The paper has {paper['slope']} with R² {paper['r2']}. Supported if "
        f"the 95 % interval of the slope lies below 0 and R² is at least {LOG_LINEAR_R2}; the next-token loss decides."
    )
    return Verdict(title, log_linear(fit), ("Loss", "Nats per doubling of r", "R²", "Verdict"), tuple(rows), rule)


def log_linear(fit: dict[str, Any]) -> str:
    """Contradicted if the loss rises, or falls and bends: R² is low and the quadratic term’s interval excludes 0."""
    if fit["verdict"] != "falls":
        return CONTRADICTED if fit["verdict"] == "rises" else INCONCLUSIVE
    if fit["r2"] is not None and fit["r2"] >= LOG_LINEAR_R2:
        return SUPPORTED
    bend = fit["curvature"]
    return CONTRADICTED if Estimate(bend["mean"], bend["std"], bend["n"]).sign() else INCONCLUSIVE


def _controls(report: dict[str, Any]) -> list[Verdict]:
    """One verdict: which of the other arms explain the gain of the first width arm in next-token loss."""
    baseline, arms, cells = report.get("baseline"), runs_by_arm(report), report["pairwise"]["loss"]
    lead = next((name for name, runs in arms.items() if is_width_arm(runs[0], baseline)), None)
    if lead is None or baseline not in arms:
        return []
    gain, rows = cells[lead][baseline], []
    for name in arms:
        if name not in (lead, baseline):
            between = cells[lead][name]
            word = {"lower": "does not explain it", "higher": "explains it"}.get(between["verdict"], INCONCLUSIVE)
            word = word if gain["verdict"] == "lower" else "no gain to explain"
            rows.append((name, *(_difference(cell) for cell in (cells[name][baseline], gain, between)), word))
    heads = ("Control", f"Control minus {baseline}", f"{lead} minus {baseline}", f"{lead} minus control", "Verdict")
    rule = (
        "Final next-token loss in nats per token, paired by seed, with 95 % intervals. A control explains the gain if "
        "it ends significantly lower; it does not if it ends significantly higher."
    )
    return [Verdict(f"Does a control explain the gain of {lead}?", "", heads, tuple(rows), rule)]


def _difference(cell: dict[str, Any]) -> str:
    return str(cell["reason"]) if cell["difference"]["mean"] is None else interval(cell["difference"], "+.4f")


def _by_sign(sign: int) -> str:
    return {1: SUPPORTED, 0: INCONCLUSIVE, -1: CONTRADICTED}[sign]
