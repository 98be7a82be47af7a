"""Make an initialised model from a configuration: backbones by name, path or hub id; paired initialisation."""

from __future__ import annotations

import difflib
import hashlib
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vwn.common.errors import UserError
from vwn.data.reading import first_line
from vwn.hf import VirtualWidthConfig
from vwn.hf.loading import check_positions, load_model
from vwn.training.config import OutputInit, WidthOptions
from vwn.training.directory import locate
from vwn.training.output_init import start_outputs
from vwn.training.presets import PRESETS


def load_backbone(spec: str, vocab_size: int, window: int, eos_token_id: int | None = None) -> PreTrainedConfig:
    """Load a backbone's transformers config.

    Args:
        spec: a preset's name, a config file or a folder with one, or a hub id.
        vocab_size: tokens the model has to know; a preset takes it, a config must have at least as many.
        window: positions the model has to know.

    Raises:
        UserError: unknown backbone, or one too small for the tokenizer or the window.
    """
    if spec in PRESETS:
        fields = PRESETS[spec].fields(vocab_size, window)
        return CONFIG_MAPPING[fields.pop("model_type")](**fields, eos_token_id=eos_token_id)
    if not Path(spec).exists() and (spec.startswith((".", os.sep)) or spec.count("/") != 1):
        near = difflib.get_close_matches(spec, PRESETS, 1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(
            f"unknown backbone {spec!r}{meant}: give a preset ({', '.join(PRESETS)}), the path of a transformers "
            "config, or a hub id of the form owner/name"
        )
    try:
        config = AutoConfig.from_pretrained(spec)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the backbone config {spec!r}: {first_line(error)}") from error
    if isinstance(config, VirtualWidthConfig):
        raise UserError(f"{spec!r} is a virtual-width model already; give the config of its backbone instead")
    if config.vocab_size < vocab_size:
        raise UserError(
            f"the backbone {spec!r} knows {config.vocab_size} tokens, the tokenizer has {vocab_size}; "
            "take a smaller tokenizer or raise vocab_size in the config"
        )
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and limit < window:
        raise UserError(f"the backbone {spec!r} knows {limit} positions, --window is {window}; lower --window")
    return config


def resize_backbone(backbone: PreTrainedConfig, hidden_size: int | None, intermediate_size: int | None) -> Any:
    """Return the same backbone with another width ``D``, and as many more heads of the same size.

    ``intermediate_size`` None keeps the FFN's multiple of ``D``.

    Raises:
        UserError: a width that is no whole number of heads, or a backbone without these sizes.
    """
    if hidden_size is None and intermediate_size is None:
        return backbone
    fields = backbone.to_dict()
    old, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    if not old or not heads or not fields.get("intermediate_size"):
        raise UserError(f"a backbone of type {backbone.model_type} has no sizes of its own to change; leave them")
    new = hidden_size or old
    ratio = Fraction(new, old)
    for name in ("num_attention_heads", "num_key_value_heads"):
        number = ratio * (fields.get(name) or heads)
        if number.denominator != 1:
            step = old // heads
            raise UserError(f"--hidden-size {new} is no whole number of heads of {step}; take a multiple of {step}")
        fields[name] = int(number)
    if fields.get("initializer_range") == old**-0.5:
        fields["initializer_range"] = new**-0.5
    fields |= {"hidden_size": new, "intermediate_size": intermediate_size or round(ratio * fields["intermediate_size"])}
    return type(backbone)(**fields)


def model_config(backbone: PreTrainedConfig, m: int | None, n: int | None, width: WidthOptions) -> PreTrainedConfig:
    """Return the config to train: the backbone's own where there is nothing to add to it, else a virtual-width one."""
    shared: dict[str, Any] = dict(backbone=backbone, num_mtp_modules=width.mtp, mtp_loss_weight=width.mtp_loss_weight)
    if width.ngram_order > 1:
        shared |= dict(ngram_order=width.ngram_order, ngram_buckets=width.ngram_buckets)
    if m is None or n is None:
        if width.table_factor > 1:
            shared |= dict(table_factor=width.table_factor)
        return VirtualWidthConfig(**shared, connection="residual") if width != WidthOptions() else backbone
    relative = width.connection != "ghc"  # their papers replicate the embedding and sum the streams
    return VirtualWidthConfig(
        **shared,
        m=m,
        n=n,
        connection=width.connection,
        carry_constraint=width.carry_constraint,
        dynamic=not width.static,
        embedding=width.embedding or ("replicated" if relative else "direct"),
        reduce=width.reduce or ("sum" if relative and n > m else None),
        reduce_norm=width.reduce_norm,
        reduce_init=width.reduce_init,
    )


def build_model(
    config: PreTrainedConfig, seed: int, embedding_std: float | None = None, output_init: OutputInit = "config"
) -> PreTrainedModel:
    """Build a model, initialised so that models that share a module share its initial values.

    ``embedding_std`` is the standard deviation of the embedding table, by default the config's; ``output_init`` is
    as in :func:`vwn.training.output_init.start_outputs`, whose errors it raises.
    """
    model = AutoModelForCausalLM.from_config(config)
    initialise(model, seed)
    start_outputs(model, output_init)
    if embedding_std is not None:
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(embedding_std / config.get_text_config().initializer_range)
    return model


def start_from(checkpoint: str, vocab_size: int, window: int) -> PreTrainedModel:
    """Load a trained model, plain or of virtual width, to train on in float32.

    Raises:
        UserError: there is no model, its weights are damaged or not all there, or it knows too few tokens or positions.
    """
    try:
        model = load_model(locate(checkpoint)).float()
    except OSError as error:
        raise UserError(f"cannot load the weights {checkpoint!r}: {first_line(error)}") from error
    if model.config.vocab_size < vocab_size:
        raise UserError(
            f"{checkpoint!r} knows {model.config.vocab_size} tokens, the tokenizer has {vocab_size}; "
            "give the one it was trained with"
        )
    check_positions(model, window)
    return model


def record_start(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Write what :func:`recorded_start` and the text need to continue a run without the weights it started from."""
    tokenizer.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    model.config.save_pretrained(folder)  # last: it makes the folder whole


def recorded_start(folder: Path) -> PreTrainedModel:
    """Return the model of :func:`start_from` with new weights, for those of a checkpoint."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float()
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def initialise(model: PreTrainedModel, seed: int) -> None:
    """Initialise every module from a seed of its own, made from ``seed`` and the module's name.

    Arms of a comparison then start from the same backbone, whatever else they hold.
    """
    owners = {"": model}
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        owners[name] = module if isinstance(module, PreTrainedModel) else owners[parent]
        torch.manual_seed(_seed_of_module(seed, name))
        owners[name]._init_weights(module)
    model.tie_weights()


def _seed_of_module(seed: int, name: str) -> int:
    # "model.layers" in a stock model is "model.backbone.layers" in ours
    return int.from_bytes(hashlib.sha256(f"{seed}/{name.replace('.backbone.', '.')}".encode()).digest()[:7], "big")
