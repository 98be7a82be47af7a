"""What a run of torchtitan says of its model: the backbone's sizes and the virtual width, both fields of its config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from vwn.common.errors import UserError
from vwn.nn.embedding import resolve_reduce
from vwn.nn.geometry import Geometry


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
    """Of the backbone's norms."""
    initializer_range: float | None = None
    """Standard deviation of the matrices at the start; ``D**-0.5`` where none is given."""
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
    """Whether the routing depends on the token (eqs. 12-14)."""
    carry_constraint: Literal["none", "doubly_stochastic"] = "none"
    """``doubly_stochastic`` keeps the rows and columns of the carry at sums of one."""
    embedding: Literal["direct", "factorised", "replicated"] = "direct"
    """A table ``V x D'``, one ``V x D`` and a linear, or one ``V x D`` repeated over the slots."""
    reduce: Literal["linear", "sum", "identity"] | None = None
    """Back to ``D``; identity where ``n = m``, else linear, where none is given."""
    reduce_norm: Literal["group_norm", "rms_norm", "none"] | None = None
    """In front of the linear; the paper's choice where none is given."""
    reduce_init: Literal["first_slots", "normal"] = "first_slots"
    """How the linear starts."""
    num_mtp_modules: int = 0
    """Multi-token prediction modules, chained (section 3.4)."""
    mtp_loss_weight: float = 0.3
    """λ, the weight of each further token's loss."""
    backend: Literal["auto", "reference", "compiled", "triton"] = "auto"
    """What runs the connections, see :mod:`vwn.ops`."""


def check_sizes(backbone: Backbone, width: VirtualWidth) -> Geometry:
    """The geometry of a model, once what does not fit together has been refused.

    Raises:
        UserError: sizes that do not fit, as a sentence.
    """
    b, w = backbone, width
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if getattr(b, name) < 1:
            raise UserError(f"backbone.{name} must be 1 or more, got {getattr(b, name)}")
    try:
        geometry = Geometry(b.hidden_size, w.m, w.n)
        resolve_reduce(geometry, w.reduce, w.reduce_norm)
    except ValueError as error:
        raise UserError(f"virtual_width: {error}") from error
    if b.hidden_size % b.num_attention_heads:
        raise UserError(
            f"backbone.num_attention_heads = {b.num_attention_heads} does not divide hidden_size = {b.hidden_size}"
        )
    if b.num_key_value_heads < 1 or b.num_attention_heads % b.num_key_value_heads:
        raise UserError(
            f"backbone.num_key_value_heads = {b.num_key_value_heads} does not divide num_attention_heads = "
            f"{b.num_attention_heads}"
        )
    if b.num_experts and not 1 <= b.num_experts_per_tok <= b.num_experts:
        raise UserError(
            f"backbone.num_experts_per_tok must be between 1 and num_experts = {b.num_experts}, "
            f"got {b.num_experts_per_tok}"
        )
    if w.num_mtp_modules < 0:
        raise UserError(f"virtual_width.num_mtp_modules must be 0 or more, got {w.num_mtp_modules}")
    return geometry


def hf_config(backbone: Backbone, width: VirtualWidth) -> Any:
    """The :class:`vwn.hf.VirtualWidthConfig` of the same model, with a Llama or a Mixtral as its backbone."""
    from transformers import LlamaConfig, MixtralConfig

    from vwn.hf import VirtualWidthConfig

    check_sizes(backbone, width)
    b, w = backbone, width
    fields: dict[str, Any] = dict(
        vocab_size=b.vocab_size,
        hidden_size=b.hidden_size,
        intermediate_size=b.intermediate_size,
        num_hidden_layers=b.num_hidden_layers,
        num_attention_heads=b.num_attention_heads,
        num_key_value_heads=b.num_key_value_heads,
        max_position_embeddings=b.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": b.rope_theta},
        rms_norm_eps=b.rms_norm_eps,
        initializer_range=initial_std(b),
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    if b.num_experts:
        experts = dict(num_local_experts=b.num_experts, num_experts_per_tok=b.num_experts_per_tok, sliding_window=None)
        config: Any = MixtralConfig(**fields | experts)
    else:
        config = LlamaConfig(**fields)
    return VirtualWidthConfig(
        backbone=config,
        m=w.m,
        n=w.n,
        dynamic=w.dynamic,
        carry_constraint=w.carry_constraint,
        embedding=w.embedding,
        reduce=w.reduce,
        reduce_norm=w.reduce_norm,
        reduce_init=w.reduce_init,
        num_mtp_modules=w.num_mtp_modules,
        mtp_loss_weight=w.mtp_loss_weight,
    )


def initial_std(backbone: Backbone) -> float:
    """Standard deviation of the backbone's matrices at the start."""
    return backbone.hidden_size**-0.5 if backbone.initializer_range is None else backbone.initializer_range
