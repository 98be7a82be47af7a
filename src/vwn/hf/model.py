"""``VirtualWidthModel``: over-width embedding, widened backbone, reduce, MTP modules (sections 3.2-3.4).

The way from its ``forward`` to eq. 10: the backbone's own loop over its layers; :mod:`vwn.hf.layer`, which reads and
writes where a layer's ``forward`` uses its residual stream; :mod:`vwn.hf.lookahead`, which joins a write and the next
read; :class:`vwn.nn.connection.Connection`; :mod:`vwn.ops`.
"""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.utils import can_return_tuple

from vwn.common.errors import UserError
from vwn.hf.checkpoint.saving import SavingMixin
from vwn.hf.configuration import VirtualWidthConfig
from vwn.hf.documents import number_documents
from vwn.hf.families import scaled_embedding
from vwn.hf.layer import VirtualWidthLayer
from vwn.hf.lookahead import Lookahead, keeps_its_weights
from vwn.hf.outputs import CACHE_FIELD, VirtualWidthModelOutput
from vwn.hf.widening import (
    CACHE_NAMES,
    base_model_class,
    build_mtp_layer,
    init_virtual_width,
    new_backbone,
    widen_backbone,
)
from vwn.nn.connection import Connection
from vwn.nn.embedding import OverWidthEmbedding, OverWidthReduce
from vwn.nn.multi_token import MultiTokenPredictor
from vwn.ops import choose, state_dtype

_log = logging.getLogger("vwn.hf")

# transformers reads these when it chooses an attention implementation, compiles, or exports
_BACKBONES_FLAGS = (
    "_supports_sdpa",
    "_supports_flash_attn",
    "_supports_flex_attn",
    "_supports_attention_backend",
    "_supports_context_parallel",
    "_compatible_flash_implementations",
    "_can_compile_fullgraph",
    "_can_set_attn_implementation",
    "_can_set_experts_implementation",
)


class VirtualWidthPreTrainedModel(SavingMixin, PreTrainedModel):
    """Base of all models: flags, initialisation, access to the embedding table."""

    config: VirtualWidthConfig
    config_class = VirtualWidthConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_attention_backend = True  # of a class that knows no backbone; an instance has the backbone's flags
    _keep_in_fp32_modules_strict = ["connections"]

    def __init__(self, config: VirtualWidthConfig) -> None:
        self._backbone_class = base_model_class(config.backbone)
        for flag in _BACKBONES_FLAGS:
            if hasattr(self._backbone_class, flag):  # older transformers have fewer
                setattr(self, flag, getattr(self._backbone_class, flag))
        super().__init__(config)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the embedding table; single weights of a backbone may be kept in float32."""
        table = getattr(self.base_model, "embed_tokens", None)
        return super().dtype if table is None else table.table.weight.dtype

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        backbone = getattr(self.base_model, "backbone", None)
        if backbone is None:  # the model is still being put together
            super()._init_weights(module)
            init_virtual_width(module)
        else:
            backbone._init_weights(module)  # its final norm, embedding and head start by its own rules

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return False: initialisation leaves loaded weights alone, and buffers that are not saved need it."""
        return False

    def set_connection_backend(self, backend: str) -> None:
        """Run all connections on ``"auto"``, ``"reference"``, ``"compiled"`` or ``"triton"`` (:mod:`vwn.ops`).

        Raises:
            UserError: unknown, unable to run on the device that the model is on, or unable to run this connection.
        """
        choose(backend, self.device, self.dtype, self.config.n)
        for module in self.modules():
            if isinstance(module, Connection):
                module.set_backend(backend)

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the embedding table, ``V x D'`` (direct), ``V x D``, or ``V x kD`` with a table factor."""
        return self.base_model.embed_tokens.table

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.base_model.embed_tokens.table = value


class VirtualWidthModel(VirtualWidthPreTrainedModel):
    """Map token ids to hidden states of width ``D``, through an over-width state (sections 3.2-3.3)."""

    keep_states_every: int = 1
    """Keep one over-width state in this many sublayers for the backward and rebuild the others from the sublayers'
    outputs: ``(r / K + 1) D`` saved numbers per token and sublayer, at the price of one more write each. Not through
    ``torch.compile``: with ``fullgraph=True`` it is refused, otherwise the graph breaks around the layers. Nor with
    layers that are sharded or wrapped, whose weights are elsewhere in the backward. MTP layers keep their states."""

    _warned_untrained = False

    def __init__(self, config: VirtualWidthConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        g = config.geometry
        new = new_backbone(config.backbone) if backbone is None else backbone
        self.backbone, self.norm, table = widen_backbone(config, new)
        self.embed_tokens = OverWidthEmbedding(
            g,
            config.vocab_size,
            config.embedding,
            getattr(config.backbone, "pad_token_id", None),
            config.ngram_order,
            config.ngram_buckets,
            config.table_factor,
            table,
        )
        if backbone is None:
            self.embed_tokens.table._is_hf_initialized = False  # type: ignore[assignment] # its rows may be new
        reduce = g, config.reduce, config.reduce_norm, config.reduce_init
        self.reduce = OverWidthReduce(*reduce)
        self.mtp = nn.ModuleList(
            MultiTokenPredictor(g, layer, OverWidthReduce(*reduce), norm)
            for layer, norm in (build_mtp_layer(config, k, self.layers[-1]) for k in range(config.num_mtp_modules))
        )
        self.post_init()

    @property
    def layers(self) -> Any:
        """The backbone's layers."""
        return self.backbone.anatomy.layers(self.backbone)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        preceding_ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache_params: Cache | None = None,
        predicts_further: bool = False,
        **kwargs: Any,
    ) -> VirtualWidthModelOutput:
        """Map ``input_ids`` ``[B, S]`` or ``inputs_embeds`` to hidden states ``[B, S, D]``.

        Embeddings are over-width, ``[B, S, D']``, or as wide as the rows of the table, which are expanded. They are
        taken as they are, without n-grams. The other arguments are the backbone's.

        Args:
            preceding_ids: with n-grams and a cache, the last ``K-1`` ids before ``input_ids``, ``[B, K-1]``, -1 where
                there is none.
            padding_mask: 0 at padding, ``[B, S]``; n-grams take it from a two-dimensional ``attention_mask`` otherwise.
            past_key_values, cache_params: other names for ``cache``, those of transformers before 5.24.
            predicts_further: whether :meth:`predict_further` follows; in training a missing one is warned of.
        """
        cache = one_cache(cache, past_key_values, cache_params)
        if not predicts_further:
            self._warn_untrained_modules()
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        state: Any
        if input_ids is not None:
            if preceding_ids is None:
                self._check_starts(cache)
            if padding_mask is None and isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
                padding_mask = attention_mask
            documents = None
            if self.config.ngram_order > 1 and input_ids.shape[1] > 1:
                documents = number_documents(input_ids.shape, attention_mask, position_ids, **kwargs)
            rows = self.embed_tokens(input_ids, preceding_ids, padding_mask, documents)
            state = scaled_embedding(rows, self.config.backbone)
        else:
            state = self._over_width(inputs_embeds)
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.get(name) is None:
                kwargs[name] = getattr(self.config, name)
        lookahead = None
        if self.config.connection != "residual":
            state = state.to(state_dtype(state))
            lookahead = kwargs["lookahead"] = Lookahead(self.layers, self._keep_every())
        out = self.backbone.run(
            inputs_embeds=state.view_as(state),  # so that its gradients add up in one order, checkpointing or not
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=use_cache,
            **kwargs,
        )
        if lookahead is not None and lookahead.keep_every > 1 and torch.is_grad_enabled() and not lookahead.used:
            raise UserError(
                f"keep_states_every = {lookahead.keep_every} needs a backbone that hands its layers what accompanies "
                f"the state, which one of type {self.config.backbone.model_type} does not; set it to 1"
            )
        last_hidden_state = self.norm(self.reduce_state(out.last_hidden_state.to(state.dtype)))
        wide = out.get("hidden_states")
        return VirtualWidthModelOutput(
            last_hidden_state=last_hidden_state,
            **{CACHE_FIELD: next((out[name] for name in CACHE_NAMES if name in out), cache)},  # some do not return it
            hidden_states=None if wide is None else self._reduced(wide, last_hidden_state),
            attentions=out.get("attentions"),
            router_logits=out.get("router_logits"),
            over_width_hidden_states=wide,
            over_width_state=out.last_hidden_state,
            initial_state=state,
        )

    def reduce_state(self, state: Tensor) -> Tensor:
        """Map an over-width state to the backbone's width, ``[..., D'] -> [..., D]``; the final norm comes after it."""
        return self.reduce(state.to(self.dtype))  # some backbones keep the state in float32

    def _reduced(self, states: tuple, last: Tensor) -> tuple:
        """Reduce all states but the last, and leave ``None`` for layers that were not asked for."""
        narrow = [None if state is None else self.reduce_state(state) for state in states[:-1]]
        return (*narrow, None if states[-1] is None else last)

    def predict_further(
        self, over_width_state: Tensor, initial_state: Tensor, **context: Any
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Run the chain of MTP modules over a whole sequence (section 3.4).

        Module ``k`` joins the state at ``t`` with the embedding of token ``t + k``. The last ``k`` positions have no
        such token and hold rubbish, which causality keeps from every other position.

        Args:
            over_width_state: ``H'_L``, ``[B, S, D']``.
            initial_state: over-width embedding of the same tokens, ``[B, S, D']``.
            context: mask and positions, as given to :meth:`forward`.

        Returns:
            hidden states ``[B, S, D]``, one for each module, and their layers' router logits, if any.
        """
        hidden: list[Tensor] = []
        router_logits: list[Tensor] = []

        def run(layer: nn.Module, state: Tensor) -> Tensor:
            out = layer.run(  # type: ignore[operator]
                inputs_embeds=state, use_cache=False, **context
            )
            router_logits.extend(out.get("router_logits") or ())
            return out.last_hidden_state

        state, ahead = over_width_state, initial_state
        for predictor in self.mtp:
            ahead = F.pad(ahead[:, 1:], (0, 0, 0, 1))
            h, state = predictor(state, ahead, run)
            hidden.append(h)
        return hidden, router_logits

    def _warn_untrained_modules(self) -> None:
        """Warn once if gradients are wanted and no loss of the MTP modules is."""
        if self._warned_untrained or torch.compiler.is_compiling() or not (self.training and torch.is_grad_enabled()):
            return
        if any(p.requires_grad for p in self.mtp.parameters()):
            self._warned_untrained = True
            _log.warning(
                "the MTP modules (num_mtp_modules = %d) are not trained: the model got no labels, or the trainer "
                "computes the loss outside of it; see docs/train.md, or set num_mtp_modules to 0",
                self.config.num_mtp_modules,
            )

    def _keep_every(self) -> int:
        every = self.keep_states_every
        if not isinstance(every, int) or every < 1:
            raise UserError(f"keep_states_every must be a whole number of sublayers, 1 or more, got {every!r}")
        c = self.config
        if every == 1 or c.connection == "residual":
            return every
        layers = self.layers if self.training else ()
        held = all(isinstance(layer, VirtualWidthLayer) and keeps_its_weights(layer) for layer in layers)
        refused = {
            f"cannot rebuild the states of connection {c.connection!r}, carry constraint {c.carry_constraint!r}": (
                c.connection != "ghc" or c.carry_constraint == "doubly_stochastic"
            ),
            "and gradient checkpointing both rebuild the states": any(
                getattr(layer, "gradient_checkpointing", False) for layer in layers
            ),
            "needs weights in the backward that are sharded (FSDP, ZeRO) or wrapped": not held,
            "does not go through torch.compile": torch.compiler.is_compiling(),
        }
        for reason in (reason for reason, holds in refused.items() if holds):
            raise UserError(f"keep_states_every = {every} {reason}; set it to 1")
        return every

    def _check_starts(self, cache: Cache | None) -> None:
        if self.config.ngram_order > 1 and cache is not None and (length := cache.get_seq_length()) > 0:
            raise UserError(
                f"the cache holds {int(length)} tokens, and n-gram embeddings need the last "
                f"{self.config.ngram_order - 1} of them as well; give their ids as preceding_ids"
            )

    def _over_width(self, embeds: Any) -> Tensor:
        over_width, row = self.config.geometry.over_width, self.embed_tokens.table.embedding_dim
        if embeds.shape[-1] == over_width:
            return embeds
        if embeds.shape[-1] == row:
            return self.embed_tokens.expand(embeds)
        rows = "" if row == over_width else f", or rows of the table, of {row}"
        raise ValueError(
            f"inputs_embeds must be over-width, D' = {over_width} numbers per token{rows}; got {embeds.shape[-1]}"
        )


def one_cache(*named: Cache | None) -> Cache | None:
    """Return the cache that is given under one of its names."""
    given = [cache for cache in named if cache is not None]
    if len(given) > 1:
        raise ValueError("cache, past_key_values and cache_params are names of one argument; give one of them")
    return given[0] if given else None
