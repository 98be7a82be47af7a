"""``VirtualWidthModel`` and ``VirtualWidthForCausalLM``: over-width embedding, widened backbone, reduce, MTP, loss."""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.utils import can_return_tuple

from vwn.common.errors import UserError
from vwn.hf.auxiliary_loss import logit_loss, penalises_logits, router_loss, router_loss_weight, routes_experts
from vwn.hf.checkpoint.saving import SavingMixin
from vwn.hf.configuration import VirtualWidthConfig
from vwn.hf.decoding.mtp import MtpGenerationMixin
from vwn.hf.documents import number_documents
from vwn.hf.families import has_head_bias, scaled_embedding, scaled_hidden, scaled_logits, scales_logits
from vwn.hf.lookahead import Lookahead, keeps_its_weights
from vwn.hf.loss import choose_loss, denominator, fused_cross_entropy, targets_of_heads
from vwn.hf.outputs import CACHE_FIELD, VirtualWidthCausalLMOutput, VirtualWidthModelOutput
from vwn.hf.reading import has_hooks
from vwn.hf.widening import (
    CACHE_NAMES,
    VirtualWidthLayer,
    base_model_class,
    build_backbone,
    build_mtp_layer,
    init_virtual_width,
    widen_backbone,
)
from vwn.nn.connection import Connection
from vwn.nn.embedding import OverWidthEmbedding, OverWidthReduce, UnembeddingExpand
from vwn.nn.multi_token import MultiTokenPredictor
from vwn.ops import choose, state_dtype

_log = logging.getLogger("vwn.hf")

# what transformers goes by when it chooses an attention implementation, compiles, or exports
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
    """What the two models share: flags, initialisation, access to the embedding table."""

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
        """Of the embedding table, as single weights of a backbone may be kept in float32."""
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
        """No: initialisation leaves alone what was loaded, and the buffers that are not saved have to have it."""
        return False

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """What to run for a request: the same, or where there is none ``"sdpa"``, if the backbone supports that.

        Raises:
            UserError: the backbone does not support it.
        """
        try:
            return super().get_correct_attn_implementation(requested_attention, is_init_check)
        except ValueError as error:
            kind = self.config.backbone.model_type
            raise UserError(
                f'Specified `attn_implementation="{requested_attention}"` is not supported by a backbone of type '
                f"{kind}; drop it, or set it to 'eager'"
            ) from error

    # of the class, which knows no backbone; an instance has its backbone's, as with the flags
    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def set_connection_backend(self, backend: str) -> None:
        """Run all connections on ``"auto"``, ``"reference"``, ``"compiled"`` or ``"triton"`` (:mod:`vwn.ops`).

        Raises:
            UserError: unknown, unable to run on the device that the model is on, or unable to run this connection.
        """
        choose(backend, self.device, self.dtype)
        for module in self.modules():
            if isinstance(module, Connection):
                module.set_backend(backend)

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding table, ``V x D'`` (direct), ``V x D``, or ``V x kD`` with a table factor."""
        return self.base_model.embed_tokens.table

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.base_model.embed_tokens.table = value


class VirtualWidthModel(VirtualWidthPreTrainedModel):
    """Token ids to hidden states of width ``D``, through an over-width stream (sections 3.2-3.3)."""

    keep_states_every: int = 1
    """Keep one over-width state in this many sublayers for the backward and rebuild the others from the sublayers'
    outputs: ``(r / K + 1) D`` saved numbers per token and sublayer, at the price of one more write each. Not through
    ``torch.compile``: with ``fullgraph=True`` it is refused, otherwise the graph breaks around the layers. Nor with
    layers that are sharded or wrapped, whose weights are elsewhere in the backward. MTP layers keep their states."""

    def __init__(self, config: VirtualWidthConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        g = config.geometry
        self.backbone, self.norm, table = (
            build_backbone(config, config.backbone) if backbone is None else widen_backbone(config, backbone)
        )
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
        self.embed_tokens.table._is_hf_initialized = False  # type: ignore[assignment] # its rows may be new
        self.reduce = self._new_reduce()
        self.mtp = nn.ModuleList(
            MultiTokenPredictor(g, layer, self._new_reduce(), norm)
            for layer, norm in (build_mtp_layer(config, k, self.layers[-1]) for k in range(config.num_mtp_modules))
        )
        self.post_init()

    @property
    def layers(self) -> Any:
        """The backbone's layers."""
        return self.backbone.anatomy.layers(self.backbone)

    def _new_reduce(self) -> OverWidthReduce:
        c = self.config
        return OverWidthReduce(c.geometry, c.reduce, c.reduce_norm, c.reduce_init)

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
        **kwargs: Any,
    ) -> VirtualWidthModelOutput:
        """``input_ids`` ``[B, S]`` or ``inputs_embeds`` to hidden states ``[B, S, D]``.

        Embeddings are over-width, ``[B, S, D']``, or as wide as the rows of the table, which are expanded. They are
        taken as they are, without n-grams. The other arguments are the backbone's.

        Args:
            preceding_ids: with n-grams and a cache, the last ``K-1`` ids before ``input_ids``, ``[B, K-1]``, -1 where
                there is none.
            padding_mask: 0 at padding, ``[B, S]``; n-grams take it from a two-dimensional ``attention_mask`` otherwise.
            past_key_values, cache_params: other names for ``cache``, those of transformers before 5.24.
        """
        cache = _the_cache(cache, past_key_values, cache_params)
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

    def _keep_every(self) -> int:
        every = self.keep_states_every
        if not isinstance(every, int) or every < 1:
            raise UserError(f"keep_states_every must be a whole number of sublayers, 1 or more, got {every!r}")
        if every == 1:
            return 1
        c = self.config
        if every > 1 and c.connection != "residual" and (c.connection, c.carry_constraint) != ("ghc", "none"):
            carry = "" if c.carry_constraint == "none" else f" with a {c.carry_constraint} carry"
            raise UserError(
                f"keep_states_every = {every} cannot rebuild the states of connection {c.connection!r}{carry}; "
                "set it to 1"
            )
        checkpointing = any(getattr(layer, "gradient_checkpointing", False) for layer in self.layers)
        if every > 1 and self.training and checkpointing:
            raise UserError(
                f"keep_states_every = {every} and gradient checkpointing both rebuild the states; use one of them"
            )
        kept = all(isinstance(x, VirtualWidthLayer) and keeps_its_weights(x) for x in self.layers)
        if every > 1 and self.training and self.config.connection == "ghc" and not kept:
            raise UserError(
                f"keep_states_every = {every} needs the layers' weights in the backward, and these are sharded (FSDP, "
                "ZeRO) or wrapped; set it to 1"
            )
        if every > 1 and torch.compiler.is_compiling():
            raise UserError(f"keep_states_every = {every} does not go through torch.compile; set it to 1")
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


class VirtualWidthForCausalLM(VirtualWidthPreTrainedModel, MtpGenerationMixin):
    """A causal language model with virtual width and, optionally, multi-token prediction."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.table.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    loss_backend: str = "auto"
    """What computes the training loss: ``"liger"`` keeps no logits (and returns none), ``"torch"``, or ``"auto"``."""

    output_mtp_logits: bool = False
    """Whether outputs have the MTP modules' logits when ``forward`` is not told, for :meth:`mtp_loss`."""

    _said_untrained = False

    def __init__(self, config: VirtualWidthConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.model = VirtualWidthModel(config, backbone)
        k = config.table_factor
        self.unembed_expand = UnembeddingExpand(config.hidden_size, k) if k > 1 else nn.Identity()
        self.lm_head = nn.Linear(k * config.hidden_size, config.vocab_size, bias=has_head_bias(config.backbone))
        self._is_stateful = self.model.backbone._is_stateful  # whether its cache can be rolled back
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_router_logits: bool | None = None,
        output_mtp_logits: bool | None = None,
        output_over_width_state: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        preceding_ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache_params: Cache | None = None,
        **kwargs: Any,
    ) -> VirtualWidthCausalLMOutput:
        """Logits ``[B, S, V]`` and, with ``labels`` ``[B, S]`` (ids, not shifted, -100 ignored), the loss.

        In training with Liger-Kernel (:attr:`loss_backend`) there are no logits.

        Args:
            shift_labels: with ``labels``, the next token's targets as they are, ``[B, S]``; they replace what would
                follow from ``labels``.
            output_mtp_logits: also return the MTP modules' logits; they run anyway when there are labels. The default
                is the attribute of that name.
            output_over_width_state: also return ``H'_L``, which the first MTP module starts from.
            num_items_in_batch: number of targets over all accumulated batches, the loss's denominator: a scalar for
                the next token, to which each MTP module's is in the proportion of this batch, or ``[1 + modules]``.
            preceding_ids, padding_mask: for n-grams, see :meth:`VirtualWidthModel.forward`.
            past_key_values, cache_params: other names for ``cache``, those of transformers before 5.24.
        """
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError(
                f"labels need the logits of every position; leave logits_to_keep at 0, got {logits_to_keep}"
            )
        if output_mtp_logits is None:
            output_mtp_logits = self.output_mtp_logits
        if labels is None and not output_mtp_logits:
            self._say_untrained_modules()
        if shift_labels is not None and (self.config.num_mtp_modules or self.config.ngram_order > 1):
            _check_whole(position_ids, attention_mask, past_key_values if cache is None else cache)
        b = self.config.backbone
        if routes_experts(b) and output_router_logits is None:
            output_router_logits = b.output_router_logits
        if output_router_logits is not None:
            kwargs["output_router_logits"] = output_router_logits
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=_the_cache(cache, past_key_values, cache_params),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            preceding_ids=preceding_ids,
            padding_mask=padding_mask,
            **kwargs,
        )
        fused = labels is not None and self.training and self._fuses_loss()
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = None if fused else self._unembed(out.last_hidden_state[:, keep])

        heads = [out.last_hidden_state]
        mtp_logits: list[Tensor] = []
        mtp_router_logits: list[Tensor] = []
        if len(self.model.mtp) and (labels is not None or output_mtp_logits):
            recorded = dict.fromkeys(("output_hidden_states", "output_attentions"), False)
            hidden, mtp_router_logits = self.model.predict_further(
                out.over_width_state,
                out.initial_state,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **kwargs | recorded,
            )
            heads += hidden
            mtp_logits = [] if fused and not output_mtp_logits else [self._unembed(h) for h in hidden]

        loss = losses = aux_loss = None
        if labels is not None:
            documents = None
            if len(heads) > 1:
                documents = number_documents(labels.shape, attention_mask, position_ids, **kwargs)
            targets = targets_of_heads(len(heads), labels, shift_labels, documents)
            losses, loss = self._losses(heads, None if fused else [logits, *mtp_logits], targets, num_items_in_batch)
            if logits is not None and penalises_logits(b):
                loss = loss + logit_loss(logits, b)
        if kwargs.get("output_router_logits") and routes_experts(b):
            aux_loss = router_loss((*(out.router_logits or ()), *mtp_router_logits), b, attention_mask)
            if loss is not None:
                loss = loss + router_loss_weight(b) * aux_loss
        return VirtualWidthCausalLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE_FIELD: getattr(out, CACHE_FIELD)},
            hidden_states=out.hidden_states,
            over_width_hidden_states=out.over_width_hidden_states,
            attentions=out.attentions,
            router_logits=out.router_logits,
            aux_loss=aux_loss,
            losses=losses,
            mtp_logits=tuple(mtp_logits) if output_mtp_logits else None,
            over_width_state=out.over_width_state if output_over_width_state else None,
        )

    @property
    def keep_states_every(self) -> int:
        """See :attr:`VirtualWidthModel.keep_states_every`."""
        return self.model.keep_states_every

    @keep_states_every.setter
    def keep_states_every(self, every: int) -> None:
        self.model.keep_states_every = every

    def _unembed(self, hidden: Tensor) -> Tensor:
        backbone = self.config.backbone
        return scaled_logits(self.lm_head(self.unembed_expand(scaled_hidden(hidden, backbone))), backbone)

    def _fuses_loss(self) -> bool:
        """Whether the training loss is computed without the logits; only for an unembedding and a loss as they come."""
        backend = choose_loss(self.loss_backend, self.lm_head.weight.device)
        as_they_come = type(self.lm_head) is nn.Linear and not has_hooks(self.lm_head)
        as_they_come &= not hasattr(self, "_loss_function") and self.lm_head.bias is None
        as_they_come &= not scales_logits(self.config.backbone) and not penalises_logits(self.config.backbone)
        if self.loss_backend == "liger" and not as_they_come:
            raise UserError("loss backend 'liger' needs the model's own unembedding and loss function; use 'torch'")
        return backend == "liger" and as_they_come

    def _losses(
        self,
        heads: list[Tensor],
        logits: list[Any] | None,
        targets: list[Tensor],
        num_items_in_batch: Tensor | int | None,
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Each head's mean cross-entropy, and next-token + λ · (sum of the further ones) for the optimiser."""
        losses: list[Tensor] = []
        objective: Any = 0.0
        counts = [(t != -100).sum() for t in targets]
        for k, hidden in enumerate(heads):
            if logits is None:
                total = fused_cross_entropy(self.unembed_expand(hidden), self.lm_head, targets[k])
            else:
                total = self._summed_loss(logits[k], targets[k])
            losses.append((total / counts[k]).detach())
            mean = total / denominator(k, counts, num_items_in_batch)
            objective = objective + mean * (1.0 if k == 0 else self.config.mtp_loss_weight)
        return tuple(losses), objective

    def _summed_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self.loss_function(logits, targets, self.config.vocab_size, shift_labels=targets, num_items_in_batch=1)

    def mtp_loss(
        self,
        mtp_logits: tuple[Tensor, ...],
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Compute what MTP modules add to a loss that is computed outside the model: λ · (sum of their means).

        Args:
            mtp_logits: of the output, see :attr:`output_mtp_logits`.
            labels, num_items_in_batch, shift_labels: as in :meth:`forward`.
            documents: numbers of the documents in packed rows, ``[B, S]``; no target is in another document.
        """
        targets = targets_of_heads(1 + len(mtp_logits), labels, shift_labels, documents)
        counts = [(t != -100).sum() for t in targets]
        further = zip(range(1, len(targets)), mtp_logits, targets[1:], strict=True)
        sums = [self._summed_loss(logits, t) / denominator(k, counts, num_items_in_batch) for k, logits, t in further]
        return self.config.mtp_loss_weight * torch.stack(sums).sum()

    def _say_untrained_modules(self) -> None:
        """Warn once if gradients are wanted and no loss of the MTP modules is."""
        if self._said_untrained or torch.compiler.is_compiling() or not (self.training and torch.is_grad_enabled()):
            return
        if any(p.requires_grad for p in self.model.mtp.parameters()):
            self._said_untrained = True
            _log.warning(
                "the MTP modules (num_mtp_modules = %d) are not trained: the model got no labels, and a loss computed "
                "outside of it leaves them out; add model.mtp_loss(...) to it, or set num_mtp_modules to 0",
                self.config.num_mtp_modules,
            )


def _check_whole(position_ids: Tensor | None, attention_mask: Any, cache: Cache | None) -> None:
    """Refuse rows that hold parts of sequences, which context parallelism makes of them."""
    if position_ids is None or cache is not None or torch.compiler.is_compiling():
        return
    documents = number_documents(position_ids.shape, attention_mask, position_ids)
    if documents is None:
        return
    begins = F.pad(documents.diff(dim=-1), (1, 0), value=1) != 0
    if first := int(position_ids[begins].max()):
        raise UserError(
            f"a row begins at position {first}, so its n-grams and targets of MTP modules would miss tokens; give "
            "whole sequences, without context parallelism, or a model without n-grams and MTP modules"
        )


def _the_cache(*named: Cache | None) -> Cache | None:
    """The cache that is given under one of its names."""
    given = [cache for cache in named if cache is not None]
    if len(given) > 1:
        raise ValueError("cache, past_key_values and cache_params are names of one argument; give one of them")
    return given[0] if given else None
