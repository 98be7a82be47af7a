"""The arms' models: their configs, and plain backbones of another size, the controls that money would buy."""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from vwn.common.errors import UserError
from vwn.cost import model_cost
from vwn.lab.compare.arms import Arm
from vwn.training.config import WidthOptions
from vwn.training.model import model_config, resize_backbone

Sizes = tuple[int | None, int | None]
TOLERANCE = {"params": 0.01, "flops": 0.02}


def arm_models(
    arms: Sequence[Arm], backbone: Any, common: WidthOptions, window: int
) -> tuple[dict[str, PreTrainedConfig], dict[str, Sizes]]:
    """Return each arm's model config, and its hidden and intermediate size if not the backbone's own, by name.

    Args:
        arms: one that matches another needs that one among them.
        backbone: config of the backbone.
        common: the options that all arms share.
        window: sequence length that FLOPs are counted for.

    Raises:
        UserError: what no arm could be trained with, before hours are spent on the others.
    """
    models: dict[str, PreTrainedConfig] = {}
    sizes: dict[str, Sizes] = {}
    for arm in sorted(arms, key=lambda a: a.matches is not None):  # what is matched must be known first
        width = arm.options(common)
        sizes[arm.name] = arm.run.get("hidden_size"), arm.run.get("intermediate_size")
        if arm.matches:
            what, other = arm.matches
            sizes[arm.name] = matched_sizes(backbone, width, models[other], what, window)
        elif "hidden_scale" in arm.run:
            hidden = arm.run["hidden_scale"] * backbone.hidden_size
            if hidden != round(hidden):
                raise UserError(f"the arm {arm.name!r} would be {hidden:g} wide; take another hidden_scale")
            sizes[arm.name] = round(hidden), None
        models[arm.name] = model_config(resize_backbone(backbone, *sizes[arm.name]), arm.m, arm.n, width)
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(models[arm.name])
    return {arm.name: models[arm.name] for arm in arms}, sizes


def matched_sizes(
    backbone: PreTrainedConfig, width: WidthOptions, target: PreTrainedConfig, what: str, window: int
) -> tuple[int, int]:
    """Find hidden and intermediate size of the plain backbone that costs what ``target`` does.

    Among the widths made of whole heads, the FFN fills up what is missing; the one taken has the FFN closest to the
    backbone's own proportion, from a quarter to four times of it.

    Args:
        backbone: that is resized.
        width: options of the plain arm (its MTP modules count as well).
        target: config of the model to match.
        what: ``"params"``, to 1 %, or ``"flops"`` (forward, per token), to 2 %.
        window: sequence length of the attention scores.

    Raises:
        UserError: no size comes close enough, or the FLOPs of a model are not known.
    """

    def cost(config: PreTrainedConfig) -> float:
        c = model_cost(config, sequence_length=window)
        return c.parameters if what == "params" else c.forward_flops_per_token

    def plain(hidden: int, ffn: int) -> float:
        return cost(model_config(resize_backbone(backbone, hidden, ffn), None, None, width))

    wanted = cost(target)
    own: Any = backbone
    step = own.hidden_size // own.num_attention_heads
    found: list[tuple[float, int, int]] = []
    for hidden in range(step, 4 * own.hidden_size + 1, step):
        try:
            base = plain(hidden, 1)
        except UserError:  # not a whole number of key and value heads
            continue
        slope = plain(hidden, 2) - base
        ffn = round((wanted - base) / slope) + 1
        proportion = ffn / hidden / (own.intermediate_size / own.hidden_size)
        if 0.25 <= proportion <= 4 and abs((base + slope * (ffn - 1)) / wanted - 1) <= TOLERANCE[what]:
            found.append((abs(log(proportion)), hidden, ffn))
    if not found:
        raise UserError(
            f"no plain backbone comes within {TOLERANCE[what]:.0%} of {wanted:,.0f} {what}; "
            "give hidden_size and intermediate_size by hand"
        )
    return min(found)[1:]
