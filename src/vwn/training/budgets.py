"""Budgets of a run whose trunk has a cool-down for each: how they are written, and the steps they mean."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from vwn.common.errors import UserError

TOKENS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Branch:
    """One budget of a run whose trunk has several: a cool-down of its own.

    Args:
        name: the budget in tokens, such as ``1M``; also the branch's folder.
        steps: optimiser steps at its end, the trunk's included.
        leaves: step of the trunk that it starts from.
    """

    name: str
    steps: int
    leaves: int


def parse_tokens(text: str) -> int:
    """Parse ``"1M"``, ``"2.5k"`` or ``"819200"`` to a number of tokens; refuse anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kKMBT]?)", text)
    tokens = round(float(found[1]) * TOKENS[found[2].upper()]) if found else 0
    if tokens < 1:
        raise UserError(f"--budgets takes numbers of tokens, such as 500k, 1M or 2.5B; got {text!r}")
    return tokens


def format_tokens(tokens: int) -> str:
    """Return the shortest way to write a number of tokens that :func:`parse_tokens` reads back, such as ``1.5M``."""
    written = [f"{tokens / unit:.15g}{letter}" for letter, unit in TOKENS.items() if tokens >= unit]
    return min([text for text in written if "e" not in text and parse_tokens(text) == tokens], key=len)


def branches_of(budgets: Iterable[str], tokens_per_step: int, cooldown: float) -> tuple[Branch, ...]:
    """Return the branch of each budget in whole steps, the smallest first; ``cooldown`` is its share of the budget."""
    found = []
    for tokens in map(parse_tokens, budgets):
        steps = max(2, round(tokens / tokens_per_step))
        found.append(Branch(format_tokens(tokens), steps, steps - decay_steps(steps, cooldown)))
    return tuple(sorted(found, key=lambda branch: branch.steps))


def decay_steps(steps: int, cooldown: float) -> int:
    """Return the steps of the cool-down at the end of a run of so many steps: at least one, and not all."""
    return min(steps - 1, max(1, round(cooldown * steps)))
