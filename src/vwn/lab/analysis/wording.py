"""Numbers in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

NOTHING = "–"
# No-break spaces: a number and what belongs to it stay on one line.
PLUS_MINUS = "\u00a0±\u00a0"
PERCENT = "\u00a0%"
UNITS = {1: "", 10**3: "k", 10**6: "M", 10**9: "G", 10**12: "T"}
LOSS_NAMES = {"loss": "next-token loss", "loss_2": "next-2-token loss"}
VERDICT_WORDS = {"lower": "lower", "higher": "higher", "undecided": "not significant", "unknown": "not comparable"}


def fixed(value: float | None, form: str) -> str:
    """Write `value` by a format specification such as `+.4f`, or a dash."""
    return NOTHING if value is None else format(value, form)


def scaled(value: float | None) -> str:
    """Write three significant digits with k, M, G, T, or a dash."""
    if value is None:
        return NOTHING
    units, power = tuple(UNITS.values()), 0
    # Half below the step, as it will be rounded: 999,999 is 1M, not 1000k.
    while value / 1000.0**power >= 999.5 and power < len(units) - 1:
        power += 1
    number = value / 1000.0**power
    digits = 0 if number >= 100 or (power == 0 and number == int(number)) else 1 if number >= 10 else 2
    return f"{number:.{digits}f}{units[power]}"


def budget(tokens: float) -> str:
    """Write a budget as asked for, `1M` for the 999,424 tokens of whole steps; three digits if it is not round."""
    near = float(f"{tokens:.1e}")
    value = near if abs(near - tokens) < 0.001 * tokens else tokens
    unit = max((unit for unit in UNITS if unit <= value), default=1)
    return f"{value / unit:.3g}{UNITS[unit]}"


def mebibytes(value: float | None) -> str:
    """Write bytes as MiB, or a dash; one unit, so that a column can be compared."""
    return NOTHING if value is None else f"{value / 2**20:,.0f} MiB"


def estimate(value: dict[str, Any], signed: bool = False) -> str:
    """Return the mean ± sample standard deviation in nats; the mean alone for one seed; a dash where there is none."""
    if value["mean"] is None:
        return NOTHING
    digits = 3 if not value["std"] or value["std"] >= 0.001 else 4
    mean = f"{value['mean']:{'+' if signed else ''}.{digits}f}"
    return mean if value["std"] is None else f"{mean}{PLUS_MINUS}{value['std']:.{digits}f}"


def interval(value: dict[str, Any], form: str) -> str:
    """Write `1.19 (1.12 to 1.26)`, the mean and its 95 % interval, `1.19 (one seed)`, or a dash without a mean."""
    return bounded(value["mean"], value["interval"], form)


def bounded(mean: float | None, bounds: Sequence[float] | None, form: str, unit: str = "") -> str:
    """Return the mean and what it lies between, as in `interval`."""
    if mean is None:
        return NOTHING
    between = "one seed" if bounds is None else f"{bounds[0]:{form}} to {bounds[1]:{form}}"
    return f"{mean:{form}}{unit} ({between})"


def tokens_needed(loss: dict[str, Any]) -> str:
    """Write the share of the baseline's tokens needed: `63 ± 2 %`, "not reached", "in 2 of 3 seeds", or a dash."""
    share, pairs = loss["tokens_fraction"], loss["tokens_pairs"]
    if pairs == 0:
        return NOTHING
    if share["mean"] is None:
        return "not reached" if share["n"] == 0 else f"reached in {share['n']} of {pairs} seeds"
    bound = "≤ " if loss["tokens_at_most"] else ""
    digits = 0 if not share["std"] or share["std"] >= 0.005 else 1
    spread = f"{PLUS_MINUS}{100 * share['std']:.{digits}f}" if share["std"] else ""
    return f"{bound}{100 * share['mean']:.{digits}f}{spread}{PERCENT}"


def ratio(value: float | None, reference: float | None) -> str:
    """Write `value / reference` as `1.31×`, or an empty string where it is not defined."""
    return f"{value / reference:.2f}×" if value is not None and reference else ""


def seeds_text(count: int) -> str:
    """Write `1 seed`, `3 seeds`."""
    return f"{count} seed" if count == 1 else f"{count} seeds"


def listed(names: Iterable[str]) -> str:
    """Write `a`, `a and b`, `a, b and c`."""
    *head, last = names
    return f"{', '.join(head)} and {last}" if head else last


def printable(text: str) -> str:
    """Return `text` with a question mark for every character that cannot be printed."""
    return "".join(character if character.isprintable() or character == "\u00a0" else "?" for character in text)
