"""The report's tables as HTML fragments; every string from the report is escaped."""

from __future__ import annotations

from html import escape
from typing import Any

from vwn.lab.analysis import wording
from vwn.lab.analysis.wording import LOSS_NAMES, NOTHING, PERCENT, PLUS_MINUS, VERDICT_WORDS
from vwn.lab.report.figures import LineStyle, arm_styles

CONNECTION_NAMES = {"residual": "residual", "ghc": "GHC", "hc": "HC", "mhc": "mHC"}


def text(value: Any) -> str:
    """`value` as escaped text, safe in an element or a quoted attribute."""
    return escape(str(value))


def result_table(report: dict[str, Any], key: str) -> str:
    """One row per arm: final loss, paired difference and tokens needed, in the loss `key`."""
    styles = arm_styles(report)
    heads = ["Arm", "Final loss", f"Against {report.get('baseline')}", "Tokens needed"]
    rows = [
        [_arm(arm["name"], styles), _number(wording.estimate(arm[key]["final"])), *_against(arm[key])]
        for arm in report["summary"]
        if arm[key] is not None
    ]
    return _table(f"Results in {LOSS_NAMES[key]}", heads, rows)


def run_table(report: dict[str, Any], key: str) -> str:
    """One row per arm and seed, in the loss `key`."""
    styles = arm_styles(report)
    heads = ["Arm", "Seed", "Final loss", f"Against {report.get('baseline')}", "Tokens needed", "Share", "Seconds"]
    rows = [
        [_arm(run["name"], styles), *map(_number, _run_cells(run, run["paired"][key], report.get("baseline")))]
        for run in report["arms"]
        if run["paired"][key] is not None
    ]
    return _table(f"Each run, {LOSS_NAMES[key]}", heads, rows)


def cost_table(report: dict[str, Any]) -> str:
    """One row per arm: geometry, size, compute, speed, memory and learning rate, with factors over the baseline.

    Embedding form and MTP depth have a column only where arms differ in them.
    """
    styles, baseline = arm_styles(report), wording.baseline_summary(report)
    options = [field for field in ("embedding", "mtp") if len({arm[field] for arm in report["summary"]}) > 1]
    heads = ["Arm", "Connection", "m", "n", "r", *({"embedding": "Embedding", "mtp": "MTP"}[o] for o in options)]
    heads += ["Parameters", "FLOPs per token", "Tokens per second", "Peak memory", "Learning rate"]
    rows = []
    for arm in report["summary"]:
        connection = CONNECTION_NAMES.get(arm["connection"], arm["connection"])
        words = [_or_nothing(connection), *(_number(f"{arm[field]:.4g}") for field in ("m", "n", "r"))]
        words += [_or_nothing(arm[field]) for field in options]
        rows.append([_arm(arm["name"], styles), *words, *_cost_cells(arm, baseline), _rate(arm["learning_rate"])])
    return _table("Arms and their cost", heads, rows)


def sweep_table(report: dict[str, Any]) -> str:
    """One row per arm: the rate taken, whether worse ones lie on both sides of it, and every rate tried."""
    styles = arm_styles(report)
    heads = ["Arm", "Rate taken", "Bracketed", "Criterion at each rate tried"]
    rows = []
    for entry in report["sweep"]:
        if entry["arm"] not in styles:
            continue
        tried = [f"{rate['learning_rate']:.3g}: {_loss_or_diverged(rate['loss'])}" for rate in entry["rates"]]
        bracketed = ("yes" if entry["bracketed"] else "no, at the edge") if tried else "given, not swept"
        cells = [_rate(entry["best"]), text(bracketed), "<br>".join(map(text, tried)) or NOTHING]
        rows.append([_arm(entry["arm"], styles), *cells])
    return _table("Learning-rate sweep", heads, rows)


def pairwise_table(report: dict[str, Any], key: str) -> str:
    """Every arm against every other: the row's final loss minus the column's, paired by seed."""
    styles, cells = arm_styles(report), report["pairwise"][key]
    rows = [
        [_arm(name, styles), *(NOTHING if other == name else _cell(cells[name][other]) for other in cells)]
        for name in cells
    ]
    return _table(f"Row minus column, final {LOSS_NAMES[key]}", ["Arm", *cells], rows)


def equal_cost_table(report: dict[str, Any], key: str) -> str:
    """One row per arm but the baseline: the difference at equal tokens, training FLOPs and training time."""
    styles, baseline = arm_styles(report), report.get("baseline")
    heads = ["Arm", "Equal tokens", "Equal training FLOPs", "Equal training time"]
    rows = []
    for arm in report["summary"]:
        loss = arm[key]
        if loss is None or arm["is_baseline"]:
            continue
        equal = [_equal(loss[field], arm["name"], baseline) for field in ("equal_flops", "equal_seconds")]
        difference = _number(wording.estimate(loss["difference"], signed=True)) + _detail(
            VERDICT_WORDS[loss["verdict"]]
        )
        rows.append([_arm(arm["name"], styles), difference, *equal])
    return _table(f"At equal cost, {LOSS_NAMES[key]}", heads, rows)


def definition_list(title: str, settings: dict[str, Any]) -> str:
    """`settings`, nested or not, as a titled list of terms; nothing at all if there are none."""
    entries = _flat(settings)
    if not entries:
        return ""
    items = "".join(f"<dt>{text(key.replace('_', ' '))}</dt><dd>{text(value)}</dd>" for key, value in entries)
    return f"<section><h3>{text(title)}</h3><dl>{items}</dl></section>"


def _table(caption: str, heads: list[str], rows: list[list[str]]) -> str:
    """Header texts, and rows of ready HTML whose first cell heads the row."""
    head = "".join(f'<th scope="col">{text(title)}</th>' for title in heads)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    label = text(caption)
    table = f'<table aria-label="{label}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{label}, scrollable">{table}</div>'


def _arm(name: str, styles: dict[str, LineStyle]) -> str:
    return f'<span class="arm"><span class="swatch" style="background:{styles[name].css}"></span>{text(name)}</span>'


def _number(value: str) -> str:
    """With a true minus sign, and the spread apart so that a narrow page can set it below the mean."""
    mean, separator, spread = text(value.replace("-", "−")).partition(PLUS_MINUS)
    return f'{mean}<span class="spread">{separator}{spread}</span>' if spread else mean


def _detail(value: str) -> str:
    return f"<small>{text(value)}</small>" if value else ""


def _or_nothing(value: Any) -> str:
    return NOTHING if value is None else text(value)


def _rate(value: float | None) -> str:
    # Not through `_number`: the sign of an exponent is no minus.
    return NOTHING if value is None else f"{value:.3g}"


def _loss_or_diverged(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.4f}"


def _cell(found: dict[str, Any]) -> str:
    reason = found["reason"] if found["verdict"] == "unknown" else None
    return _number(wording.estimate(found["difference"], signed=True)) + _detail(
        reason or VERDICT_WORDS[found["verdict"]]
    )


def _equal(found: dict[str, Any], arm: str, baseline: str | None) -> str:
    if found["difference"]["mean"] is None:
        return NOTHING + _detail("" if found["status"] == "compared" else found["status"])
    shares = [(baseline, found["baseline_share"]), (arm, found["arm_share"])]
    early = [
        f"{name} read at {100 * share:.0f}{PERCENT}" for name, share in shares if share is not None and share < 0.995
    ]
    mean = _number(wording.estimate(found["difference"], signed=True))
    return mean + _detail(VERDICT_WORDS[found["verdict"]]) + "".join(map(_detail, early))


def _against(loss: dict[str, Any]) -> list[str]:
    if loss["verdict"] == "baseline":
        return ["baseline", _number(wording.tokens_needed(loss))]
    difference = _number(wording.estimate(loss["difference"], signed=True)) + _detail(VERDICT_WORDS[loss["verdict"]])
    speedup, bound = loss["speedup"]["mean"], "≥ " if loss["tokens_at_most"] else ""
    gain = "" if speedup is None else _detail(f"speed-up {bound}{speedup:.2f}×")
    return [difference, _number(wording.tokens_needed(loss)) + gain]


def _run_cells(run: dict[str, Any], pair: dict[str, Any], baseline: str | None) -> list[str]:
    share, bound = pair["tokens_fraction"], "≤ " if pair["tokens_at_most"] else ""
    seconds = run["curve"][-1].get("seconds") if run["curve"] else None
    missing = "not reached" if pair["tokens_defined"] else NOTHING
    difference = wording.fixed(pair["difference"], "+.4f") if pair["status"] == "compared" else pair["status"]
    return [
        str(run["seed"]),
        wording.fixed(pair["final"], ".4f"),
        "baseline" if run["name"] == baseline else difference,
        missing if pair["tokens"] is None else bound + wording.scaled(pair["tokens"]),
        NOTHING if share is None else f"{bound}{100 * share:.1f}{PERCENT}",
        wording.fixed(seconds, ",.0f"),
    ]


def _cost_cells(arm: dict[str, Any], baseline: dict[str, Any] | None) -> list[str]:
    def cell(field: str, binary: bool = False) -> str:
        factor = "" if baseline is None or arm["is_baseline"] else wording.ratio(arm[field], baseline[field])
        return _number(wording.scaled(arm[field], binary)) + _detail(factor)

    return [*map(cell, ("params", "flops_per_token", "tokens_per_second")), cell("peak_memory_bytes", binary=True)]


def _flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as `outer.inner` names with their values in words."""
    found: list[tuple[str, str]] = []
    for key, value in settings.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            found.append((f"{prefix}{key}", ", ".join(map(str, value)) or NOTHING))
        else:
            found.append((f"{prefix}{key}", "none" if value is None else str(value)))
    return found
