"""What a model with virtual width costs, in parameters, FLOPs and bytes, before anything is run.

The connections' part is section 3.5 of the paper, in :mod:`vwn.cost.connection`; the rest follows from the shapes of
the model's modules. Importing this needs torch only, the cost of a whole model needs transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from vwn.common.errors import UserError
from vwn.cost.connection import BYTES_PER_ELEMENT, PLAIN_ACTIVATION_BYTES, ConnectionCost, connection_cost
from vwn.nn.connection import Connection
from vwn.nn.embedding import OverWidthEmbedding, OverWidthReduce, UnembeddingExpand
from vwn.nn.geometry import Geometry
from vwn.nn.multi_token import BlockLinear, MultiTokenPredictor
from vwn.nn.ngram import NgramEmbedding

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["ConnectionCost", "CostTable", "ForwardFlops", "ModelCost", "connection_cost", "cost_table", "model_cost"]

_NAME_WIDTH = 20  # of the table's first column; a longer name is cut


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one token's forward pass, matrix products only: norms, activations, softmax and rotary are left out.

    MTP modules count in every part; their layers' matrices are in ``linear``, ``experts`` and so on.
    """

    linear: int = 0
    """Attention projections, dense FFNs, shared experts and routers."""
    attention_scores: int = 0
    """``Q Kᵀ`` and its product with ``V``, over the full sequence: the causal mask saves nothing here."""
    experts: int = 0
    """The top-k experts of a token."""
    unembedding: int = 0
    """The shared head, with a table factor's expansion, once for the next token and once for each MTP module."""
    embedding: int = 0
    """``W_expand`` of the factorised form, or the linear behind the table of a table factor; looking up is free."""
    reduce: int = 0
    """``W_reduce``, also the MTP modules'."""
    mtp_fuse: int = 0
    """The block-level linear (section 3.4)."""
    connections: int = 0
    """:attr:`ConnectionCost.matmul_flops` of all sublayers."""

    @property
    def total(self) -> int:
        """The sum of the parts."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class ModelCost:
    """Parameters and FLOPs of a causal language model.

    ``flops`` is per token of a forward pass over ``sequence_length`` tokens that computes the logits of every head.
    """

    parameters: int
    """All of them, MTP modules too, tied weights once."""
    active_parameters: int
    """Those a token meets: of the experts, the top-k."""
    sequence_length: int
    num_mtp_modules: int
    flops: ForwardFlops
    connection_norm_flops: int
    """Section 3.5's norm of all sublayers; elementwise, so not part of ``flops``."""
    connection: ConnectionCost | None
    """Cost of one connection; ``None`` for residual connections."""

    @property
    def forward_flops_per_token(self) -> int:
        """:attr:`ForwardFlops.total`."""
        return self.flops.total

    @property
    def training_flops_per_token(self) -> int:
        """Three times the forward: the backward of a matrix product is two of its size. Recomputation comes on top."""
        return 3 * self.flops.total


def model_cost(config: PreTrainedConfig, *, sequence_length: int) -> ModelCost:
    """Cost of the model that ``AutoModelForCausalLM.from_config(config)`` builds, from the shapes of its modules.

    The model is built on the meta device, so any size fits, and is not run.

    Args:
        config: a ``VirtualWidthConfig`` or a plain causal-LM config of transformers.
        sequence_length: tokens a token attends to.

    Raises:
        UserError: ``sequence_length`` below 1, a config that is not a causal language model's, or a model with parts
            whose FLOPs do not follow from their shapes.
    """
    if sequence_length < 1:
        raise UserError(f"sequence_length must be 1 or more, got {sequence_length}")
    from vwn.hf import VirtualWidthConfig

    widened = isinstance(config, VirtualWidthConfig)
    heads = config.num_mtp_modules if widened else 0
    model = build_on_meta(config)
    connections = [module for module in model.modules() if isinstance(module, Connection)]
    costs = [
        connection_cost(c.geometry, dynamic=c.dynamic, kind=c.kind, sinkhorn_rounds=c.sinkhorn_rounds)
        for c in connections
    ]
    parameters = sum(p.numel() for p in model.parameters())
    text_config = config.get_text_config()
    idle, experts_flops = 0, 0
    for weight in _expert_weights(model):
        active = weight.numel() * top_k(model, text_config) // weight.shape[0]
        idle += weight.numel() - active
        experts_flops += 2 * active if weight.ndim == 3 else 0
    return ModelCost(
        parameters=parameters,
        active_parameters=parameters - idle,
        sequence_length=sequence_length,
        num_mtp_modules=heads,
        flops=ForwardFlops(
            attention_scores=_attention_score_flops(model, text_config.num_hidden_layers + heads, sequence_length),
            experts=experts_flops,
            connections=sum(c.matmul_flops for c in costs),
            **_matrix_flops(model, 1 + heads),
        ),
        connection_norm_flops=sum(c.norm_flops for c in costs),
        connection=costs[0] if costs else None,
    )


def build_on_meta(config: PreTrainedConfig) -> nn.Module:
    """The causal language model of a config, with shapes and no values (``UserError`` where there is none)."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"transformers has no causal language model for {type(config).__name__}; give the config of one, such as "
            "LlamaConfig, or a VirtualWidthConfig"
        )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(deepcopy(config))


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds one slice of each of its weights per expert."""
    own = [p for p in module.parameters(recurse=False) if p.ndim == 3]
    return bool(own) and all(p.shape[0] == getattr(module, "num_experts", None) for p in own)


def _expert_weights(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if is_experts(module):
            yield from module.parameters(recurse=False)


def top_k(model: nn.Module, config: PreTrainedConfig) -> int:
    """Experts that a token meets."""
    if not hasattr(config, "num_experts_per_tok"):
        raise UserError(unknown(model, "its config has experts but no num_experts_per_tok"))
    return config.num_experts_per_tok


def _matrix_flops(model: Any, num_heads: int) -> dict[str, int]:
    """FLOPs of all matrices that a token is multiplied with, by field of :class:`ForwardFlops`."""
    flops = dict.fromkeys(("linear", "unembedding", "embedding", "reduce", "mtp_fuse"), 0)
    slots = {
        id(module.fuse): module.geometry.n for module in model.modules() if isinstance(module, MultiTokenPredictor)
    }
    for module in model.modules():
        if isinstance(module, nn.Embedding | NgramEmbedding | Connection) or is_experts(module):
            continue
        matrices = [p for p in module.parameters(recurse=False) if p.ndim > 1]
        if any(p.ndim > 2 for p in matrices):
            raise UserError(unknown(model, f"{type(module).__name__} has weights that are not matrices"))
        part, times = "linear", 1
        if module is model.get_output_embeddings() or isinstance(module, UnembeddingExpand):
            part, times = "unembedding", num_heads
        elif isinstance(module, OverWidthEmbedding):
            part = "embedding"
        elif isinstance(module, OverWidthReduce):
            part = "reduce"
        elif isinstance(module, BlockLinear):
            part, times = "mtp_fuse", slots[id(module)]
        flops[part] += 2 * times * sum(p.numel() for p in matrices)
    return flops


def _attention_score_flops(model: nn.Module, depth: int, sequence_length: int) -> int:
    """``4 S`` times the width of all heads, for each attention; ``o_proj`` reads all heads side by side."""
    widths = []
    for module in model.modules():
        q, o = getattr(module, "q_proj", None), getattr(module, "o_proj", None)
        if isinstance(q, nn.Linear) and isinstance(o, nn.Linear) and q.out_features == o.in_features:
            widths.append(o.in_features)
    if len(widths) != depth:
        raise UserError(
            unknown(model, f"{len(widths)} of its {depth} layers have an attention with q_proj and o_proj of one width")
        )
    return 4 * sequence_length * sum(widths)


def unknown(model: nn.Module, why: str) -> str:
    """Why a model is refused, as a sentence."""
    return (
        f"the cost of {type(model).__name__} does not follow from its shapes: {why}; known are decoders such as Llama, "
        "Qwen3, Mixtral and Qwen3-MoE"
    )


class CostTable(NamedTuple):
    """What ``vwn cost`` shows: one dict per model for ``--json``, and the text."""

    rows: list[dict[str, Any]]
    text: str


def cost_table(configs: Mapping[str, PreTrainedConfig], sequence_length: int) -> CostTable:
    """Costs of several models side by side, against the first of them that has residual connections.

    Args:
        configs: name to config. Give the plain model the same number of MTP modules as the others.
        sequence_length: tokens a token attends to.

    Returns:
        rows of plain numbers, ``None`` where a number has no meaning, in FLOPs and bytes; the text has at most 110
        columns.

    Raises:
        UserError: as :func:`model_cost`.
    """
    costs = {name: model_cost(config, sequence_length=sequence_length) for name, config in configs.items()}
    baseline = next((c for c in costs.values() if c.connection is None), None)
    widths = {name: config.get_text_config().hidden_size for name, config in configs.items()}
    rows = [_row(name, cost, widths[name], baseline) for name, cost in costs.items()]
    return CostTable(rows, _text(rows, sequence_length))


def _row(name: str, cost: ModelCost, hidden_size: int, baseline: ModelCost | None) -> dict[str, Any]:
    c, forward = cost.connection, cost.forward_flops_per_token
    geometry = c.geometry if c else Geometry(hidden_size, 1, 1)
    traffic = asdict(c.traffic) if c else None
    unit = BYTES_PER_ELEMENT * hidden_size
    return {
        "name": name,
        "hidden_size": hidden_size,
        "m": geometry.m,
        "n": geometry.n,
        "r": geometry.ratio,
        "num_mtp_modules": cost.num_mtp_modules,
        "sequence_length": cost.sequence_length,
        "params": cost.parameters,
        "active_params": cost.active_parameters,
        "flops_per_token": forward,
        "training_flops_per_token": cost.training_flops_per_token,
        "flops_ratio": forward / baseline.forward_flops_per_token if baseline else None,
        "flops": asdict(cost.flops),
        "connection_share": cost.flops.connections / forward,
        "ends_share": (cost.flops.embedding + cost.flops.reduce + cost.flops.mtp_fuse) / forward,
        "connection_norm_flops": cost.connection_norm_flops,
        "connection_flops_per_sublayer": c.flops if c else 0,
        "activation_bytes_per_layer": PLAIN_ACTIVATION_BYTES * hidden_size + (c.activation_bytes if c else 0),
        "activation_overhead": c.activation_overhead if c else 0.0,
        "traffic_bytes": traffic,
        "traffic_units": {k: v / unit for k, v in traffic.items()} if traffic else None,
    }


def _text(rows: list[dict[str, Any]], sequence_length: int) -> str:
    return "\n".join([*_model_lines(rows), "", *_traffic_lines(rows), "", *_legend(rows, sequence_length)])


def _model_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"{'':{_NAME_WIDTH}}  {'r':>5}  {'params':>7}  {'active':>7}  {'FLOPs/token':>11}  {'× plain':>7}  {'GHC':>6}  "
        f"{'ends':>6}  {'activations/layer':>19}"
    ]
    for row in rows:
        ratio = "–" if row["flops_ratio"] is None else f"{row['flops_ratio']:.3f}"
        overhead = f" (+{row['activation_overhead']:.1%})" if row["traffic_bytes"] else ""
        saved = f"{_si(row['activation_bytes_per_layer'])}B{overhead}"
        lines.append(
            f"{_short(row['name'])}  {row['r']:5.4g}  {_count(row['params']):>7}  {_count(row['active_params']):>7}  "
            f"{_si(row['flops_per_token']):>11}  {ratio:>7}  {row['connection_share']:6.2%}  {row['ends_share']:6.2%}  "
            f"{saved:>19}"
        )
    return lines


def _traffic_lines(rows: list[dict[str, Any]]) -> list[str]:
    kinds = ("forward_fused", "forward_separate", "forward_naive", "backward_fused", "backward_separate")
    lines = [
        f"{'traffic/sublayer':{_NAME_WIDTH}}  {' forward ':-^49}  {' backward ':-^32}",
        f"{'':{_NAME_WIDTH}}" + "".join(f"  {kind.split('_')[1]:>15}" for kind in kinds),
    ]
    for row in rows:
        cells = ["–"] * len(kinds)
        if row["traffic_bytes"]:
            cells = [f"{row['traffic_units'][k]:.4g} = {_si(row['traffic_bytes'][k])}B" for k in kinds]
        lines.append(_short(row["name"]) + "".join(f"  {cell:>15}" for cell in cells))
    return lines


def _legend(rows: list[dict[str, Any]], sequence_length: int) -> list[str]:
    modules = " and ".join(str(k) for k in sorted({row["num_mtp_modules"] for row in rows}))
    return [
        f"FLOPs: forward matrix products, attention over {sequence_length} tokens, MTP modules: {modules}; "
        "training is 3 times that.",
        "GHC: the connections' share of the FLOPs; ends: share of embedding expand, reduce and MTP fuse.",
        "active: top-k of the experts, embedding tables whole. activations: bytes per token, 34·D + 4·η·r·D, η = ½.",
        f"traffic: floor per token, in D·e = in bytes, e = {BYTES_PER_ELEMENT}; fused: write with next read. "
        "k M G: 10^3 10^6 10^9.",
    ]


def _short(name: str) -> str:
    return f"{name if len(name) <= _NAME_WIDTH else name[: _NAME_WIDTH - 1] + '…':{_NAME_WIDTH}}"


def _count(value: float) -> str:
    return f"{value / 1e9:.3g}B" if value >= 0.9995e9 else f"{value / 1e6:.3g}M"


def _si(value: float) -> str:
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.4g} {prefix}"
    return f"{value:.4g} "
