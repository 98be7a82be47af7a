"""Backbones of transformers with virtual-width layers: the same modules and names, the residual adds replaced.

The layer loop of a transformers decoder treats the hidden state as opaque, so it runs unchanged on the over-width
state once its layers read from it and write to it. Layer and backbone get a subclass of their own class, so that
whatever transformers does by class (recording outputs, checkpointing, parallel plans) still applies.
"""

import inspect
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers import initialization as init

from vwn.common.errors import UserError
from vwn.hf.anatomy import Anatomy, find_anatomy
from vwn.hf.configuration import VirtualWidthConfig
from vwn.hf.families import family_of
from vwn.hf.layer import VirtualWidthLayer, take_residuals
from vwn.hf.layouts import Layout, registered_layout
from vwn.hf.on_demand import OnDemand, mix_in, mixed_class, own_class
from vwn.hf.sublayers import meta_copy, run_probe
from vwn.nn.connection import Connection, Connections
from vwn.nn.embedding import repeat_over_slots
from vwn.nn.generalized import GeneralizedHyperConnection
from vwn.nn.geometry import Geometry
from vwn.nn.initialisation import StatesItsInitialValues
from vwn.nn.relatives import HyperConnection, ManifoldHyperConnection

# transformers' names for a cache: from 5.24 on, before that, and before that of Mamba's kind
CACHE_NAMES = ("cache", "past_key_values", "cache_params")
_OPTIONAL = ("position_ids", *CACHE_NAMES, "output_hidden_states", "output_attentions", "lookahead")


class VirtualWidthBackbone(OnDemand):
    """Mixin for a backbone: initialises our modules among its own, and takes the arguments that it knows."""

    prefix = "VirtualWidth"

    anatomy: Anatomy
    arguments: frozenset[str] | None  # that its forward takes; None if it takes any
    cache_name: str  # what its forward calls a cache

    def find_parts(self) -> None:
        """Find its parts, the arguments of its ``forward``, and its name for a cache."""
        self.anatomy, parameters = find_anatomy(self), inspect.signature(self.forward).parameters  # type: ignore[attr-defined]
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self.arguments = None if takes_any else frozenset(parameters)
        self.cache_name = next((name for name in CACHE_NAMES if name in parameters), "past_key_values")

    def run(self, cache: Any = None, **arguments: Any) -> Any:
        """Run its forward without arguments that it does not know and could not use, such as positions beside ALiBi."""
        arguments[self.cache_name] = cache
        if self.arguments is not None:
            arguments = {k: v for k, v in arguments.items() if k in self.arguments or k not in _OPTIONAL}
        return self(**arguments)  # type: ignore[operator]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        init_virtual_width(module)


class RepeatedOverSlots(OnDemand):
    """Mixin for a module whose output of width ``D`` is added to the embedding, such as positions."""

    prefix = "Repeated"

    geometry: Geometry

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return ``[..., D']``: the module's output, once in every slot (slot ``j`` = segment ``j mod m``)."""
        return repeat_over_slots(super().forward(*args, **kwargs), self.geometry)  # type: ignore[misc]


class NoPositions(nn.Module):
    """Adds nothing where a backbone adds positions."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return zero, whatever it is asked for."""
        like = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return torch.zeros((), device=like.device)


class NormedInBlocks(OnDemand):
    """Mixin for a norm of width ``D`` over the embedding: it normalises every ``D`` numbers, the last partly again."""

    prefix = "InBlocks"

    geometry: Geometry

    def forward(self, state: Tensor) -> Tensor:
        """Map ``[..., D']`` to ``[..., D']``."""
        g = self.geometry
        blocks = list(state.split(g.hidden_size, dim=-1))
        missing = g.hidden_size - blocks[-1].shape[-1]
        blocks[-1] = torch.cat([blocks[-1], blocks[0][..., g.hidden_size - missing :]], dim=-1)
        normed = [super(NormedInBlocks, self).forward(block) for block in blocks]  # type: ignore[misc]
        return torch.cat(normed, dim=-1)[..., : g.over_width]


def init_virtual_width(module: nn.Module) -> None:
    """Initialise one module of ours, leaving alone what was loaded."""
    if isinstance(module, StatesItsInitialValues):
        for name, value in module.initial_values().items():
            init.copy_(getattr(module, name), value)


def new_backbone(config: PreTrainedConfig) -> Any:
    """Build a base model from its config; a ``UserError`` if its type cannot be widened."""
    refuse_family(config)
    return mixed_class(VirtualWidthBackbone, base_model_class(config))(config)


def widen_backbone(config: VirtualWidthConfig, model: Any) -> tuple[Any, nn.Module, nn.Embedding]:
    """Make a base model of transformers run on over-width states, in place.

    Args:
        config: the virtual width.
        model: a base model, which maps ids to hidden states ``[B, S, D]``.

    Returns:
        the model, which now maps ``inputs_embeds`` ``[B, S, D']`` to ``last_hidden_state`` ``[B, S, D']``; the norm of
        width ``D`` that it ended with, which belongs behind the reduce; and its token embedding, ``V x D``.

    Raises:
        UserError: a model that cannot be widened, with the reason.
    """
    if not isinstance(model, VirtualWidthBackbone):
        mix_in(VirtualWidthBackbone, model)
        with torch.device("meta"):  # transformers notes what a class can record when one of it is made
            type(model)(model.config)
    model.find_parts()
    layouts = find_layouts(model)
    norm, table = model.anatomy.take_ends(model)
    _widen_front(config, model)
    first = 0
    for layer, layout in zip(model.anatomy.layers(model), layouts, strict=True):
        if config.connection != "residual":
            _widen_layer(layer, layout, config, first)
        first += len(layout.names)
    model._no_split_modules = {type(layer).__name__ for layer in model.anatomy.layers(model)}
    return model, norm, table


def find_layouts(model: Any) -> list[Layout]:
    """Find each layer's layout: registered, told by its family, or found by a probe."""
    layers, told = model.anatomy.layers(model), family_of(model.config).sublayers
    layouts: list[Any] = [registered_layout(layer) or told for layer in layers]
    for layer in layers:
        if "forward" in vars(layer):
            raise UserError(
                f"{type(layer).__name__} cannot be widened: something has replaced the forward of this instance, as "
                "accelerate's hooks do; widen the model before that"
            )
    if None in layouts:
        probe = meta_copy(model)
        probed = probe.anatomy.layers(probe)
        for layer, layout in zip(probed, layouts, strict=True):
            if layout is None:
                take_residuals(layer, None)
        run_probe(probe, model.config.hidden_size)
        for i, layer in enumerate(probed):
            layouts[i] = getattr(layer, "layout", layouts[i])
    return layouts


def refuse_family(config: PreTrainedConfig) -> None:
    """Raise a ``UserError`` with the reason if a model type cannot be widened."""
    family = family_of(config)
    if config.get_text_config(decoder=True) is not config:
        reason = "it takes more than text; widen its text model"
    elif getattr(config, "hidden_size_per_layer_input", 0):
        reason = "its layers take inputs of their own, computed from an embedding of the backbone's width"
    elif getattr(config, "word_embed_proj_dim", config.hidden_size) != config.hidden_size:
        reason = "its embedding has another width than its layers"
    elif family.refused:
        reason = family.refused
    else:
        return
    raise UserError(f"a backbone of type {config.model_type} cannot be widened: {reason}")


def build_mtp_layer(config: VirtualWidthConfig, index: int, last: nn.Module) -> tuple[Any, nn.Module]:
    """Build a backbone of one layer for MTP module number ``index``, of the kind of the backbone's ``last`` layer.

    Returns:
        the backbone, and its norm.

    Raises:
        UserError: a type whose layers cannot be MTP modules, with the reason.
    """
    family, depth = family_of(config.backbone), config.backbone.num_hidden_layers
    try:
        if family.no_mtp:
            raise ValueError(family.no_mtp)
        model = new_backbone(config.mtp_backbone())
        model.find_parts()
        if len(model.anatomy.layers(model)) != 1:
            raise ValueError("its number of layers is not that of its config's num_hidden_layers")
        norm, _ = model.anatomy.take_ends(model)
        layer = own_class(last)(config.backbone, depth - 1)
    except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:  # types count layers differently
        raise UserError(
            f"a backbone of type {config.backbone.model_type} cannot have MTP modules, set num_mtp_modules to 0: "
            f"{str(error).strip().splitlines()[-1].strip()}"
        ) from error
    stack = model.anatomy.stack(model)
    for name in family.positions:  # the state has them already
        setattr(stack, name, NoPositions())
    if family.embedding_norm:
        setattr(stack, family.embedding_norm, nn.Identity())
    for module in layer.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = 0  # its cache, should it get one, has one layer
    if isinstance(last, VirtualWidthLayer):
        _widen_layer(layer, last.layout, config, (depth + index) * len(last.layout.names))
    model.anatomy.layers(model)[0] = layer
    return model, norm


def _widen_layer(layer: Any, layout: Any, config: VirtualWidthConfig, first: int) -> None:
    layer.connections = Connections(_connection(config, first + i) for i in range(len(layout.names)))
    take_residuals(layer, layout)


def _widen_front(config: VirtualWidthConfig, model: Any) -> None:
    """Fit what stands between embedding and layers to the over-width state."""
    if config.geometry.n == config.geometry.m:
        return
    family, stack = family_of(model.config), model.anatomy.stack(model)
    for names, mixin in ((family.positions, RepeatedOverSlots), ((family.embedding_norm,), NormedInBlocks)):
        for name in filter(None, names):
            module: Any = getattr(stack, name)
            module.geometry = config.geometry
            mix_in(mixin, module)


def _connection(config: VirtualWidthConfig, index: int) -> Connection:
    """Make the connection of sublayer number ``index`` of the model."""
    g = config.geometry
    if config.connection == "mhc":
        return ManifoldHyperConnection(g.hidden_size, g.n, index, frozen=config.frozen)
    shared: dict[str, Any] = {"dynamic": config.dynamic, "frozen": config.frozen}
    if config.connection == "hc":
        return HyperConnection(g.hidden_size, g.m, g.n, index, **shared)
    return GeneralizedHyperConnection(g.hidden_size, g.m, g.n, carry_constraint=config.carry_constraint, **shared)


def base_model_class(config: PreTrainedConfig) -> Any:
    """Return the class of the base model inside the causal LM of a transformers config."""
    try:
        causal_class = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise UserError(f"transformers has no causal LM for the config {type(config).__name__}") from None
    found = AutoModel._model_mapping.get(type(config), None)
    classes = found if isinstance(found, tuple) else (found,)
    with torch.device("meta"):
        causal: Any = causal_class(config) if found is None or len(classes) > 1 else None
    return type(getattr(causal, causal.base_model_prefix)) if causal is not None else classes[0]
