"""One forward pass, seen sublayer by sublayer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vwn.common.errors import UserError
from vwn.hf import VirtualWidthForCausalLM
from vwn.hf.lookahead import Lookahead, Reader
from vwn.nn.connection import Connection

Visit = Callable[[int, Tensor, Tensor, Connection], None]

_SHORT = {"self_attn": "attn"}


class RecordingLookahead(Lookahead):
    """Reads and writes one at a time, and shows every state with what is written to it."""

    def __init__(self, visit: Visit) -> None:
        super().__init__()
        self._visit, self.index = visit, 0

    def read(self, state: Tensor, reader: Reader) -> Tensor:
        return reader.connection.read(state, reader.norm)

    def write_read(self, state: Tensor, z: Tensor, connection: Connection, reader: Reader) -> tuple[Tensor, Tensor]:
        new = self.write(state, z, connection)
        return new, self.read(new, reader)

    def write(self, state: Tensor, z: Tensor, connection: Connection, ahead: Reader | None = None) -> Tensor:
        self._visit(self.index, state, z, connection)
        self.index += 1
        return connection.write(state, z)


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

    Raises:
        UserError: a backbone that does not hand its layers what accompanies the state.
    """
    lookahead = RecordingLookahead(visit)

    def use_ours(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, kwargs | {"lookahead": lookahead}

    hook = model.model.backbone.register_forward_pre_hook(use_ours, with_kwargs=True)
    try:
        if model.model.backbone.arguments is None:
            # the whole model, so that what shards it gathers its weights
            state = model(ids, use_cache=False, output_over_width_state=True, logits_to_keep=1).over_width_state
            if lookahead.index == len(sublayer_names(model)):
                return state
    finally:
        hook.remove()
    raise UserError(
        f"a backbone of type {model.config.backbone.model_type} does not hand all of its layers what accompanies the "
        "state, so they cannot be looked into"
    )


def sublayer_names(model: VirtualWidthForCausalLM) -> list[str]:
    """``attn 1, mlp 1, attn 2, ...`` in the order in which they run."""
    layers = enumerate(model.model.layers, 1)
    return [f"{_SHORT.get(name, name)} {number}" for number, layer in layers for name in layer.layout.names]
