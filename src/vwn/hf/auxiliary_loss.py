"""Losses that a backbone's own causal LM adds to the next-token loss: for balanced routers, and for small logits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from vwn.common.errors import UserError
from vwn.hf.families import family_of

_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def router_loss_weight(config: Any) -> float | None:
    """Return the weight of the routers' loss; ``None`` where the type's own causal LM adds none."""
    if family_of(config).no_aux_loss or not getattr(config, "is_moe", True):
        return None
    return next((getattr(config, name) for name in _COEFFICIENTS if hasattr(config, name)), None)


def router_loss(router_logits: tuple[Tensor, ...], config: Any, attention_mask: Any = None) -> Tensor:
    """Compute the load-balancing loss, a scalar: ``k`` where the tokens are spread evenly over the experts.

    Args:
        router_logits: for each layer with experts ``[B * S, experts]``; for Doge ``[2, B * S, keys]``.
        config: of the backbone.
        attention_mask: 0 at padding, ``[B, S or more]``; it may cover a cache as well. Other forms are not taken.
    """
    if not router_logits:
        raise UserError(
            f"a backbone of type {config.model_type} hands out no router logits; set its output_router_logits to false"
        )
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        attention_mask = attention_mask[:, -(router_logits[0].shape[-2] // attention_mask.shape[0]) :]
    else:
        attention_mask = None
    experts = next(count for count in (getattr(config, name, None) for name in _EXPERTS) if count)
    if config.model_type == "doge":
        from transformers.models.doge.modeling_doge import load_balancing_loss_func as of_product_keys

        keys = math.floor(math.sqrt(experts))
        return of_product_keys(router_logits, experts, keys, config.num_experts_per_tok, attention_mask)
    return load_balancing_loss_func(router_logits, experts, config.num_experts_per_tok, attention_mask)


def penalises_logits(config: Any) -> bool:
    """Return whether the type's own causal LM adds a loss for large logits (Bamba)."""
    return getattr(config, "z_loss_coefficient", 0) > 0


def logit_loss(logits: Tensor, config: Any) -> Tensor:
    """Compute the weighted mean square of the log of the softmax's denominator: ``[B, S, V]`` to a float32 scalar."""
    return config.z_loss_coefficient * torch.logsumexp(logits, dim=-1).float().pow(2).mean()
