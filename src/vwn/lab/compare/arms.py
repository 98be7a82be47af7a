"""An arm: a name, a width and options, written as one word on the command line.

``[NAME:]WIDTH[,OPTION=VALUE...]``, where WIDTH is ``plain`` or ``MxN``; such as ``4x16``, ``4x16,embedding=factorised``
or ``hc:1x4,connection=hc``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal, get_args, get_origin, get_type_hints

from vwn.common.errors import UserError
from vwn.training.config import PLAIN_OPTIONS, OutputInit, WidthOptions

BASELINE = "plain"
MATCHES = ("match_params", "match_flops")
# Options of an arm's training run; besides these an arm sets its width and the options of the width.
RUN_OPTIONS: dict[str, Any] = {
    "learning_rate": float,
    "rate_factors": str,
    "output_init": OutputInit,
    "hidden_size": int,
    "intermediate_size": int,
    "hidden_scale": float,
    **dict.fromkeys(MATCHES, str),
}

# Options of an arm that goes on from a trained model.
START_OPTIONS = ("embedding", "connection", "learning_rate", "rate_factors", "match_params")


@dataclass(frozen=True)
class Arm:
    """One arm of a comparison.

    Args:
        name: unique in the comparison; also of its run directories.
        m: fraction rate, or None for a plain backbone.
        n: slots.
        width: options of :class:`WidthOptions` that differ from the comparison's.
        run: ``learning_rate``; ``rate_factors``, joined by ``+``; ``output_init``; of a plain backbone
            ``hidden_size``, ``intermediate_size``, ``hidden_scale`` (a factor on both), ``match_params`` or
            ``match_flops`` (the arm whose parameters, or FLOPs per token, it is widened to).
    """

    name: str
    m: int | None = None
    n: int | None = None
    width: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Return whether it has no virtual width."""
        return self.m is None

    @property
    def options_set(self) -> dict[str, Any]:
        """Return all options that it sets besides its width."""
        return self.width | self.run

    @property
    def matches(self) -> tuple[str, str] | None:
        """``("params" or "flops", arm)`` for a backbone that is to cost as much as another arm."""
        for option in MATCHES:
            if option in self.run:
                return option.removeprefix("match_"), self.run[option]
        return None

    def options(self, common: WidthOptions) -> WidthOptions:
        """Return the comparison's options with this arm's own."""
        common = common.for_plain_model if self.is_plain else common
        return dataclasses.replace(common, **self.width)


def parse_arm(text: str) -> Arm:
    """Parse an arm's word; refuse a width, option or value that does not exist."""
    name, colon, spec = text.rpartition(":")
    width, *pairs = spec.split(",")
    m, n = parse_width(width)
    if colon and not re.fullmatch(r"[\w.+-]+", name):
        raise UserError(f"the name of an arm has letters, digits and . + - _ only; got {name!r} in {text!r}")
    arm = Arm(name or ",".join([BASELINE if m is None else f"{m}x{n}", *pairs]), m, n)
    kinds = RUN_OPTIONS | get_type_hints(WidthOptions)
    for pair in pairs:
        option, _, value = pair.partition("=")
        if option not in kinds:
            raise UserError(f"an arm has no option {option!r} (in {text!r}); there are {', '.join(sorted(kinds))}")
        chosen = arm.run if option in RUN_OPTIONS else arm.width
        if option in chosen:
            raise UserError(f"the arm {text!r} sets {option} twice")
        chosen[option] = _value(value, kinds[option], f"{option} of the arm {text!r}")
    _check(arm, text)
    return arm


def check_arms(arms: Iterable[Arm]) -> tuple[Arm, ...]:
    """Return the arms; refuse equal names, and an arm that matches another which matches a third, or is not there."""
    arms = tuple(arms)
    names = [arm.name for arm in arms]
    if not names:
        raise UserError("--arms needs at least one value")
    if len(set(names)) != len(names):
        raise UserError(f"--arms names an arm twice: {' '.join(names)}")
    for arm in arms:
        if arm.matches and arm.matches[1] not in {a.name for a in arms if not a.matches}:
            raise UserError(f"the arm {arm.name!r} matches {arm.matches[1]!r}, which is not another arm here")
    return arms


def check_start_options(arms: Iterable[Arm]) -> None:
    """Refuse options of arms that a trained model decides."""
    for arm in arms:
        if decided := sorted(arm.options_set.keys() - set(START_OPTIONS)):
            known = ", ".join(START_OPTIONS)
            raise UserError(f"the arm {arm.name!r} sets {decided[0]}, which --init-from decides; arms take {known}")


def parse_width(name: str) -> tuple[int | None, int | None]:
    """Parse ``plain`` to ``(None, None)``, ``"4x16"`` to ``(4, 16)``; refuse anything else."""
    if name == BASELINE:
        return None, None
    found = re.fullmatch(r"(\d+)x(\d+)", name)
    if not found:
        raise UserError(f"a width is 'plain' or MxN, such as 4x16; got {name!r}")
    return int(found[1]), int(found[2])


def _value(text: str, kind: Any, what: str) -> Any:
    choices = [c for part in (kind, *get_args(kind)) if get_origin(part) is Literal for c in get_args(part)]
    if choices or kind is bool:
        choices = choices or ["true", "false"]
        if text not in choices:
            raise UserError(f"{what} must be one of {', '.join(choices)}; got {text!r}")
        return text == "true" if kind is bool else text
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"{what} must be a {'whole ' if kind is int else ''}number; got {text!r}") from None


def _check(arm: Arm, text: str) -> None:
    for option in ("learning_rate", "hidden_size", "intermediate_size", "hidden_scale"):
        if not 0 < arm.run.get(option, 1) < inf:
            raise UserError(f"{option} of the arm {text!r} must be above 0 and finite; got {arm.run[option]}")
    sizes = [o for o in (*MATCHES, "hidden_size", "hidden_scale") if o in arm.run]
    if len(sizes) > 1:
        raise UserError(f"the arm {text!r} sets its size twice: {' and '.join(sizes)}")
    if not arm.is_plain and (sizes or "intermediate_size" in arm.run):
        raise UserError(f"the arm {text!r} changes the backbone's size, which is for 'plain' arms")
    wide_only = sorted(arm.width.keys() - set(PLAIN_OPTIONS))
    if arm.is_plain and wide_only:
        raise UserError(f"the arm {text!r} sets {', '.join(wide_only)}, which needs a virtual width")
