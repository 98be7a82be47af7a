"""The model card beside a checkpoint: what the model is, how to load it and, after a training run, what it was."""

import os
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

LOADING = """\
```python
import vwn.hf  # the package vwn has to be installed
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH OR HUB ID OF THIS FOLDER")
```"""

METHOD = (
    "A causal language model of transformers with virtual width (*Virtual Width Networks*, arXiv 2511.11238): the "
    "representation of a token is `r = n/m` times as wide as the backbone, and small learned routing matrices connect "
    "the two around every sublayer."
)
PLAIN = "A causal language model of transformers with its own residual connections, the baseline of a comparison."


@dataclass(frozen=True)
class TrainingFacts:
    """Facts about a training run for the card; losses are of validation, in nats per token, by name."""

    data: str
    tokens: int
    losses: dict[str, float]


def model_card(model: Any, facts: TrainingFacts | None = None) -> ModelCard:
    """Return the card of a model, with the licence left to whoever publishes it.

    Folders are left out of what ``facts`` name: they say nothing about the model, and much about a machine.
    """
    c = model.config
    tags = ["vwn", "virtual-width-networks", c.backbone.model_type, *(model.model_tags or ())]
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=list(dict.fromkeys(tags)))
    name, wide = type(c.backbone).__name__.removesuffix("Config"), c.connection != "residual"
    title = f"# {name} with virtual width {c.n / c.m:g}" if wide else f"# {name}, plain"
    parts = [f"---\n{data.to_yaml()}\n---", title, METHOD if wide else PLAIN, _table(_architecture(model))]
    parts += ["## Loading", LOADING]
    if facts is not None:
        losses = {f"validation {name}, nats per token": f"{value:.4f}" for name, value in facts.losses.items()}
        rows = {"data": without_folders(facts.data), "tokens": f"{facts.tokens:,}", **losses}
        parts += ["## Training", _table(rows)]
    parts += ["## Licence", "Not stated: whoever publishes this model adds it."]
    return ModelCard("\n\n".join(parts) + "\n")


def without_folders(text: str) -> str:
    """Cut absolute paths in comma-separated ``text`` to their last part; hub ids and relative paths stay."""
    paths = text.split(",")
    return ",".join(PurePath(p).name or p if os.path.isabs(p) or p.startswith(("~", "..")) else p for p in paths)


def _architecture(model: Any) -> dict[str, str]:
    c = model.config
    return {
        "backbone": f"{c.backbone.model_type}, width D = {c.hidden_size}, {c.num_hidden_layers} layers",
        **{f"`{name}`": str(getattr(c, name)) for name in type(c).__annotations__ if name != "backbone"},
        "vocabulary": f"{c.vocab_size:,}",
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
    }


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items() if value)])
