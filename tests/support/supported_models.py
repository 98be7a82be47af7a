"""What `vwn.widen` makes of every causal language model of the installed transformers; writes docs/supported_models.md.

python tests/support/supported_models.py > docs/supported_models.md
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES
from transformers.utils import logging

import zoo
from vwn import UserError, widen

PAGE = Path(__file__).parents[2] / "docs" / "supported_models.md"
HEADER = """\
# Supported models

What [`vwn.widen`](widen.md) and `VirtualWidthConfig(backbone=…)` do with each causal language model of transformers
{version}, tried on a tiny model of the type with random weights and all of its kinds of layers, widened to
`m = 2, n = 3`: **{exact} give the same logits to the bit** (float32, CPU), {close} the same up to rounding, {refused}
are refused. "Cached": decoding with the KV cache gives the plain model's logits.

`python tests/support/supported_models.py` makes this page, and a test checks every row. If a type is refused but its
layers are sums of sublayers all the same, you can [describe them by hand](layouts.md).

| type | logits | cached |
|---|---|---|
"""


def logits_of(model: Any, ids: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
    """Logits of a full pass, and of a prompt followed by single tokens with the cache: ``[B, S, V]`` each."""
    with torch.no_grad():
        full = model(ids).logits
        out = model(ids[:, :prompt], use_cache=True)
        parts = [out.logits]
        names = ("cache", "past_key_values", "cache_params")
        name, cache = next(((n, out[n]) for n in names if n in out), (None, None))
        for k in range(prompt, ids.shape[1]):
            given = {name: cache} if name else {}
            parts.append(model(ids[:, k : k + 1], use_cache=True, **given).logits if name else full[:, k : k + 1])
    return full, torch.cat(parts, dim=1)


def status(model: Any, wide: Any) -> tuple[str, str]:
    """``logits`` and ``cached`` of the row of a model and its widened one, or of the error in its place."""
    if isinstance(wide, UserError):
        reason = str(wide).split("cannot be widened")[-1].partition(": ")[2].partition("; if it is a sum")[0]
        return f"refused: {reason or wide}", ""
    ids = torch.randint(0, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    plain, ours = logits_of(model, ids, 6), logits_of(wide, ids, 6)
    scale = plain[0].abs().max().item()
    verdicts = []
    for theirs, wides in zip(plain, ours, strict=True):
        difference = (theirs - wides).abs().max().item()
        verdicts.append("exact" if difference == 0 else "close" if difference < 1e-5 * max(scale, 1.0) else "WRONG")
    return verdicts[0], verdicts[1]


def widened(model_type: str) -> tuple[Any, Any]:
    """A tiny model of a type, and what widening it gives: a model or the error."""
    model = zoo.tiny_causal_lm(model_type)
    try:
        return model, widen(model, m=2, n=3)
    except UserError as error:
        return model, error


def row(model_type: str, model: Any = None, wide: Any = None) -> str:
    """A line of the page; of a model and its widened one if they are at hand."""
    if model_type in zoo.NOT_DECODERS:
        found = f"refused: {zoo.NOT_DECODERS[model_type]}", ""
    else:
        found = status(*(widened(model_type) if model is None else (model, wide)))
    return "| `{}` | {} | {} |".format(model_type, *found)


def page() -> str:
    """The whole page."""
    logging.set_verbosity_error()
    rows = []
    for model_type in (name for name in NAMES if name != "virtual_width"):
        print(model_type, file=sys.stderr)
        rows.append(row(model_type))
    kinds = {kind: sum(f"| {kind}" in line for line in rows) for kind in ("exact |", "close |", "refused")}
    counts = {kind.split()[0]: count for kind, count in kinds.items()}
    return HEADER.format(version=transformers.__version__, **counts) + "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(page(), end="")
