"""Rename weights to those of :class:`vwn.hf.VirtualWidthForCausalLM` and back; the values are the same.

The rotary embedding is transformers' own (halves, not pairs), so no matrix is permuted.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torchtitan.protocols.state_dict_adapter import StateDictAdapter

from vwn.common.errors import UserError
from vwn.nn.initialisation import current_name

_BLOCK = {
    "attention.qkv_linear.wq": "self_attn.q_proj",
    "attention.qkv_linear.wk": "self_attn.k_proj",
    "attention.qkv_linear.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "moe.router.gate": "mlp.gate",
}
_EXPERTS = "moe.routed_experts.inner_experts."
_FUSED, _DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
_PREFIXES = {  # {} is a number; the rest of a name is the same, or in _BLOCK
    "layers.{}.": "model.backbone.layers.{}.",
    "mtp_layers.{}.layer.": "model.mtp.{}.layer.layers.0.",
    "mtp_layers.{}.": "model.mtp.{}.",
    "tok_embeddings.expand.weight": "model.embed_tokens.expand_weight",
    "tok_embeddings.": "model.embed_tokens.",
    "norm.reduce.": "model.reduce.",
    "norm.norm.": "model.norm.",
    "lm_head.": "lm_head.",
}


class VirtualWidthStateDictAdapter(StateDictAdapter):
    """Converts between the engine's weights and those of the transformers model."""

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the same tensors under the names of transformers.

        Raises:
            UserError: a model with experts, whose weights transformers lays out otherwise.
        """
        self._refuse_experts()
        return to_transformers(state_dict)

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        """Undo :meth:`to_hf`."""
        self._refuse_experts()
        return from_transformers(hf_state_dict)

    def _refuse_experts(self) -> None:
        if self.model_config.backbone.num_experts:
            raise UserError(
                "a model with experts is not converted while it trains; leave last_save_in_hf and initial_load_in_hf "
                "off, and run python -m vwn.titan.export on its checkpoint"
            )


def to_transformers(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Rename the engine's weights as in ``VirtualWidthForCausalLM``; gate and up of the experts become one tensor."""
    out = {}
    for name, value in state_dict.items():
        stem, found, leaf = name.partition(_EXPERTS)
        if not found:
            out[hf_name(name)] = value
        elif leaf == "w2_EDF":
            out[hf_name(stem) + _DOWN] = value
        elif leaf == "w1_EFD":
            out[hf_name(stem) + _FUSED] = torch.cat([value, state_dict[f"{stem}{_EXPERTS}w3_EFD"]], dim=1)
    return out


def from_transformers(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Undo :func:`to_transformers`; this knows the names of earlier checkpoints as well."""
    out = {}
    for name, value in ((current_name(name), value) for name, value in state_dict.items()):
        if name.endswith(_FUSED):
            stem = engine_name(name.removesuffix(_FUSED)) + _EXPERTS
            out[stem + "w1_EFD"], out[stem + "w3_EFD"] = (half.contiguous() for half in value.chunk(2, dim=1))
        elif name.endswith(_DOWN):
            out[engine_name(name.removesuffix(_DOWN)) + _EXPERTS + "w2_EDF"] = value
        else:
            out[engine_name(name)] = value
    return out


def hf_name(name: str) -> str:
    """Turn ``layers.0.attention.wo.weight`` into ``model.backbone.layers.0.self_attn.o_proj.weight``."""
    return _renamed(name, _PREFIXES, _BLOCK)


def engine_name(name: str) -> str:
    """Undo :func:`hf_name`."""
    return _renamed(name, _inverse(_PREFIXES), _inverse(_BLOCK))


def _renamed(name: str, prefixes: dict[str, str], block: dict[str, str]) -> str:
    for ours, theirs in prefixes.items():
        if match := re.match(re.escape(ours).replace(r"\{\}", r"(\d+)"), name):
            stem, dot, leaf = name[match.end() :].rpartition(".")
            return theirs.format(*match.groups()) + block.get(stem, stem) + dot + leaf
    raise KeyError(name)


def _inverse(names: dict[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in names.items()}
