"""Exact MTP losses under transformers' ``Trainer`` where accumulated batches differ in their targets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vwn.hf.documents import number_documents
from vwn.hf.loss import targets_of_heads


class MultiTokenTrainerMixin:
    """Count the targets of each head over all accumulated batches: ``class T(MultiTokenTrainerMixin, Trainer)``.

    ``Trainer`` counts the next token's alone. Without this the model takes each head's share of them from the batch at
    hand, which is exact for one batch, and for several whose rows have equally many targets.
    """

    model: Any
    accelerator: Any
    args: Any

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        items: Any = super()._get_num_items_in_batch(batch_samples, device)  # type: ignore[misc]
        heads = 1 + getattr(self.accelerator.unwrap_model(self.model).config, "num_mtp_modules", 0)
        outside: Any = (self.label_smoother, self.compute_loss_func)  # type: ignore[attr-defined]
        if items is None or heads == 1 or outside != (None, None) or self.args.n_gpu > 1:
            return items
        counts = torch.stack([self._count(heads, batch, device) for batch in batch_samples]).sum(0)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, "sum")
        return counts * (items / counts[0].clamp(min=1))  # what Trainer divides by, for tensor parallelism

    def _count(self, heads: int, batch: Any, device: torch.device) -> Tensor:
        given = {name: value for name, value in batch.items() if name not in ("labels", "shift_labels")}
        documents = number_documents(batch["labels"].shape, **given)
        targets = targets_of_heads(heads, batch["labels"], batch.get("shift_labels"), documents)
        return torch.stack([(t != -100).sum() for t in targets]).to(device)
