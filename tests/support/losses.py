"""The training loss with and without logits in memory."""

from __future__ import annotations


def with_and_without_logits(model, **inputs):
    """Output and gradients with logits and without."""
    results = []
    for backend in ("torch", "liger"):
        model.loss_backend = backend
        model.zero_grad()
        out = model(**inputs)
        out.loss.backward()
        results.append((out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    return results
