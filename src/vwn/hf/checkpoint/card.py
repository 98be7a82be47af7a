"""The model card beside a checkpoint: what the model is, how to load it and, after a training run, what it was."""

import os
import shlex
from dataclasses import dataclass, field
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
    command: str
    versions: dict[str, str] = field(default_factory=dict)


def model_card(model: Any, facts: TrainingFacts | None = None) -> ModelCard:
    """The card of a model, with the licence left to whoever publishes it.

    Folders are left out of what ``facts`` name: they say nothing about the model, and much about a machine.
    """
    c = model.config
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["vwn", "virtual-width-networks", c.backbone.model_type],
    )
    wide = c.connection != "residual"
    parts = [f"---\n{data.to_yaml()}\n---", f"# {_title(c)}", METHOD if wide else PLAIN, _table(_architecture(model))]
    parts += ["## Loading", LOADING]
    if facts is not None:
        losses = {f"validation {name}, nats per token": f"{value:.4f}" for name, value in facts.losses.items()}
        rows = {"data": without_folders(facts.data), "tokens": f"{facts.tokens:,}", **losses}
        rows |= {"versions": ", ".join(f"{name} {v}" for name, v in facts.versions.items())}
        parts += ["## Training", _table(rows), f"```\n{_command_without_folders(facts.command)}\n```"]
    parts += ["## Licence", "Not stated: whoever publishes this model adds it."]
    return ModelCard("\n\n".join(parts) + "\n")


def without_folders(text: str) -> str:
    """The last part of every absolute path in comma-separated ``text``; hub ids and relative paths stay."""
    return ",".join(_last_part(part) for part in text.split(","))


def _command_without_folders(command: str) -> str:
    words = []
    for word in shlex.split(command):
        option, equals, value = word.partition("=")
        words.append(f"{option}={without_folders(value)}" if equals else without_folders(word))
    return shlex.join(words)


def _last_part(path: str) -> str:
    return PurePath(path).name or path if os.path.isabs(path) or path.startswith(("~", "..")) else path


def _title(config: Any) -> str:
    name = type(config.backbone).__name__.removesuffix("Config")
    return f"{name} with virtual width {config.n / config.m:g}" if config.connection != "residual" else f"{name}, plain"


def _architecture(model: Any) -> dict[str, str]:
    c = model.config
    rows = {"backbone": f"{c.backbone.model_type}, width D = {c.hidden_size}, {c.num_hidden_layers} layers"}
    if c.connection != "residual":
        width = c.geometry.over_width
        rows |= {
            "fraction rate `m`, slots `n`": f"{c.m}, {c.n}",
            "virtual width factor `r = n/m`": f"{c.n / c.m:g} (over-width {width})",
            "connection": f"{c.connection}, {'dynamic' if c.dynamic else 'static'}{', frozen' if c.frozen else ''}"
            + (f", {c.carry_constraint} carry" if c.carry_constraint != "none" else ""),
            "reduce": f"{c.reduce}, norm {c.reduce_norm}",
        }
    embedding = c.embedding if c.connection != "residual" else "table"
    if c.ngram_order > 1:
        embedding += f", n-grams up to {c.ngram_order} in {c.ngram_buckets} buckets each"
    if c.table_factor > 1:
        embedding += f", {c.table_factor} times as wide as the backbone"
    tied = "tied to the unembedding" if c.tie_word_embeddings else "not tied"
    return rows | {
        "embedding": f"{embedding}, {tied}",
        "vocabulary": f"{c.vocab_size:,}",
        "multi-token prediction modules": str(c.num_mtp_modules),
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
    }


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items() if value)])
