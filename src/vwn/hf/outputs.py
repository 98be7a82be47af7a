"""Outputs of the models."""

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

CACHE_FIELD = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""Field of outputs that holds the cache: ``"cache"`` from transformers 5.24 on."""


@dataclass
class VirtualWidthModelOutput(BaseModelOutputWithPast):
    """Output of :class:`VirtualWidthModel`.

    ``last_hidden_state`` ``[B, S, D]`` is reduced and normed; ``over_width_state`` ``[B, S, D']`` is the state before
    that and ``initial_state`` ``[B, S, D']`` the over-width embedding. ``hidden_states`` are
    reduced to ``D``, the last is ``last_hidden_state``; ``over_width_hidden_states`` are the states themselves.
    The cache is ``cache``, and ``past_key_values`` with transformers before 5.24, whatever the backbone calls it.
    """

    router_logits: tuple[Tensor, ...] | None = None
    over_width_state: Tensor | None = None
    initial_state: Tensor | None = None
    over_width_hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class VirtualWidthCausalLMOutput(CausalLMOutputWithPast):
    """Output of :class:`VirtualWidthForCausalLM`.

    ``losses`` are the next-token loss and one for each MTP module, in nats per token and unweighted; ``loss`` is their
    weighted sum plus the router's auxiliary loss. ``mtp_logits`` holds one ``[B, S, V]`` for each MTP module: at
    position ``t`` module ``k`` (from 1) predicts token ``t + 1 + k``. ``over_width_state`` ``[B, S, D']``, if asked
    for, is what the first of them starts from.
    """

    router_logits: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None
    losses: tuple[Tensor, ...] | None = None
    mtp_logits: tuple[Tensor, ...] | None = None
    over_width_state: Tensor | None = None
    over_width_hidden_states: tuple[Tensor, ...] | None = None
