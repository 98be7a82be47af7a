"""What the models return."""

from dataclasses import dataclass

from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import ModelOutput


@dataclass
class VirtualWidthModelOutput(ModelOutput):
    """Output of :class:`VirtualWidthModel`.

    ``last_hidden_state`` ``[B, S, D]`` is reduced and normed; ``over_width_state`` ``[B, S, D']`` is the state before
    that and ``initial_state`` ``[B, S, D']`` the over-width embedding; ``hidden_states`` are over-width. Backbones that
    call their cache ``cache_params`` (Mamba) find it there.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    cache_params: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    over_width_state: Tensor | None = None
    initial_state: Tensor | None = None


@dataclass
class VirtualWidthCausalLMOutput(ModelOutput):
    """Output of :class:`VirtualWidthForCausalLM`.

    ``losses`` are the next-token loss and one for each MTP module, in nats per token and unweighted; ``loss`` is their
    weighted sum plus the router's auxiliary loss. ``mtp_logits`` holds one ``[B, S, V]`` for each MTP module: at
    position ``t`` module ``k`` (from 1) predicts token ``t + 1 + k``. ``over_width_state`` ``[B, S, D']``, if asked
    for, is what the first of them starts from.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    cache_params: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None
    losses: tuple[Tensor, ...] | None = None
    mtp_logits: tuple[Tensor, ...] | None = None
    over_width_state: Tensor | None = None
