"""The model as vLLM's transformers backend builds it. Imported by vLLM alone; never run in our tests."""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.models.transformers import TransformersForCausalLM

from vwn.nn.connection import Connection
from vwn.nn.initialisation import current_name
from vwn.vllm.plugin import prepare


class VirtualWidthForCausalLM(TransformersForCausalLM):
    """vLLM's head on our ``VirtualWidthModel``, whose output is ``D`` wide."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        prepare(vllm_config.model_config.hf_config, vllm_config.parallel_config.pipeline_parallel_size)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.skip_prefixes.append("model.mtp.")

    def init_parameters(self, module: nn.Module, dtype: torch.dtype | None = None) -> None:
        """Give the parameters memory, the routing in float32 whatever the model's dtype."""
        for connection in (m for m in module.modules() if isinstance(m, Connection)):
            super().init_parameters(connection, torch.float32)
        super().init_parameters(module, dtype)

    def load_weights(self, weights: Any) -> Any:
        """Load ``(name, tensor)`` pairs, also of earlier checkpoints."""
        return super().load_weights((current_name(name), weight) for name, weight in weights)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Return over-width embeddings ``[..., D']``, which the base model takes in place of ids."""
        return self.model.embed_tokens(input_ids)
