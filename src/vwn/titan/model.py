"""The model: torchtitan's decoder with over-width embedding, connections, reduce, and optional MTP modules.

``B`` batch, ``S`` sequence, ``D'`` over-width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.config_utils import (
    get_attention_config,
    make_ffn_config,
    make_gqa_config,
    make_moe_config,
    make_routed_experts_config,
    make_router_config,
)
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.embedding import Embedding
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.param_init import skip_param_init
from torchtitan.models.common.rope import CosSinRoPE
from torchtitan.models.deepseek_v3.mtp import roll_mtp_sequence
from torchtitan.protocols.module import ModuleList

from vwn.common.errors import UserError
from vwn.cost.model import model_cost
from vwn.titan.initialisation import initialise
from vwn.titan.modules import (
    Block,
    BlockLinear,
    Connection,
    Expand,
    Norm,
    OverWidthEmbedding,
    Part,
    Predictor,
    Reduce,
    ReducedNorm,
)
from vwn.titan.parallelize import set_sharding
from vwn.titan.sizes import Backbone, VirtualWidth, hf_config, initial_std

_LATER = {"weight": skip_param_init}  # the model initialises all its weights itself
_EXPERTS = dict.fromkeys(("w1_EFD", "w2_EDF", "w3_EFD"), skip_param_init)


class VirtualWidthDecoder(Decoder):
    """Map token ids to logits, with an over-width state in between (sections 3.2-3.4)."""

    @dataclass(kw_only=True, slots=True)
    class Config(Decoder.Config):
        """Configs of the parts, from :func:`model_config`, and the sizes that they were made from."""

        backbone: Backbone
        width: VirtualWidth
        mtp_layers: list[Predictor.Config] = field(default_factory=list)
        seed: int | None = None

        def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
            """Take over the run's sequence length, seed and parallelism."""
            depth = len(self.layers)
            self.layers.extend(self.mtp_layers)  # so that the engine sets up their attention and experts too
            try:
                Decoder.Config.update_from_config(self, config=config, **kwargs)
            finally:
                del self.layers[depth:]
            self.seed = config.debug.seed
            p = config.parallelism
            set_sharding(self, sequence=p.enable_sequence_parallel, experts=p.expert_parallel_degree > 1)

        def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
            """Count parameters, and FLOPs of a training step per token, on the same model of transformers."""
            cost = model_cost(hf_config(self.backbone, self.width), sequence_length=seq_len)
            return cost.parameters, cost.training_flops_per_token

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.mtp_layers = ModuleList(predictor.build() for predictor in config.mtp_layers) or None

    def init_states(self, *, buffer_device: torch.device | None = None) -> None:
        """Set the buffers as the engine does, then every weight from the seed and its name."""
        super().init_states(buffer_device=buffer_device)
        config: Any = self.config
        std, depth = initial_std(config.backbone), config.backbone.num_hidden_layers
        share = {"zero": 0.0, "depth": (2 * depth) ** -0.5, "config": 1.0}[config.backbone.output_init]
        initialise(self, torch.initial_seed() if config.seed is None else config.seed, std, std * share)

    def forward(self, tokens: Tensor, positions: Tensor | None = None, attention_masks: Any = None) -> Any:
        """Map ``[B, S]`` ids, or a pipeline stage's state ``[B, S, D']``, to logits ``[B, S, V]`` or the next state.

        With MTP modules, a list: the logits of the next token, then of each one further.
        """
        state = self.tok_embeddings(tokens) if self.tok_embeddings is not None else tokens
        for layer in self.layers.values():
            state = layer(state, attention_masks, positions)
        hidden = state if self.norm is None else self.norm(state)
        if self.mtp_layers is None:
            return hidden if self.lm_head is None or self._skip_lm_head else self.lm_head(hidden)
        if self._skip_lm_head:
            raise UserError("a chunked loss does not take the logits of MTP modules; set num_mtp_modules to 0")
        outputs = [hidden]
        for ahead, predictor in enumerate(self.mtp_layers, 1):
            # under sequence parallelism a shift of the embeddings would cross ranks, a shift of the ids does not
            later = roll_mtp_sequence(tokens, shift=ahead, positions=positions, fill_value=0)
            hidden, state = predictor(
                state, self.tok_embeddings(later), lambda layer, x: layer(x, attention_masks, positions)
            )
            outputs.append(hidden)
        return [self.lm_head(hidden) for hidden in outputs]


def check_parallelism(parallelism: Any, backbone: Backbone, width: VirtualWidth) -> None:
    """Refuse a parallelism that torchtitan 0.3, or a virtual width in it, does not support.

    Raises:
        UserError: names the option and the way out.
    """
    p, mtp, experts = parallelism, width.num_mtp_modules, backbone.num_experts
    pp, ep, cp = p.pipeline_parallel_degree, p.expert_parallel_degree, p.context_parallel_degree
    if mtp and pp > 1:
        raise UserError(
            f"virtual_width.num_mtp_modules = {mtp} does not go with pipeline_parallel_degree = {pp}: torchtitan 0.3 "
            "has no multi-token prediction in a pipeline; set one of them to 0 or 1"
        )
    if cp > 1:
        raise UserError(f"context_parallel_degree = {cp} has not been tried; shard by tensor_parallel_degree instead")
    if p.spmd_backend != "partial_dtensor":
        raise UserError(f"parallelism.spmd_backend must be 'partial_dtensor', got {p.spmd_backend!r}")
    if ep > 1 and (not experts or experts % ep):
        raise UserError(f"expert_parallel_degree = {ep} does not divide the backbone.num_experts = {experts} experts")


def model_config(backbone: Backbone, width: VirtualWidth) -> VirtualWidthDecoder.Config:
    """Configure the parts of a model of these sizes.

    Raises:
        UserError: sizes that do not fit each other.
    """
    b, w, g = backbone, width, hf_config(backbone, width).geometry
    table = g.over_width if w.embedding == "direct" else g.hidden_size
    return VirtualWidthDecoder.Config(
        backbone=b,
        width=w,
        dim=b.hidden_size,
        vocab_size=b.vocab_size,
        tok_embeddings=OverWidthEmbedding.Config(
            geometry=g,
            form=w.embedding,
            table=Embedding.Config(num_embeddings=b.vocab_size, embedding_dim=table, param_init=_LATER),
            expand=Part.Config(part=Expand, arguments={"geometry": g}) if w.embedding == "factorised" else None,
        ),
        norm=ReducedNorm.Config(reduce=_reduce(g, w), norm=_norm(b)),
        lm_head=Linear.Config(in_features=b.hidden_size, out_features=b.vocab_size, param_init=_LATER),
        layers=[_block(b, w, g) for _ in range(b.num_hidden_layers)],
        mtp_layers=[
            Predictor.Config(
                geometry=g,
                layer=_block(b, w, g),
                fuse=Part.Config(
                    part=BlockLinear, arguments={"in_features": 2 * g.segment_size, "out_features": g.segment_size}
                ),
                reduce=_reduce(g, w),
                norm=_norm(b),
            )
            for _ in range(w.num_mtp_modules)
        ],
    )


def _norm(b: Backbone) -> Norm.Config:
    return Norm.Config(normalized_shape=b.hidden_size, eps=b.rms_norm_eps, param_init=_LATER)


def _reduce(g: Any, w: VirtualWidth) -> Part.Config:
    arguments = {"geometry": g, "form": w.reduce, "norm": w.reduce_norm, "init": w.reduce_init}
    return Part.Config(part=Reduce, arguments=arguments)


def _block(b: Backbone, w: VirtualWidth, g: Any) -> Block.Config:
    sdpa = b.attention == "sdpa"
    attention = make_gqa_config(
        dim=b.hidden_size,
        n_heads=b.num_attention_heads,
        n_kv_heads=b.num_key_value_heads,
        wqkv_param_init=_LATER,
        wo_param_init=_LATER,
        inner_attention=ScaledDotProductAttention.Config() if sdpa else get_attention_config(b.attention),
        rope=CosSinRoPE.Config(
            dim=b.hidden_size // b.num_attention_heads, max_seq_len=b.max_position_embeddings, theta=b.rope_theta
        ),
    )
    ffn = make_ffn_config(
        dim=b.hidden_size, hidden_dim=b.intermediate_size, w1_param_init=_LATER, w2w3_param_init=_LATER
    )
    connection = dict(geometry=g, dynamic=w.dynamic, carry_constraint=w.carry_constraint, backend=w.backend)
    return Block.Config(
        attention=attention,
        attention_norm=_norm(b),
        ffn_norm=_norm(b),
        feed_forward=None if b.num_experts else ffn,
        moe=_experts(b) if b.num_experts else None,
        connections=[Part.Config(part=Connection, arguments=connection) for _ in range(2)],
    )


def _experts(b: Backbone) -> Any:
    """Configure experts routed as in Mixtral: by the softmax of the chosen experts' logits."""
    return make_moe_config(
        num_experts=b.num_experts,
        router=make_router_config(
            dim=b.hidden_size,
            num_experts=b.num_experts,
            gate_param_init=_LATER,
            top_k=b.num_experts_per_tok,
            score_func="softmax",
            route_norm=True,
        ),
        routed_experts=make_routed_experts_config(
            dim=b.hidden_size,
            hidden_dim=b.intermediate_size,
            num_experts=b.num_experts,
            top_k=b.num_experts_per_tok,
            param_init=_EXPERTS,
            comm_backend="standard",
        ),
        load_balance_coeff=None,
    )
