"""The report's tables as HTML fragments; every string from the report is escaped."""

from __future__ import annotations

from html import escape
from typing import Any

from vwn.compare import wording
from vwn.compare.figures import LineStyle, arm_styles
from vwn.compare.wording import LOSS_NAMES, NOTHING, PERCENT, PLUS_MINUS

VERDICT_WORDS = {"lower": "below", "higher": "above", "undecided": "not decided", "unknown": "not comparable"}


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
    """One row per arm: geometry, size, compute, speed, memory and learning rate, with factors over the baseline."""
    styles, baseline = arm_styles(report), wording.baseline_summary(report)
    heads = ["Arm", "m", "n", "r", "Parameters", "FLOPs per token", "Tokens per second", "Peak memory", "Learning rate"]
    rows = []
    for arm in report["summary"]:
        geometry = [_number(f"{arm[field]:.4g}") for field in ("m", "n", "r")]
        rate = arm["learning_rate"]
        last = NOTHING if rate is None else _number(f"{rate:.3g}")
        rows.append([_arm(arm["name"], styles), *geometry, *_cost_cells(arm, baseline), last])
    return _table("Arms and their cost", heads, rows)


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
    return f'<span class="arm"><span class="swatch" style="background:{styles[name].colour}"></span>{text(name)}</span>'


def _number(value: str) -> str:
    """With a true minus sign, and the spread apart so that a narrow page can set it below the mean."""
    mean, separator, spread = text(value.replace("-", "−")).partition(PLUS_MINUS)
    return f'{mean}<span class="spread">{separator}{spread}</span>' if spread else mean


def _detail(value: str) -> str:
    return f"<small>{text(value)}</small>" if value else ""


def _against(loss: dict[str, Any]) -> list[str]:
    if loss["verdict"] == "baseline":
        return ["baseline", text(wording.tokens_needed(loss))]
    difference = _number(wording.estimate(loss["difference"], signed=True)) + _detail(VERDICT_WORDS[loss["verdict"]])
    speedup, bound = loss["speedup"]["mean"], "≥ " if loss["tokens_at_most"] else ""
    gain = "" if speedup is None else _detail(f"speed-up {bound}{speedup:.2f}×")
    return [difference, text(wording.tokens_needed(loss)) + gain]


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
