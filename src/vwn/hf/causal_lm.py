"""``VirtualWidthForCausalLM``: the unembedding, the losses of the next token and of the MTP modules, generation."""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.utils import can_return_tuple

from vwn.common.errors import UserError
from vwn.hf.auxiliary_loss import logit_loss, penalises_logits, router_loss, router_loss_weight
from vwn.hf.configuration import VirtualWidthConfig
from vwn.hf.decoding.mtp import MtpGenerationMixin
from vwn.hf.documents import number_documents
from vwn.hf.families import has_head_bias, scaled_hidden, scaled_logits, scales_logits
from vwn.hf.loss import choose_loss, denominator, fused_cross_entropy, targets_of_heads
from vwn.hf.model import VirtualWidthModel, VirtualWidthPreTrainedModel, one_cache
from vwn.hf.outputs import CACHE_FIELD, VirtualWidthCausalLMOutput
from vwn.hf.reading import has_hooks
from vwn.nn.embedding import UnembeddingExpand

_log = logging.getLogger("vwn.hf")


class VirtualWidthForCausalLM(VirtualWidthPreTrainedModel, MtpGenerationMixin):
    """A causal language model with virtual width and, optionally, multi-token prediction."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.table.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    loss_backend: str = "auto"
    """Backend of the training loss: ``"torch"`` keeps all logits, ``"chunked"`` and ``"liger"`` none (and return none);
    ``"auto"`` is ``"liger"`` on a GPU where it is installed, else ``"torch"``."""

    output_mtp_logits: bool = False
    """Default of ``forward``'s argument: outputs have the MTP modules' logits, for :meth:`mtp_loss`."""

    _looked_at_shares = False

    def __init__(
        self, config: VirtualWidthConfig, backbone: PreTrainedModel | None = None, head: nn.Linear | None = None
    ) -> None:
        super().__init__(config)
        self.model = VirtualWidthModel(config, backbone)
        k = config.table_factor
        self.unembed_expand = UnembeddingExpand(config.hidden_size, k) if k > 1 else nn.Identity()
        if head is None:
            head = nn.Linear(k * config.hidden_size, config.vocab_size, bias=has_head_bias(config.backbone))
        self.lm_head = head
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
        """Compute logits ``[B, S, V]`` and, with ``labels`` ``[B, S]`` (ids, not shifted, -100 ignored), the loss.

        In training without logits (:attr:`loss_backend`) the output has none.

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
        shift_labels = kwargs.pop("shift_labels", None)  # Trainer wants every label that the signature names
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError(
                f"labels need the logits of every position; leave logits_to_keep at 0, got {logits_to_keep}"
            )
        if output_mtp_logits is None:
            output_mtp_logits = self.output_mtp_logits
        if shift_labels is not None and (self.config.num_mtp_modules or self.config.ngram_order > 1):
            _check_whole(position_ids, attention_mask, past_key_values if cache is None else cache)
        b = self.config.backbone
        router_weight = router_loss_weight(b)
        if router_weight is not None and output_router_logits is None:
            output_router_logits = b.output_router_logits
        if output_router_logits is not None:
            kwargs["output_router_logits"] = output_router_logits
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(cache, past_key_values, cache_params),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            preceding_ids=preceding_ids,
            padding_mask=padding_mask,
            predicts_further=labels is not None or output_mtp_logits,
            **kwargs,
        )
        fused = self.fused_loss() if labels is not None and self.training else None
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
            losses, loss = self._losses(heads, fused or [logits, *mtp_logits], targets, num_items_in_batch)
            if logits is not None and penalises_logits(b):
                loss = loss + logit_loss(logits, b)
        if kwargs.get("output_router_logits") and router_weight is not None:
            aux_loss = router_loss((*(out.router_logits or ()), *mtp_router_logits), b, attention_mask)
            if loss is not None:
                loss = loss + router_weight * aux_loss
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

    keep_states_every = property(
        lambda self: self.model.keep_states_every,
        lambda self, every: setattr(self.model, "keep_states_every", every),
        doc="See :attr:`VirtualWidthModel.keep_states_every`.",
    )

    def _unembed(self, hidden: Tensor) -> Tensor:
        backbone = self.config.backbone
        return scaled_logits(self.lm_head(self.unembed_expand(scaled_hidden(hidden, backbone))), backbone)

    @property
    def can_fuse_loss(self) -> bool:
        """True if the loss can do without logits: a plain linear without bias, hooks or scaling, and the usual loss."""
        as_they_come = type(self.lm_head) is nn.Linear and not has_hooks(self.lm_head)
        as_they_come &= not hasattr(self, "_loss_function") and self.lm_head.bias is None
        return as_they_come and not scales_logits(self.config.backbone) and not penalises_logits(self.config.backbone)

    def fused_loss(self) -> str | None:
        """Return the backend that computes the loss without logits, if one does; refuse one that cannot."""
        name = choose_loss(self.loss_backend, self.lm_head.weight.device)
        needs = "an unembedding without bias, hooks or scaled logits, and the usual loss function"
        if name != "torch" and not self.can_fuse_loss and self.loss_backend != "auto":
            raise UserError(f"loss backend {name!r} needs {needs}; use 'torch'")
        return name if name != "torch" and self.can_fuse_loss else None

    def _losses(
        self,
        heads: list[Tensor],
        logits: list[Any] | str,  # or the backend of a loss without them
        targets: list[Tensor],
        num_items_in_batch: Tensor | int | None,
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return each head's mean cross-entropy, and next-token + λ · (sum of the further ones) for the optimiser."""
        losses: list[Tensor] = []
        objective: Any = 0.0
        counts = [(t != -100).sum() for t in targets]
        self._warn_of_shares(counts, targets[0], num_items_in_batch)
        for k, hidden in enumerate(heads):
            if isinstance(logits, str):
                total = fused_cross_entropy(logits, self.unembed_expand(hidden), self.lm_head, targets[k])
            else:
                total = self._summed_loss(logits[k], targets[k])
            losses.append((total / counts[k]).detach())
            mean = total / denominator(k, counts, num_items_in_batch)
            objective = objective + mean * (1.0 if k == 0 else self.config.mtp_loss_weight)
        return tuple(losses), objective

    def _warn_of_shares(self, counts: list[Tensor], targets: Tensor, num_items_in_batch: Any) -> None:
        """Warn if MTP heads' shares of the targets of several batches have to be taken from one; looked at once."""
        scalar = num_items_in_batch is not None and getattr(num_items_in_batch, "ndim", 0) == 0
        if len(counts) == 1 or not scalar or self._looked_at_shares or torch.compiler.is_compiling():
            return
        self._looked_at_shares = True
        rows_differ = bool(counts[0] < targets[:, 1:].numel())
        if rows_differ and bool(num_items_in_batch > counts[0]):
            _log.warning(
                "the trainer counts the next token's targets of several batches, and MTP losses take shares of them "
                "from each batch: not exact, as rows here have unequally many targets; use MultiTokenTrainerMixin, see "
                "docs/train.md"
            )

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
