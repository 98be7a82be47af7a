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
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vwn.common.errors import UserError
from vwn.hf.causal_lm import VirtualWidthForCausalLM
from vwn.hf.checkpoint.saving import check_weight_files
from vwn.hf.configuration import VirtualWidthConfig
from vwn.hf.widening import base_model_class, build_mtp_layer, refuse_family
from vwn.nn.connection import Connection
from vwn.nn.initialisation import StatesItsInitialValues

PROBE_SHAPE = (2, 19)

OPTIONS = ("connection", "dynamic", "carry_constraint", "num_mtp_modules", "mtp_loss_weight")

# types whose logits stay the same to the bit in float32
_EXACT = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "olmo", "seed_oss", "smollm3", "internlm3")

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
            ``carry_constraint``, ``num_mtp_modules`` (new and untrained ones) and ``mtp_loss_weight``.

    Returns:
        the widened model, in the same mode, dtype and place.

    Raises:
        UserError: a model that cannot be widened, with the reason, or one whose logits change.
    """
    config = _config(model, m=m, n=n, embedding=embedding, reduce_norm=reduce_norm, **options)
    before = _probe(model) if check else None
    shell = _share(model)
    wide = _assemble(config, shell, _base(shell))
    _materialise(wide, model)
    wide.generation_config = shell.generation_config
    wide.train(model.training)
    if before is not None:
        exact = config.backbone.model_type in _EXACT and wide.dtype == torch.float32 and reduce_norm == "none"
        _compare(before, _probe(wide), wide.dtype, exact and not options)
    return wide


def widen_checkpoint(
    model: str,
    out: Path,
    m: int,
    n: int,
    embedding: str = "replicated",
    reduce_norm: str = "none",
    dtype: str = "auto",
) -> VirtualWidthForCausalLM:
    """Load a causal LM and its tokenizer from safetensors, :func:`widen` it, and save both to ``out``.

    Raises:
        UserError: no such model, one that is not whole or cannot be widened, or an ``out`` that holds something.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already and not empty; give another folder for the widened model")
    if not Path(model).exists() and (model.count("/") != 1 or model.startswith((".", "/", "~"))):
        raise UserError(f"there is no model at {model!r}; give a folder with a config.json or a hub id owner/name")
    if Path(model).is_dir() and (Path(model) / "config.json").exists():
        check_weight_files(Path(model))
    where: dict[str, Any] = {"trust_remote_code": False}
    try:
        found, info = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **where
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"cannot load a causal LM from {model!r}: {str(error).strip().splitlines()[0]}") from error
    if lacking := sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]):
        raise UserError(
            f"{len(lacking)} weights of the model are missing from {model}, or of another shape ({lacking[0]} is one), "
            "and would be random; give a whole checkpoint"
        )
    wide = widen(found, m=m, n=n, embedding=embedding, reduce_norm=reduce_norm)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, **where)
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
    """The base model inside a causal LM, if it is the one of its config."""
    kind = base_model_class(model.config)
    return next((child for child in model.children() if type(child) is kind), None)


def _share(model: PreTrainedModel) -> PreTrainedModel:
    """The same modules anew, with the same tensors in them."""
    tensors = [*model.parameters(), *model.buffers()]
    return deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _assemble(config: VirtualWidthConfig, shell: Any, base: Any) -> VirtualWidthForCausalLM:
    """The virtual-width model around ``base``; what is new in it still has no memory."""
    table, head = shell.get_input_embeddings(), shell.get_output_embeddings()
    g, narrow = config.geometry, table.weight
    config.backbone = base.config  # the one that all of its modules hold
    config._attn_implementation = base.config._attn_implementation
    with torch.device("meta"):
        wide = VirtualWidthForCausalLM(config, base)
    if head.weight.shape != wide.lm_head.weight.shape or (head.bias is None) != (wide.lm_head.bias is None):
        shape = tuple(head.weight.shape)
        raise UserError(f"{type(shell).__name__} cannot be widened: its head is not one linear map D -> V, but {shape}")
    wide.lm_head = head
    if table.weight is not narrow:  # direct: the rows are repeated, not kept
        repeats = -(-g.n // g.m)
        rows = torch.cat([narrow.detach()] * repeats, dim=1)[:, : g.over_width].clone()
        table.weight = nn.Parameter(rows, requires_grad=narrow.requires_grad)
    return wide


def _materialise(wide: VirtualWidthForCausalLM, model: PreTrainedModel) -> None:
    """Give the new modules memory beside the old ones, and their initial values."""
    device, dtype = model.device, model.dtype
    for predictor in wide.model.mtp:
        predictor.to_empty(device=device)
    layers: Any = wide.model.layers
    for layer in layers:
        place = next((p.device for p in layer.parameters() if not p.is_meta), device)
        for connection in layer.connections:
            connection.to_empty(device=place)
    wide.model.reduce.to_empty(device=device)
    for name, module in wide.named_modules():
        if isinstance(module, StatesItsInitialValues):
            if not name.startswith(("model.embed_tokens", "model.mtp")):
                module.reset_parameters()
            if not isinstance(module, Connection):
                module.to(dtype)
    if len(wide.model.mtp):
        _initialise_predictors(wide, model)


def _initialise_predictors(wide: VirtualWidthForCausalLM, model: PreTrainedModel) -> None:
    for k, predictor in enumerate(wide.model.mtp):
        layer, norm = build_mtp_layer(wide.config, k, wide.model.layers[-1])
        predictor.layer, predictor.norm = layer.to(model.device), norm.to(model.device)
        for module in predictor.modules():
            module._is_hf_initialized = False  # type: ignore[assignment]
            wide._initialize_weights(module)
        for module in predictor.modules():
            if not isinstance(module, Connection):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(model.dtype)


@torch.no_grad()
def _probe(model: PreTrainedModel) -> Tensor:
    """Logits ``[2, 19, V]`` of random ids, in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    vocabulary: int = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, PROBE_SHAPE, generator=generator).to(model.device)
    training = model.training
    try:
        logits = model.eval()(input_ids=ids, use_cache=False).logits
    finally:
        model.train(training)
    return logits.float()


def _compare(before: Tensor, after: Tensor, dtype: torch.dtype, exact: bool) -> None:
    roundings = 0 if exact else _ROUNDINGS_16_BIT if dtype.itemsize < 4 else _ROUNDINGS
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    difference, scale = (before - after.to(before.device)).abs().max().item(), before.abs().max().item()
    if not difference <= roundings * eps * max(scale, 1.0):
        raise UserError(
            f"widening changed the logits by up to {difference:.2e} of {scale:.2e}: the model does more than it shows, "
            "and cannot be widened as it is; please report its type"
        )
