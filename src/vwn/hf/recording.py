"""One forward pass, seen sublayer by sublayer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vwn.hf import VirtualWidthForCausalLM
from vwn.nn.connection import Connection

Visit = Callable[[int, Tensor, Tensor, Connection], None]

_SHORT = {"self_attn": "attn"}


@torch.no_grad()
def record(model: VirtualWidthForCausalLM, ids: Tensor, visit: Visit) -> Tensor:
    """Run a model and show every sublayer of its backbone; MTP modules do not run.

    Args:
        model: with virtual width, in evaluation mode.
        ids: tokens, ``[B, S]``.
        visit: called with the number of the sublayer (from 0), the state that it read, ``[B, S, D']``, its output
            ``Z``, ``[B, S, D]``, and its connection.

    Returns:
        the final state, ``[B, S, D']``.
    """
    connections = [connection for layer in model.model.layers for connection in layer.connections]

    def hook(i: int) -> Any:
        return lambda _, given, __: visit(i, given[0], given[1], connections[i])

    hooks = [connection.write.register_forward_hook(hook(i)) for i, connection in enumerate(connections)]
    try:  # the whole model, so that what shards it gathers its weights
        return model(ids, use_cache=False, output_over_width_state=True, logits_to_keep=1).over_width_state
    finally:
        for handle in hooks:
            handle.remove()


def sublayer_names(model: VirtualWidthForCausalLM) -> list[str]:
    """``attn 1, mlp 1, attn 2, ...`` in the order in which they run."""
    layers = enumerate(model.model.layers, 1)
    return [f"{_SHORT.get(name, name)} {number}" for number, layer in layers for name in layer.layout.names]
