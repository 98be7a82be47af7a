"""The loss of a model with MTP modules (section 3.4), as :class:`vwn.hf.VirtualWidthForCausalLM` has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchtitan.components.loss import IGNORE_INDEX, BaseLoss, cross_entropy_loss
from torchtitan.models.deepseek_v3.mtp import roll_mtp_sequence


class MultiTokenLoss(BaseLoss):
    """Cross-entropy of the next token plus λ times the sum of the further tokens', over the number of targets.

    Each head's sum is divided by its own targets: for the further tokens, the number over all ranks and accumulated
    batches times this batch's share of them.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        """λ, and the vocabulary, whose logits are spread over ranks under tensor parallelism."""

        weight: float = 0.3
        global_vocab_size: int | None = None

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        self.fn = cross_entropy_loss
        self._maybe_compile(compile_config)
        self.weight, self.vocab_size = config.weight, config.global_vocab_size

    def __call__(
        self, pred: Any, labels: Tensor, global_valid_tokens: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits ``[B, S, V]`` of the next token and of each further one; ``labels`` ``[B, S]``, shifted by one."""
        counted = (labels != IGNORE_INDEX).sum().clamp(min=1)
        loss = self.fn(pred[0], labels, global_vocab_size=self.vocab_size)
        for ahead, logits in enumerate(pred[1:], 1):
            targets = roll_mtp_sequence(labels, shift=ahead, fill_value=IGNORE_INDEX, positions=kwargs.get("positions"))
            further = self.fn(logits, targets, global_vocab_size=self.vocab_size)
            count = (targets != IGNORE_INDEX).sum().clamp(min=1)
            loss = loss + self.weight * counted / count * further
        return loss if global_valid_tokens is None else loss / global_valid_tokens, {}
