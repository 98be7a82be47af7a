"""``vwn.widen``: a trained causal LM with virtual width that computes the same function until it is trained further.

The read takes the first ``m`` slots, the carry is the identity, every sublayer is written to all slots, the embedding
is repeated over them, and the reduce takes the first ``m``: the further slots hold copies that no logit depends on
yet, and whose routing weights have gradients from the first step.
"""

import logging
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vwn.common.errors import UserError
from vwn.hf.causal_lm import VirtualWidthForCausalLM
from vwn.hf.configuration import VirtualWidthConfig
from vwn.hf.families import has_head_bias
from vwn.hf.loading import load_whole
from vwn.hf.widening import base_model_class, refuse_family
from vwn.nn.embedding import repeat_over_slots

OPTIONS = ("connection", "dynamic", "carry_constraint", "num_mtp_modules", "mtp_loss_weight")

_log = logging.getLogger("vwn.hf")

# tolerance for the order of sums, in rounding steps of the largest logit
_ROUNDINGS, _ROUNDINGS_16_BIT = 64, 8


def widen(
    model: PreTrainedModel,
    *,
    m: int,
    n: int,
    embedding: str = "replicated",
    reduce_norm: str = "none",
    check: bool = True,
    **options: Any,
) -> VirtualWidthForCausalLM:
    """Give a trained causal LM virtual width ``r = n / m``, keeping its weights and its function.

    The new model shares the old one's tensors: training one changes both. Keep a ``copy.deepcopy`` of a model that is
    still needed.

    Args:
        model: any causal LM of transformers that :doc:`supported_models` lists, with its weights.
        m: fraction rate; must divide the hidden size.
        n: slots, ``n >= m``.
        embedding: ``"replicated"``, the ``V x D`` table repeated over the slots (and still tied where it was), or
            ``"direct"``, a ``V x D'`` table that starts as those copies (its head is then its own).
        reduce_norm: ``"none"``, with which the function is kept to the bit where the backbone's own norm follows, or
            ``"rms_norm"``, the norm of group size ``D`` in front of the reduce, exact up to rounding in front of an
            RMSNorm or LayerNorm; needs integer ``r``.
        check: compare the logits before and after on random ids.
        options: fields of :class:`VirtualWidthConfig` that leave the function alone: ``connection``, ``dynamic``,
            ``carry_constraint``, ``num_mtp_modules`` (new and untrained ones) and ``mtp_loss_weight``. ``"mhc"`` and,
            with several segments, ``"doubly_stochastic"`` only start near it.

    Returns:
        the widened model, in the same mode, dtype and place.

    Raises:
        UserError: a model that cannot be widened, with the reason, or one whose logits change.
    """
    config = _config(model, m=m, n=n, embedding=embedding, reduce_norm=reduce_norm, **options)
    before = _probe(model) if check else None
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    wide = _assemble(config, deepcopy(model, tensors))  # the same modules anew, with the same tensors in them
    wide.train(model.training)
    if before is not None:
        _compare(before, _probe(wide), wide.dtype, wide.config)
    return wide


def widen_checkpoint(
    model: str, out: Path, m: int, n: int, embedding: str = "replicated", reduce_norm: str = "none", dtype: str = "auto"
) -> VirtualWidthForCausalLM:
    """Load a causal LM and its tokenizer from safetensors, :func:`widen` it, and save both to ``out``.

    Raises:
        UserError: a model that is not whole or cannot be widened, or an ``out`` that holds something.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already and not empty; give another folder for the widened model")
    wide = widen(load_whole(model, dtype), m=m, n=n, embedding=embedding, reduce_norm=reduce_norm)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError):
        _log.warning("%s has no tokenizer that could be loaded; none is saved", model)
        tokenizer = None
    wide.save_pretrained(out)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    return wide


def _config(model: Any, embedding: str, **fields: Any) -> VirtualWidthConfig:
    name = type(model).__name__
    if isinstance(model, VirtualWidthForCausalLM):
        c = model.config
        raise UserError(f"the model has virtual width already (m = {c.m}, n = {c.n}); give its backbone to widen")
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise UserError(f"widen() takes a causal LM of transformers with its head (AutoModelForCausalLM), got {name}")
    if unknown := sorted(set(fields) - {"m", "n", "reduce_norm", *OPTIONS}):
        raise UserError(f"widen() has no option {unknown[0]!r}; it takes {', '.join(OPTIONS)} besides its own")
    if fields.get("connection") == "residual":
        raise UserError("connection 'residual' is the model as it is; give 'ghc' or 'hc'")
    if getattr(model, "_hf_peft_config_loaded", False) or hasattr(model, "peft_config"):
        raise UserError(f"the {name} has adapters; merge them into it, widen it, and attach new ones")
    lacking = [key for key, weight in model.named_parameters() if weight.is_meta]
    if lacking:
        raise UserError(
            f"{len(lacking)} weights of the {name} are offloaded ({lacking[0]} is one), or on the meta device, and "
            "could not be kept; load it without offloading, widen it, and offload the result"
        )
    if getattr(model, "is_quantized", False):
        raise UserError(f"the {name} is quantised, and its logits with it; widen the full-precision model")
    if embedding not in ("replicated", "direct"):
        raise UserError(f"embedding {embedding!r} cannot hold trained rows; use 'replicated' or 'direct'")
    backbone = model.config
    if backbone.model_type not in CONFIG_MAPPING:
        raise UserError(f"{name} is not of transformers itself, so a widened {backbone.model_type} could not be loaded")
    refuse_family(backbone)
    if _base(model) is None:
        raise UserError(f"{name} cannot be widened: it is not a head on the base model of its config")
    wide_table = embedding == "direct" and fields["n"] != fields["m"]
    tied = bool(getattr(backbone, "tie_word_embeddings", False)) and not wide_table
    config = VirtualWidthConfig(
        backbone=backbone,
        embedding=embedding,
        reduce="identity" if fields["n"] == fields["m"] else "linear",
        tie_word_embeddings=tied,
        **fields,
    )
    config.dtype = backbone.dtype
    return config


def _base(model: PreTrainedModel) -> Any:
    """Return the base model inside a causal LM, if it is the one of its config."""
    kind = base_model_class(model.config)
    return next((child for child in model.children() if type(child) is kind), None)


def _assemble(config: VirtualWidthConfig, shell: Any) -> VirtualWidthForCausalLM:
    """Build the virtual-width model around the modules of ``shell``; what is new in it has its initial values."""
    base, table, head = _base(shell), shell.get_input_embeddings(), shell.get_output_embeddings()
    g, narrow, device, dtype = config.geometry, table.weight, shell.device, shell.dtype
    config.backbone = base.config  # the one that all of its modules hold
    config._attn_implementation = base.config._attn_implementation
    shape, has_bias = tuple(head.weight.shape), has_head_bias(base.config)
    for module in shell.modules():
        module._is_hf_initialized = True  # trained weights, which stay
    wide = VirtualWidthForCausalLM(config, base, head)
    if shape != (config.vocab_size, g.hidden_size) or (head.bias is None) == has_bias:
        raise UserError(f"{type(shell).__name__} cannot be widened: its head is not one linear map D -> V, but {shape}")
    wide.generation_config = shell.generation_config
    for part in (wide.model.reduce, wide.model.mtp):
        for name, parameter in part.named_parameters():
            if ".connections." not in name:
                parameter.data = parameter.data.to(dtype)
        part.to(device)
    for layer in wide.model.layers:
        layer.connections.to(next(layer.parameters()).device)
    if table.weight is not narrow:  # direct: the rows are repeated, not kept
        table.weight = nn.Parameter(repeat_over_slots(narrow.detach(), g), requires_grad=narrow.requires_grad)
    return wide


@torch.no_grad()
def _probe(model: PreTrainedModel) -> Tensor:
    """Return logits ``[2, 19, V]`` of random ids, in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    vocabulary: int = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (2, 19), generator=generator).to(model.device)
    training = model.training
    try:
        logits = model.eval()(input_ids=ids, use_cache=False).logits
    finally:
        model.train(training)
    return logits.float()


def _compare(before: Tensor, after: Tensor, dtype: torch.dtype, config: VirtualWidthConfig) -> None:
    roundings = _ROUNDINGS_16_BIT if dtype.itemsize < 4 else _ROUNDINGS
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    difference, scale = (before - after.to(before.device)).abs().max().item(), before.abs().max().item()
    if not difference <= roundings * eps * max(scale, 1.0):
        reason = "the model does more than it shows, and cannot be widened as it is; please report its type"
        if config.connection == "mhc" or config.carry_constraint == "doubly_stochastic":
            reason = "a doubly-stochastic carry starts near the identity, not at it; check=False widens all the same"
        raise UserError(f"widening changed the logits by up to {difference:.2e} of {scale:.2e}: {reason}")
