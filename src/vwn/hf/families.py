"""Facts about model types of transformers: what stands around their layers, and which cannot be widened.

The layers explain themselves (:mod:`vwn.hf.sublayers`); what stands in front of and behind them is told here, by the
names that the types' configs and modules have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vwn.hf.layouts import FoundLayout, Sublayer


@dataclass(frozen=True)
class Family:
    """The facts about one model type.

    Args:
        positions: modules between the token embedding and the first layer whose output of width ``D`` is added.
        embedding_norm: a norm of width ``D`` over the embedding.
        multiplies_embedding: field of the config that multiplies the rows of the table, outside of the table.
        head_bias: whether the unembedding has a bias.
        divides_hidden: field of the config that divides the final hidden state.
        divides_logits: field of the config that divides the logits.
        multiplies_logits: field of the config that multiplies the logits.
        no_aux_loss: whether its causal LM adds no auxiliary loss of its routers although its config has a coefficient.
        sublayers: what its layers consist of, where a forward pass on the meta device cannot tell.
        no_mtp: why one of its layers cannot be an MTP module.
        refused: why the type cannot be widened.
    """

    positions: tuple[str, ...] = ()
    embedding_norm: str | None = None
    multiplies_embedding: str | None = None
    head_bias: bool = False
    divides_hidden: str | None = None
    divides_logits: str | None = None
    multiplies_logits: str | None = None
    no_aux_loss: bool = False
    sublayers: FoundLayout | None = None
    no_mtp: str | None = None
    refused: str | None = None


_WIDENED = Family(refused="its residual stream is widened already")
_COHERE = Family(multiplies_logits="logit_scale")
_GRANITE = Family(divides_logits="logits_scaling")
_SHARED = Family(refused="its layers share weights and take the embedding beside the residual stream")

FAMILIES: dict[str, Family] = {
    "biogpt": Family(positions=("embed_positions",), sublayers=FoundLayout((Sublayer("self_attn"), Sublayer("fc1")))),
    "bloom": Family(embedding_norm="word_embeddings_layernorm"),
    "codegen": Family(head_bias=True),
    "cohere": _COHERE,
    "cohere2": _COHERE,
    "cohere2_moe": _COHERE,
    "cohere_compass_text": _COHERE,
    "dbrx": Family(refused="its layers hand their residual stream to a module inside and take it back from there"),
    "deepseek_v4": _WIDENED,
    "ctrl": Family(refused="it adds positions to the embedding in its own forward"),
    "falcon_h1": Family(
        multiplies_embedding="embedding_multiplier",
        multiplies_logits="lm_head_multiplier",
        no_mtp="its layers get a part from the whole model",
    ),
    "gemma3n": _WIDENED,
    "gemma3n_text": _WIDENED,
    "glm5_next": _WIDENED,
    "glm_moe_dsa": Family(no_mtp="its last layers need what an earlier one selected"),
    "gpt-sw3": Family(positions=("wpe",)),
    "gpt2": Family(positions=("wpe",)),
    "gpt_bigcode": Family(positions=("wpe",)),
    "gpt_neo": Family(positions=("wpe",)),
    "gptj": Family(head_bias=True),
    "granite": _GRANITE,
    "granite_swa": _GRANITE,
    "granitemoe": _GRANITE,
    "granitemoe_swa": _GRANITE,
    "granitemoehybrid": _GRANITE,
    "granitemoeshared": _GRANITE,
    "hrm_text": Family(refused="it runs its layers several times over, on states that it adds up between"),
    "hy_v4": _WIDENED,
    "hyperclovax": Family(multiplies_logits="logits_scaling"),
    "inkling_text": Family(divides_hidden="logits_mup_width_multiplier"),
    "inkling2_text": Family(refused="its layers mix all earlier states, by a residual scheme of their own"),
    "jetmoe": Family(
        sublayers=FoundLayout(
            (Sublayer("self_attention", "input_layernorm"), Sublayer("mlp", "post_attention_layernorm"))
        )
    ),
    "llama4": Family(no_aux_loss=True),
    "llama4_text": Family(no_aux_loss=True),
    "longcat_flash": Family(
        sublayers=FoundLayout(
            sublayer
            for i, mlp in enumerate(("mlp", "mlps"))
            for sublayer in (
                Sublayer("self_attn", f"input_layernorm.{i}"),
                Sublayer(mlp, f"post_attention_layernorm.{i}"),
            )
        )
    ),
    "minicpm3": Family(divides_hidden="logits_scaling"),
    "modernbert-decoder": Family(refused="its head is more than one linear map"),
    "moshi": Family(sublayers=FoundLayout((Sublayer("self_attn"), Sublayer("mlp")))),
    "opt": Family(positions=("embed_positions",)),
    "phi": Family(head_bias=True),
    "qwen4_exp": _WIDENED,
    "qwen4_exp_text": _WIDENED,
    "xglm": Family(positions=("embed_positions",)),
    "xlstm": Family(refused="its cache is of a kind of its own"),
    "zamba": _SHARED,
    "zamba2": _SHARED,
}

_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def family_of(config: Any) -> Family:
    """Return the facts about the model type of a transformers config."""
    return FAMILIES.get(config.model_type, Family())


def has_head_bias(config: Any) -> bool:
    """Return whether the unembedding has a bias."""
    return family_of(config).head_bias or bool(getattr(config, "lm_head_bias", False))


def scaled_embedding(state: Tensor, config: Any) -> Tensor:
    """Return the embedding ``[..., D']`` that the backbone's layers expect, from rows of the table."""
    name = family_of(config).multiplies_embedding
    return state * getattr(config, name) if name else state


def scaled_hidden(hidden: Tensor, config: Any) -> Tensor:
    """Return the unembedding's input: the final hidden state ``[..., D]``, divided if the model type does that."""
    name = family_of(config).divides_hidden
    return hidden / getattr(config, name) if name else hidden


def scaled_logits(logits: Tensor, config: Any) -> Tensor:
    """Turn the linear map's logits ``[..., V]`` into the model type's: scaled, and capped to ``c tanh(x / c)``."""
    family = family_of(config)
    if family.divides_logits:
        logits = logits / getattr(config, family.divides_logits)
    if family.multiplies_logits:
        scale = getattr(config, family.multiplies_logits)
        logits = logits if scale is None else logits * scale
    cap = next((c for c in (getattr(config, name, None) for name in _SOFTCAPS) if c), None)
    return torch.tanh(logits / cap) * cap if cap else logits


def scales_logits(config: Any) -> bool:
    """Return whether :func:`scaled_hidden` or :func:`scaled_logits` change anything."""
    family = family_of(config)
    scaled = family.divides_hidden or family.divides_logits or family.multiplies_logits
    return bool(scaled) or any(getattr(config, name, None) for name in _SOFTCAPS)
