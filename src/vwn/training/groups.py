"""Parameter groups with learning rates of their own: what virtual width adds need not learn as fast as the backbone."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf

import torch
from torch import nn

from vwn.common.errors import UserError
from vwn.nn.connection import Connection
from vwn.nn.embedding import OverWidthEmbedding, OverWidthReduce, UnembeddingExpand
from vwn.nn.ngram import NgramEmbedding

SHALLOW = 8
"""Sublayers up to which the routing learns as fast as the rest; those of the preset whose rates were swept."""
GROUPS = ("backbone", "table", "expansion", "routing", "reduce", "head")


def group_of_parameters(model: nn.Module) -> dict[str, str]:
    """Parameter name -> its group.

    ``table``: rows looked up by token or n-gram; ``expansion``: from the table's width to the over-width;
    ``routing``: the connections; ``reduce``: from the over-width to ``D``, its norm included; ``head``: the
    unembedding; ``backbone``: everything else, MTP modules too.
    """
    groups = {name: "backbone" for name, _ in model.named_parameters()}
    for prefix, module in model.named_modules():
        kind = _kind(prefix, module)
        for name, _ in module.named_parameters():
            full = f"{prefix}.{name}" if prefix else name
            if kind and full in groups:
                groups[full] = kind
    return groups


def _kind(prefix: str, module: nn.Module) -> str | None:
    if isinstance(module, nn.Embedding | NgramEmbedding):
        return "table"
    if isinstance(module, OverWidthEmbedding):
        return "expansion"  # its tables come later in named_modules and have the last word
    if isinstance(module, UnembeddingExpand):
        return "head"
    if isinstance(module, OverWidthReduce):
        return "reduce"
    if prefix.rsplit(".", 1)[-1] == "connections":
        return "routing"
    return "head" if prefix == "lm_head" else None


def parse_factors(items: tuple[str, ...]) -> dict[str, float]:
    """``("routing=0.3", ...)`` to ``{"routing": 0.3, ...}``.

    Raises:
        UserError: an unknown group, a factor that is no number above 0, or a group named twice.
    """
    factors: dict[str, float] = {}
    for item in items:
        group, _, text = item.partition("=")
        try:
            factor = float(text)
        except ValueError:
            factor = -1.0
        if group not in GROUPS or not 0 < factor < inf:
            raise UserError(
                f"--rate-factors takes GROUP=FACTOR, such as routing=0.3, with a group out of {', '.join(GROUPS)} "
                f"and a factor above 0; got {item!r}"
            )
        if group in factors:
            raise UserError(f"--rate-factors names {group} twice")
        factors[group] = factor
    return factors


def routing_factor(sublayers: int) -> float:
    """The share of the peak rate at which free carries over so many sublayers learn where nothing else is said.

    Free carries multiply over the ``L`` sublayers of the backbone, so small changes in all of them grow as
    ``(1 + rate)^L``. With 48 sublayers the whole rate diverged and a tenth of it did not (results/stability); between
    there and :data:`SHALLOW`, where the whole rate is sound, ``5 / L`` is a guess. A doubly-stochastic carry cannot
    grow.
    """
    return 5 / sublayers if sublayers > SHALLOW else 1.0


def default_factors(model: nn.Module) -> dict[str, float]:
    """The factors that hold where none are given, see :func:`routing_factor`."""
    sublayers = [c for name, c in model.named_modules() if isinstance(c, Connection) and ".mtp." not in name]
    free = any(c.kind == "ghc" and not c.sinkhorn_rounds for c in sublayers)
    return {"routing": routing_factor(len(sublayers))} if free and len(sublayers) > SHALLOW else {}


def scale_rates(optimizer: torch.optim.Optimizer, model: nn.Module, factors: Mapping[str, float]) -> None:
    """Split the optimiser's parameter groups so that each parameter's rate is its group's share of the peak rate."""
    kinds = group_of_parameters(model)
    factor_of = {id(p): factors.get(kinds[name], 1.0) for name, p in model.named_parameters()}
    split = []
    for group in optimizer.param_groups:
        by_factor: dict[float, list[nn.Parameter]] = {}
        for p in group["params"]:
            by_factor.setdefault(factor_of[id(p)], []).append(p)
        split += [{**group, "params": ps, "lr": group["lr"] * f} for f, ps in by_factor.items()]
    optimizer.param_groups[:] = split
