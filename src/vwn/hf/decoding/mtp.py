"""Self-speculative decoding with the model's own MTP modules: ``generate(use_mtp=True)``.

Each round the chain of modules drafts one token per module, and one pass of the main model over all of them keeps those
that it would have chosen itself. transformers' ``MTPCandidateGenerator`` does so for states of width ``D`` and modules
of its own kind; this is the same for an over-width state and ours.

``L`` tokens are known in a round. The main model has seen all but the last, so it has states for the positions up to
``L - 2``; there module ``k`` (from 1) joins the state with the embedding of token ``L - 2 + k`` and drafts token
``L - 1 + k``. A module's cache is right as far as the tokens that it was fed turned out to be the text.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList
from transformers.generation.candidate_generator import CandidateGenerator

from vwn.common.errors import UserError
from vwn.hf.decoding.generation import NgramGenerationMixin, ngram_inputs


@dataclass
class DraftCounts:
    """Counts of one call of ``generate``: tokens that each MTP module drafted, those of them that the main model kept
    (not the last of a round that an end token closes), its forward passes with the prompt's, and generated tokens."""

    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    forward_passes: int = 0
    new_tokens: int = 0

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted over drafted tokens, of all modules; None where nothing was drafted."""
        return sum(self.accepted) / sum(self.drafted) if sum(self.drafted) else None

    @property
    def tokens_per_pass(self) -> float | None:
        """New tokens per forward pass of the main model; plain decoding has 1."""
        return self.new_tokens / self.forward_passes if self.forward_passes else None


class MtpDrafts(CandidateGenerator):
    """Drafts for ``generate`` from the MTP modules and the over-width states of the main model."""

    requires_model_outputs = True
    model_kwargs_overrides = {"output_over_width_state": True}

    def __init__(
        self, model: Any, generation_config: GenerationConfig, logits_processor: LogitsProcessorList | None
    ) -> None:
        self.model, self.modules = model, model.model.mtp
        self.max_length, self.do_sample = generation_config.max_length, generation_config.do_sample
        self.logits_processor = logits_processor
        self.end_tokens: Tensor | None = getattr(generation_config, "_eos_token_tensor", None)
        self.counts = DraftCounts([0] * len(self.modules), [0] * len(self.modules))
        self._caches = [DynamicCache(config=module.layer.config) for module in self.modules]
        for cache in self._caches:
            cache.activate_past_recording()
        self._drafted = 0  # in the last round
        self._first = 0  # position of the first state; above 0 where the call began with a cache
        self._last_states: Tensor | None = None  # of the last positions, which may have to be taken once more

    def get_candidates(
        self,
        input_ids: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        model_outputs: Any = None,
        is_first_iteration: bool = False,
        n_last_matches: int = 0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the ids ``[1, L]`` with the drafts behind them, and the drafts' logits ``[1, drafts, V]``.

        Nothing is drafted before the first pass of the main model, beyond the length that was asked for, or after an
        end token.
        """
        drafts = min(len(self.modules), self.max_length - input_ids.shape[1] - 1)
        if is_first_iteration or drafts < 1:
            return input_ids, None
        states = self._states_to_take(model_outputs.over_width_state, int(n_last_matches), input_ids.shape[1])
        tokens, logits = self._draft(drafts, states, input_ids, model_kwargs or {})
        self._drafted = logits.shape[1]
        for k in range(self._drafted):
            self.counts.drafted[k] += 1
        return tokens, logits

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """Count; called after each pass of the main model."""
        self.counts.forward_passes += 1
        self.counts.new_tokens += int(num_matches) + 1
        for k in range(int(num_matches)):
            self.counts.accepted[k] += 1

    def _states_to_take(self, new: Tensor, matches: int, length: int) -> Tensor:
        """Return states ``[1, rows, D']`` up to position ``L - 2`` that some module has not seen with right tokens."""
        if self._last_states is None:
            self._first, again, states = length - 1 - new.shape[1], 0, new
        else:
            # Module k was fed k - 1 drafts; those that were wrong are as many positions of its cache to redo.
            again = min(max(0, self._drafted - 1 - matches), self._last_states.shape[1])
            for cache in self._caches[: self._drafted]:
                cache.crop(-again)
            new = new[:, : matches + 1]
            states = torch.cat([self._last_states, new], dim=1)
        held = states.shape[1]
        self._last_states = states[:, max(0, held - len(self.modules) + 1) :]
        return states[:, held - new.shape[1] - again :]

    def _draft(self, drafts: int, states: Tensor, ids: Tensor, context: dict[str, Any]) -> tuple[Tensor, Tensor]:
        end, rows = ids.shape[1] - 1, states.shape[1]
        mask, positions = context.get("attention_mask"), context["position_ids"]
        shared = {
            "attention_mask": None if mask is None else mask[:, self._first : end],
            "position_ids": positions[..., end - rows : end],
        }
        ahead = self._embed(ids, rows, context)
        all_logits = []
        for k in range(drafts):
            if k > 0:
                ahead = torch.cat([ahead[:, 1:], self._embed(ids, 1, context)], dim=1)
            cache = self._caches[k]

            def run(layer: Any, state: Tensor, cache: DynamicCache = cache) -> Tensor:
                return layer.run(inputs_embeds=state, cache=cache, use_cache=True, **shared).last_hidden_state

            hidden, states = self.modules[k](states, ahead.to(states.device), run)
            logits = self.model._unembed(hidden[:, -1:])[:, -1].to(ids.device, torch.float32)
            if self.logits_processor is not None:
                logits = self.logits_processor(ids, logits)
            all_logits.append(logits)
            chosen = torch.multinomial(logits.softmax(-1), 1) if self.do_sample else logits.argmax(-1, keepdim=True)
            ids = torch.cat([ids, chosen], dim=1)
            if self.end_tokens is not None and torch.isin(chosen, self.end_tokens.to(chosen.device)).any():
                break
        return ids, torch.stack(all_logits, dim=1)

    def _embed(self, ids: Tensor, count: int, context: dict[str, Any]) -> Tensor:
        """Compute the over-width embedding of the last ``count`` ids, ``[1, count, D']``."""
        embedding, mask = self.model.model.embed_tokens, context.get("attention_mask")
        order = self.model.config.ngram_order
        if order == 1:
            return embedding(ids[:, -count:])
        if mask is not None:
            mask = F.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
        before = context.get("preceding_ids")
        known = ids if before is None else torch.cat([before, ids], dim=1)
        inputs = ngram_inputs(known, count, order, mask)
        return embedding(ids[:, -count:], inputs["preceding_ids"], inputs["padding_mask"])


class MtpGenerationMixin(NgramGenerationMixin):
    """``generate(use_mtp=True)``: the tokens of plain decoding in fewer passes of the main model."""

    draft_counts: DraftCounts | None = None
    """Counts of the last call of ``generate`` with ``use_mtp=True``."""

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_generation_config(*args, **kwargs)
        config, kind = prepared[0], self.config.backbone._attn_implementation
        weights = config.return_dict_in_generate and config.output_attentions and kind != "eager"
        refused = {
            "needs MTP modules and this model has none (num_mtp_modules = 0)": not self.config.num_mtp_modules,
            f"goes with greedy decoding and sampling, not with num_beams = {config.num_beams}": config.num_beams
            not in (None, 1),
            f"with output_attentions needs attention weights, which attn_implementation {kind!r} does not give; call "
            "set_attn_implementation('eager')": weights,
        }
        for reason in (reason for reason, holds in refused.items() if config.use_mtp and holds):
            raise UserError(f"use_mtp {reason}, or drop use_mtp")
        return prepared

    def _get_candidate_generator(self, generation_config: GenerationConfig, **kwargs: Any) -> CandidateGenerator:
        if not generation_config.use_mtp:
            return super()._get_candidate_generator(generation_config=generation_config, **kwargs)
        others = {
            "assistant_model": kwargs.get("assistant_model"),
            "prompt_lookup_num_tokens": generation_config.prompt_lookup_num_tokens,
            "assistant_early_exit": generation_config.assistant_early_exit,
        }
        for name, value in others.items():
            if value is not None:
                raise UserError(f"use_mtp and {name} are two ways to draft tokens; give one of them")
        if kwargs["model_kwargs"].get("inputs_embeds") is not None:
            raise UserError("use_mtp needs the prompt's ids, not inputs_embeds; give input_ids")
        window = getattr(self.config.backbone, "keep_window_size", None)  # Doge: equal tokens tie in the choice of keys
        if window is not None and generation_config.max_length > window:
            raise UserError(
                f"beyond keep_window_size = {window} tokens what a backbone of type {self.config.backbone.model_type} "
                f"attends to hangs on rounding, so that use_mtp might change the text; here max_length is "
                f"{generation_config.max_length}: ask for fewer tokens, or drop use_mtp"
            )
        drafts = MtpDrafts(self, generation_config, kwargs.get("logits_processor"))
        self.draft_counts = drafts.counts
        return drafts
