"""Parameter groups for an optimiser: what virtual width adds does not learn as fast as the backbone."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from vwn.common.errors import UserError
from vwn.nn.connection import Connection
from vwn.nn.embedding import OverWidthEmbedding, OverWidthReduce, UnembeddingExpand
from vwn.nn.ngram import NgramEmbedding
from vwn.nn.weight_decay import no_weight_decay

SHALLOW = 8
"""Sublayers up to which the routing learns as fast as the rest; those of the preset whose rates were swept."""
TABLE_FACTOR, REDUCE_FACTOR = 10.0, 0.1
"""Shares of the rate, tuned for plain and wide models alike (results/rates)."""
GROUPS = ("backbone", "table", "expansion", "routing", "reduce", "head")
HEADS = ("lm_head", "head", "unembedding")
"""Names of the unembedding in a model; a Hugging Face model says itself which module it is."""

Group = dict[str, Any]


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.1,
    optimizer: str = "adamw",
    factors: Mapping[str, float] | None = None,
) -> Any:
    """Split a model's trainable parameters into groups with their own learning rate and weight decay.

    ``torch.optim.AdamW(vwn.parameter_groups(model, lr=3e-3))`` works for Hugging Face models and for any module with
    ours inside. The rates are those of :func:`default_factors`; what weight decay spares, :func:`vwn.no_weight_decay`
    says. With ``"muon"`` the backbone's matrices go to ``torch.optim.Muon``, which should be given
    ``adjust_lr_fn="match_rms_adamw"`` so that one ``lr`` suits both, and everything else (vectors, routing, tables,
    expansion, reduce, unembedding, and stacked experts, which are no matrices) to AdamW.

    Args:
        model: plain or of virtual width.
        lr: peak learning rate of the backbone.
        weight_decay: of the decayed parameters.
        optimizer: ``"adamw"`` or ``"muon"``.
        factors: shares of ``lr`` by group, out of :data:`GROUPS`, in place of the default ones.

    Returns:
        parameter groups for AdamW; with ``"muon"`` those for Muon and those for AdamW.

    Raises:
        UserError: an unknown optimiser or group, or a factor that is not above 0.
    """
    if optimizer not in ("adamw", "muon"):
        raise UserError(f"optimizer must be 'adamw' or 'muon', got {optimizer!r}")
    shares = check_factors(factors or {})
    if not set(GROUPS) <= shares.keys():
        shares = default_factors(model) | shares
    kinds, spared = group_of_parameters(model), no_weight_decay(model)
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    by_muon = {name for name, p in parameters if kinds[name] == "backbone" and p.ndim == 2 and name not in spared}

    def groups(names: set[str]) -> list[Group]:
        """Group by decay, then by rate; the order is part of what an optimiser's checkpoint means."""
        found: dict[tuple[bool, float], list[Tensor]] = {}
        for is_spared in (False, True):
            for name, p in parameters:
                if name in names and (name in spared) == is_spared:
                    found.setdefault((is_spared, shares.get(kinds[name], 1.0)), []).append(p)
        return [
            {"params": ps, "lr": lr * share, "weight_decay": 0.0 if is_spared else weight_decay}
            for (is_spared, share), ps in found.items()
        ]

    everything = {name for name, _ in parameters}
    return groups(everything) if optimizer == "adamw" else (groups(by_muon), groups(everything - by_muon))


def group_of_parameters(model: nn.Module) -> dict[str, str]:
    """Return parameter name -> its group.

    ``table``: rows looked up by token, n-gram or position; ``expansion``: from the table's width to the over-width;
    ``routing``: the connections; ``reduce``: from the over-width to ``D``, its norm included; ``head``: the
    unembedding; ``backbone``: everything else, MTP modules too. A tied unembedding is its table.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    groups = dict.fromkeys(names.values(), "backbone")
    head = _head(model)
    for module in model.modules():
        kind = "head" if module is head else _kind(module)
        for parameter in module.parameters() if kind else ():
            groups[names[id(parameter)]] = kind or "backbone"
    for table in _tables(model):
        groups[names[id(table)]] = "table"
    return groups


def _kind(module: nn.Module) -> str | None:
    if isinstance(module, OverWidthEmbedding) or getattr(module, "parameter_group", None) == "expansion":
        return "expansion"
    if isinstance(module, UnembeddingExpand):
        return "head"
    if isinstance(module, OverWidthReduce):
        return "reduce"
    return "routing" if isinstance(module, Connection) else None


def _head(model: nn.Module) -> nn.Module | None:
    own = getattr(model, "get_output_embeddings", lambda: None)()
    named = (getattr(model, name, None) for name in HEADS)
    return own if own is not None else next((m for m in named if isinstance(m, nn.Module)), None)


def _tables(model: nn.Module) -> list[nn.Parameter]:
    return [p for m in model.modules() if isinstance(m, nn.Embedding | NgramEmbedding) for p in m.parameters()]


def default_factors(model: nn.Module) -> dict[str, float]:
    """Return the shares of the rate that hold where none are given; groups at the whole rate are left out.

    ``table``: ten times the rate for rows that start at unit variance, as those of ``torch.nn.Embedding`` do, and are
    not tied to the unembedding. Matrices start at about a tenth of that, so the relative step is the same. ``reduce``:
    a tenth, where it is a linear. ``routing``: see :func:`routing_factor`.
    """
    factors = {}
    if _has_unit_table(model):
        factors["table"] = TABLE_FACTOR
    if any(isinstance(m, OverWidthReduce) and m.form == "linear" for m in model.modules()):
        factors["reduce"] = REDUCE_FACTOR
    sublayers = [c for name, c in model.named_modules() if isinstance(c, Connection) and ".mtp." not in f".{name}"]
    free = any(c.kind == "ghc" and not c.sinkhorn_rounds for c in sublayers)
    if free and len(sublayers) > SHALLOW:
        factors["routing"] = routing_factor(len(sublayers))
    return factors


@torch.no_grad()
def _has_unit_table(model: nn.Module) -> bool:
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]  # n-gram rows start at zero and follow
    head = _head(model)
    tied = {id(p) for p in head.parameters()} if head is not None else set()
    if not tables or any(id(p) in tied for p in tables):
        return False
    own = getattr(model, "get_input_embeddings", lambda: None)()
    table = own.weight if isinstance(own, nn.Embedding) else max(tables, key=lambda p: p.numel())
    return not table.is_meta and float(table.float().square().mean().sqrt()) >= 0.5


def routing_factor(sublayers: int) -> float:
    """Return the share of the peak rate at which free carries learn by default in a model of so many sublayers.

    Free carries multiply over the ``L`` sublayers of the backbone, so small changes in all of them grow as
    ``(1 + rate)^L``. With 48 sublayers the whole rate diverged and a tenth of it did not (results/stability); between
    there and :data:`SHALLOW`, where the whole rate is sound, ``5 / L`` is a guess. A doubly-stochastic carry cannot
    grow.
    """
    return 5 / sublayers if sublayers > SHALLOW else 1.0


def check_factors(factors: Mapping[str, float]) -> dict[str, float]:
    """Return the factors; raise a ``UserError`` for an unknown group, or a factor that is no number above 0."""
    for group, factor in factors.items():
        if group not in GROUPS:
            raise UserError(f"there is no parameter group {group!r}; there are {', '.join(GROUPS)}")
        if not 0 < factor < inf:
            raise UserError(f"the factor of the parameter group {group!r} must be above 0, got {factor}")
    return dict(factors)
