"""Names of weights here and in :class:`vwn.hf.VirtualWidthForCausalLM` with a Llama backbone; the values are the same.

The rotary embedding is transformers' own (halves, not pairs), so that no matrix is permuted.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torchtitan.protocols.state_dict_adapter import StateDictAdapter

from vwn.common.errors import UserError

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
_PREFIXES = (  # theirs follow ours; the rest of a name is the same
    (r"layers\.(\d+)\.", r"model.backbone.layers.{}."),
    (r"mtp_layers\.(\d+)\.layer\.", r"model.mtp.{}.layer.layers.0."),
    (r"mtp_layers\.(\d+)\.", r"model.mtp.{}."),
    (r"tok_embeddings\.expand\.weight$", r"model.embed_tokens.expand_weight"),
    (r"tok_embeddings\.", r"model.embed_tokens."),
    (r"norm\.reduce\.", r"model.reduce."),
    (r"norm\.norm\.", r"model.norm."),
    (r"lm_head\.", r"lm_head."),
)


class VirtualWidthStateDictAdapter(StateDictAdapter):
    """Between the engine's weights and those of the transformers model."""

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The same tensors under the names of transformers.

        Raises:
            UserError: a model with experts, whose weights transformers lays out otherwise.
        """
        self._refuse_experts()
        return to_transformers(state_dict)

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        """The inverse of :meth:`to_hf`."""
        self._refuse_experts()
        return from_transformers(hf_state_dict)

    def _refuse_experts(self) -> None:
        if self.model_config.backbone.num_experts:
            raise UserError(
                "a model with experts is not converted while it trains; leave last_save_in_hf and initial_load_in_hf "
                "off, and run python -m vwn.titan.export on its checkpoint"
            )


def to_transformers(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The engine's weights as ``VirtualWidthForCausalLM`` has them, with gate and up of the experts in one tensor."""
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
    """The inverse of :func:`to_transformers`."""
    out = {}
    for name, value in state_dict.items():
        if name.endswith(_FUSED):
            stem = engine_name(name.removesuffix(_FUSED)) + _EXPERTS
            out[stem + "w1_EFD"], out[stem + "w3_EFD"] = (half.contiguous() for half in value.chunk(2, dim=1))
        elif name.endswith(_DOWN):
            out[engine_name(name.removesuffix(_DOWN)) + _EXPERTS + "w2_EDF"] = value
        else:
            out[engine_name(name)] = value
    return out


def hf_name(name: str) -> str:
    """``layers.0.attention.wo.weight`` to ``model.backbone.layers.0.self_attn.o_proj.weight``."""
    for ours, theirs in _PREFIXES:
        if match := re.match(ours, name):
            rest = name[match.end() :]
            block = ours.startswith(r"layers") or r"layer\." in ours
            return theirs.format(*match.groups()) + (_renamed(rest, _BLOCK) if block else rest)
    raise KeyError(name)


def engine_name(name: str) -> str:
    """The inverse of :func:`hf_name`."""
    for ours, theirs in _PREFIXES:
        pattern = re.escape(theirs).replace(r"\{\}", r"(\d+)")
        if match := re.match(pattern, name):
            rest = name[match.end() :]
            block = ours.startswith(r"layers") or r"layer\." in ours
            prefix = re.sub(r"\(\\d\+\)", "{}", ours).replace("\\", "").rstrip("$").format(*match.groups())
            return prefix + (_renamed(rest, {v: k for k, v in _BLOCK.items()}) if block else rest)
    raise KeyError(name)


def _renamed(name: str, names: dict[str, str]) -> str:
    if not name:
        return name
    stem, leaf = name.rsplit(".", 1)
    return f"{names.get(stem, stem)}.{leaf}"
