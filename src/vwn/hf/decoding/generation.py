"""Inputs of the model in ``generate()``: those of the backbone's own causal LM, and n-grams' ids before the chunk."""

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, GenerationMixin
from transformers.masking_utils import create_masks_for_generate

from vwn.common.errors import UserError
from vwn.hf.outputs import CACHE_FIELD
from vwn.nn.ngram import NO_TOKEN, with_context


class NgramGenerationMixin(GenerationMixin):
    """``GenerationMixin`` whose inputs hold ``preceding_ids`` and ``padding_mask`` where the embedding needs them."""

    config: Any
    base_model: Any

    @property
    def create_masks_for_generate(self) -> Any:
        """Function that makes masks for a cache of fixed length, the backbone's own if it has one."""
        causal_class = AutoModelForCausalLM._model_mapping.get(type(self.config.backbone), None)
        own = inspect.getattr_static(causal_class, "create_masks_for_generate", None)
        if own is None:
            return create_masks_for_generate
        make = own.__func__ if isinstance(own, staticmethod) else partial(own, self)
        return lambda config, **given: make(config=config.get_text_config(decoder=True), **given)

    def _switches_rope(self, length: int, cache: Cache | None) -> bool:
        """Return whether the rotary embedding changes for long texts here (Phi-3), so that the cache is void."""
        limit = getattr(self.config.backbone, "original_max_position_embeddings", None)
        if cache is None or limit is None or self.config.backbone.model_type not in ("phi3", "phimoe"):
            return False
        return length > limit and 0 < cache.get_seq_length() <= limit

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> bool:
        """Name a Mamba's cache ``cache_params``, as transformers before 5.24 does by the name of the model's class."""
        prepared = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if self.base_model.backbone.cache_name == "cache_params" and "past_key_values" in model_kwargs:
            model_kwargs["cache_params"] = model_kwargs.pop("past_key_values")
        return prepared

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Keep the cache under one name, whatever the output calls it."""
        updated = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if "cache_params" in updated:
            updated.pop("past_key_values", None)
        return updated

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        preceding_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Add the ids before the chunk and its padding for n-grams, whatever form the mask takes.

        Args:
            input_ids: all ids so far, ``[B, T]``; transformers cuts them to the chunk that the cache does not hold.
            preceding_ids: ids before ``input_ids``, ``[B, any]``, where these do not start the sequence.

        Raises:
            UserError: a cache of tokens whose ids are not given.
        """
        name = "cache_params" if "cache_params" in kwargs else CACHE_FIELD
        cache = kwargs.pop(name, None)
        if self._switches_rope(input_ids.shape[1], cache):
            cache, kwargs["next_sequence_length"] = None, None
        given = {name: cache, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **given, **kwargs)
        if cache is not None and cache.is_linear and all(cache.is_linear):  # Mamba masks the padding in a chunk
            chunk = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
            inputs["attention_mask"] = None if chunk.shape[1] == 1 else attention_mask
        order = self.config.ngram_order
        if order == 1 or inputs.get("input_ids") is None:
            return inputs
        known = input_ids if preceding_ids is None else torch.cat([preceding_ids, input_ids], dim=1)
        length = inputs["input_ids"].shape[1]
        before = known.shape[1] - length
        if before < order - 1 and inputs_embeds is None and cache is not None:
            cached = int(cache.get_seq_length())
            if cached > before:
                raise UserError(
                    f"the cache holds {cached} tokens whose ids n-gram embeddings need; give generate() all ids from "
                    "the start, and no prefill_chunk_size"
                )
        mask = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
        return inputs | ngram_inputs(known, length, order, mask)


def ngram_inputs(known: Tensor, length: int, order: int, attention_mask: Tensor | None) -> dict[str, Tensor]:
    """Return ``preceding_ids`` and ``padding_mask`` for the last ``length`` of all ids so far, ``known`` ``[B, T]``."""
    ids = with_context(known, order, attention_mask=attention_mask)[:, -(order - 1 + length) :]
    return {"preceding_ids": ids[:, : order - 1].contiguous(), "padding_mask": ids[:, order - 1 :] != NO_TOKEN}
