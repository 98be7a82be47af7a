"""The table that ``vwn cost`` prints, and its numbers for ``--json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vwn.cost.connection import PLAIN_ACTIVATION_BYTES
from vwn.cost.model import ModelCost, model_cost
from vwn.nn.geometry import Geometry

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_NAME_WIDTH = 20  # of the first column; a longer name is cut


def cost_table(configs: Mapping[str, PreTrainedConfig], sequence_length: int) -> tuple[list[dict[str, Any]], str]:
    """Compare the costs of several models with the first of them that has residual connections.

    Args:
        configs: name to config. Give the plain model the same number of MTP modules as the others.
        sequence_length: tokens a token attends to.

    Returns:
        one dict of plain numbers per model, in FLOPs and bytes, ``None`` where a number has no meaning; and the text,
        of at most 110 columns.

    Raises:
        UserError: as :func:`model_cost`.
    """
    costs = {name: model_cost(config, sequence_length=sequence_length) for name, config in configs.items()}
    baseline = next((c for c in costs.values() if c.connection is None), None)
    rows = [_row(name, c, configs[name].get_text_config().hidden_size, baseline) for name, c in costs.items()]
    return rows, "\n".join([*_model_lines(rows), "", *_legend(sequence_length)])


def _row(name: str, cost: ModelCost, hidden_size: int, baseline: ModelCost | None) -> dict[str, Any]:
    c, forward = cost.connection, cost.forward_flops_per_token
    geometry = c.geometry if c else Geometry(hidden_size, 1, 1)
    return {
        "name": name,
        "m": geometry.m,
        "n": geometry.n,
        "r": geometry.ratio,
        "params": cost.parameters,
        "active_params": cost.active_parameters,
        "flops_per_token": forward,
        "training_flops_per_token": cost.training_flops_per_token,
        "flops_ratio": forward / baseline.forward_flops_per_token if baseline else None,
        "flops": asdict(cost.flops),
        "connection_share": cost.flops.connections / forward,
        "ends_share": (cost.flops.embedding + cost.flops.reduce + cost.flops.mtp_fuse) / forward,
        "connection_flops_per_sublayer": c.flops if c else 0,
        "activation_bytes_per_layer": PLAIN_ACTIVATION_BYTES * hidden_size + (c.activation_bytes if c else 0),
        "activation_overhead": c.activation_overhead if c else 0.0,
        "traffic_bytes": {"forward": c.forward_bytes, "backward": c.backward_bytes} if c else None,
    }


def _model_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = [["", "r", "params", "active", "FLOPs/token", "× plain", "GHC", "ends", "activations/layer", "traffic"]]
    for row in rows:
        ratio = "–" if row["flops_ratio"] is None else f"{row['flops_ratio']:.3f}"
        overhead = f" (+{row['activation_overhead']:.1%})" if row["traffic_bytes"] else ""
        sizes = [f"{row['r']:.4g}", count(row["params"]), count(row["active_params"]), _si(row["flops_per_token"])]
        shares = [f"{row['connection_share']:.2%}", f"{row['ends_share']:.2%}"]
        moved = f"{_si(sum(row['traffic_bytes'].values()))}B" if row["traffic_bytes"] else "–"
        activations = f"{_si(row['activation_bytes_per_layer'])}B{overhead}"
        lines.append([row["name"], *sizes, ratio, *shares, activations, moved])
    return align(lines)


def _legend(sequence_length: int) -> list[str]:
    return [
        f"FLOPs: forward matrix products, attention over {sequence_length} tokens, MTP; training takes 3 times that.",
        "GHC: the connections' share of the FLOPs; ends: share of embedding expand, reduce and MTP fuse.",
        "active: top-k of the experts, embedding tables whole. activations: bytes per token, 34·D + 4·η·r·D, η = ½.",
        "traffic: least bytes that a connection moves per token, forward and backward, (5·r + 5)·2·D.",
        "k M G: 10^3 10^6 10^9.",
    ]


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay out cells in columns: the first, cut to its width, on the left, the others on the right."""
    long = _NAME_WIDTH
    rows = [[first if len(first) <= long else first[: long - 1] + "…", *others] for first, *others in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        f"{first:{widths[0]}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))
        for first, *others in rows
    ]


def count(value: float) -> str:
    """Format a number of parameters."""
    return f"{value / 1e9:.3g}B" if value >= 0.9995e9 else f"{value / 1e6:.3g}M"


def _si(value: float) -> str:
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.4g} {prefix}"
    return f"{value:.4g} "
