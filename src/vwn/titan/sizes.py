"""Sizes of a model, as fields of a run's config: the backbone's and the virtual width's."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from vwn.common.errors import UserError


@dataclass(kw_only=True, slots=True)
class Backbone:
    """A Llama, or with experts a Mixtral, under the names that their transformers configs use."""

    vocab_size: int = 2048
    """Rows of the token table, at least as many as the tokenizer has tokens."""
    hidden_size: int = 256
    """``D``."""
    intermediate_size: int = 704
    """Width inside the FFN, or inside each expert."""
    num_hidden_layers: int = 6
    """Layers."""
    num_attention_heads: int = 8
    """Heads of the queries."""
    num_key_value_heads: int = 8
    """Heads of keys and values; divides the heads of the queries."""
    max_position_embeddings: int = 8192
    """Longest sequence."""
    rope_theta: float = 500_000.0
    """Base of the rotary embedding."""
    rms_norm_eps: float = 1e-5
    """Epsilon of the backbone's norms."""
    initializer_range: float | None = None
    """Standard deviation of the matrices at the start; ``D**-0.5`` where none is given."""
    output_init: Literal["zero", "depth", "config"] = "zero"
    """Start of the last matrix of every attention, FFN and expert: zero, as in the presets of ``vwn train``; scaled by
    ``(2 L)^-1/2`` in ``L`` layers; or as ``initializer_range`` says."""
    num_experts: int = 0
    """Experts in place of each FFN; 0 is a dense FFN."""
    num_experts_per_tok: int = 2
    """Experts of a token."""
    attention: Literal["flex", "flex_flash", "varlen", "sdpa"] = "flex"
    """torchtitan's attention. ``sdpa`` is causal over the whole window: it does not keep packed documents apart."""


@dataclass(kw_only=True, slots=True)
class VirtualWidth:
    """The virtual width, under the names of :class:`vwn.hf.VirtualWidthConfig`."""

    m: int = 2
    """Fraction rate, divides ``D``."""
    n: int = 3
    """Slots, ``n >= m``; ``r = n / m``."""
    dynamic: bool = True
    """Let the routing depend on the token (eqs. 12-14)."""
    carry_constraint: Literal["none", "identity", "doubly_stochastic"] = "none"
    """``identity`` learns no carry; ``doubly_stochastic`` keeps the sums of its rows and columns at one."""
    embedding: Literal["direct", "factorised", "replicated"] = "direct"
    """A table ``V x D'``, one ``V x D`` and a linear, or one ``V x D`` repeated over the slots."""
    reduce: Literal["linear", "sum", "identity"] | None = None
    """Back to ``D``; identity where ``n = m``, else linear, where none is given."""
    reduce_norm: Literal["group_norm", "rms_norm", "none"] | None = None
    """Norm in front of the linear; the paper's choice where none is given."""
    reduce_init: Literal["first_slots", "normal"] = "first_slots"
    """Initial values of the linear."""
    num_mtp_modules: int = 0
    """Multi-token prediction modules, chained (section 3.4)."""
    mtp_loss_weight: float = 0.3
    """λ, the weight of each further token's loss."""
    backend: Literal["auto", "reference", "compiled", "triton"] = "auto"
    """Backend of the connections, see :mod:`vwn.ops`."""


def hf_config(backbone: Backbone, width: VirtualWidth) -> Any:
    """Make the :class:`vwn.hf.VirtualWidthConfig` of the same model, with a Llama or a Mixtral as its backbone.

    Raises:
        UserError: sizes that do not fit each other.
    """
    from transformers import LlamaConfig, MixtralConfig

    from vwn.hf import VirtualWidthConfig

    sizes, width_fields = asdict(backbone), asdict(width)
    for divisor, name in (("num_attention_heads", "hidden_size"), ("num_key_value_heads", "num_attention_heads")):
        if sizes[divisor] < 1 or sizes[name] % sizes[divisor]:
            raise UserError(f"backbone.{divisor} = {sizes[divisor]} does not divide {name} = {sizes[name]}")
    del sizes["attention"], sizes["output_init"], width_fields["backend"]
    experts, top_k = sizes.pop("num_experts"), sizes.pop("num_experts_per_tok")
    sizes |= {
        "rope_parameters": {"rope_type": "default", "rope_theta": sizes.pop("rope_theta")},
        "initializer_range": initial_std(backbone),
        "tie_word_embeddings": False,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    if experts:
        if not 1 <= top_k <= experts:
            raise UserError(f"backbone.num_experts_per_tok must be from 1 to num_experts = {experts}, got {top_k}")
        sizes |= {"num_local_experts": experts, "num_experts_per_tok": top_k, "sliding_window": None}
    try:
        config: Any = MixtralConfig(**sizes) if experts else LlamaConfig(**sizes)
        return VirtualWidthConfig(backbone=config, **width_fields)
    except ValueError as error:
        raise UserError(f"virtual_width: {error}") from error


def initial_std(backbone: Backbone) -> float:
    """Return the standard deviation of the backbone's matrices at the start."""
    return backbone.hidden_size**-0.5 if backbone.initializer_range is None else backbone.initializer_range
