"""Parameters and FLOPs of a whole model, counted before anything is run.

The model is built on the meta device and PyTorch's FLOP counter watches one forward pass, so every causal language
model of transformers whose forward pass does not branch on data has a cost.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from vwn.common.errors import UserError
from vwn.cost.connection import ConnectionCost, connection_cost
from vwn.nn.connection import Connection
from vwn.nn.embedding import OverWidthEmbedding, OverWidthReduce, UnembeddingExpand
from vwn.nn.multi_token import BlockLinear
from vwn.ops import library as _library  # noqa: F401  # registers the FLOPs of our ops with the counter

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one token's forward pass: matrix products and convolutions, no norms, activations or softmax.

    MTP modules are included in every part.
    """

    layers: int = 0
    """The backbone's layers: projections, attention scores, FFNs and the top-k experts. Attention counts every pair of
    tokens, also those that a causal or sliding mask hides."""
    unembedding: int = 0
    """The shared head, with a table factor's expansion, once for the next token and once for each MTP module."""
    embedding: int = 0
    """``W_expand`` of the factorised form, or the linear behind the table of a table factor; a look-up is free."""
    reduce: int = 0
    """``W_reduce``, also that of the MTP modules."""
    mtp_fuse: int = 0
    """The block-level linear (section 3.4)."""
    connections: int = 0
    """:attr:`ConnectionCost.matmul_flops` of all sublayers."""

    @property
    def total(self) -> int:
        """FLOPs of all parts."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class ModelCost:
    """Parameters and FLOPs of a causal language model.

    ``flops`` is per token of a forward pass over the window that computes the logits of every head.
    """

    parameters: int
    """MTP modules included; tied weights count once."""
    active_parameters: int
    """Parameters that a token meets: of the experts, the top-k."""
    flops: ForwardFlops
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
    """Count parameters and FLOPs of the model that ``AutoModelForCausalLM.from_config(config)`` builds.

    Args:
        config: a ``VirtualWidthConfig`` or a plain causal-LM config of transformers.
        sequence_length: tokens a token attends to.

    Raises:
        UserError: ``sequence_length`` below 1, a config that is not a causal language model's, or a model whose forward
            pass needs values, such as a loop over the experts that were hit.
    """
    return cost_of_model(*count(config, sequence_length))


def count(config: PreTrainedConfig, sequence_length: int) -> tuple[Any, dict[str, int]]:
    """Build the model of a config on the meta device and count the forward FLOPs per token of each of its modules.

    Returns:
        the model, and module name to FLOPs; ``""`` is the whole model.

    Raises:
        UserError: as :func:`model_cost`.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    if sequence_length < 1:
        raise UserError(f"sequence_length must be 1 or more, got {sequence_length}")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"transformers has no causal language model for {type(config).__name__}; give the config of one, such as "
            "LlamaConfig, or a VirtualWidthConfig"
        )
    with torch.device("meta"):  # with attention and experts as the counter knows them
        model = AutoModelForCausalLM.from_config(
            deepcopy(config), attn_implementation="eager", experts_implementation="batched_mm"
        ).eval()
    for module in model.modules():
        if isinstance(module, Connection):
            module.set_backend("reference")
    return model, _count_forward(model, sequence_length)


def cost_of_model(model: Any, counted: dict[str, int]) -> ModelCost:
    """Summarise what :func:`count` found."""
    costs = [
        connection_cost(
            c.geometry, dynamic=c.dynamic, kind=c.kind, sinkhorn_rounds=c.sinkhorn_rounds, learned_carry=c.learned_carry
        )
        for c in model.modules()
        if isinstance(c, Connection)
    ]
    flops = {"connections": sum(c.matmul_flops for c in costs)}
    for name, module in model.named_modules():
        if part := _part(model, module):
            flops[part] = flops.get(part, 0) + counted.get(name, 0)
    parameters = sum(p.numel() for p in model.parameters())
    idle = sum(
        round((1 - share) * sum(p.numel() for p in module.parameters(recurse=False)))
        for module, share in expert_shares(model, counted).items()
    )
    return ModelCost(
        parameters=parameters,
        active_parameters=parameters - idle,
        flops=ForwardFlops(layers=counted[""] - sum(flops.values()), **flops),
        connection=costs[0] if costs else None,
    )


class _WithoutValues(TorchFunctionMode):
    """Answer what models ask about values before they compute, such as whether there is padding."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__bool__:
            return True
        return False if func is Tensor.__contains__ else func(*args, **(kwargs or {}))


def _count_forward(model: Any, length: int) -> dict[str, int]:
    options = {"output_mtp_logits": True} if getattr(model.config, "num_mtp_modules", 0) else {}
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), torch.device("meta"), counter, _WithoutValues():
            model(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False, **options)
    except Exception as error:
        raise UserError(
            f"the cost of {type(model).__name__} cannot be counted: its forward pass needs values, not only shapes "
            f"({type(error).__name__})"
        ) from error
    root = type(model).__name__
    sums = {name: sum(ops.values()) // length for name, ops in counter.flop_counts.items()}
    return {name.removeprefix(root).removeprefix("."): flops for name, flops in sums.items() if name != "Global"}


def _part(model: Any, module: nn.Module) -> str | None:
    """Return the field of :class:`ForwardFlops` that a module outside the layers belongs to."""
    if module is model.get_output_embeddings() or isinstance(module, UnembeddingExpand):
        return "unembedding"
    parts = {OverWidthEmbedding: "embedding", OverWidthReduce: "reduce", BlockLinear: "mtp_fuse"}
    return next((part for kind, part in parts.items() if isinstance(module, kind)), None)


def expert_shares(model: nn.Module, counted: dict[str, int]) -> dict[nn.Module, float]:
    """Find the modules with the weights of all experts, ``[experts, in, out]``, and the share that a token meets."""
    found = {}
    for name, module in model.named_modules():
        stacks = [p for p in module.parameters(recurse=False) if p.ndim == 3]
        if len({p.shape[0] for p in stacks}) != 1 or isinstance(module, nn.Conv1d | Connection):
            continue
        share = counted.get(name, 0) / (2 * sum(p.numel() for p in stacks))
        if 0 < share < 1:
            found[module] = share
    return found
