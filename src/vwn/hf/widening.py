"""Backbones of transformers with virtual-width layers: the same modules and names, the residual adds replaced.

The layer loop of a transformers decoder treats the hidden state as opaque, so it runs unchanged on the over-width
state once its layers read from it and write to it. Layer and backbone get a subclass of their own class, so that
whatever transformers does by class (recording outputs, checkpointing, parallel plans) still applies.
"""

import inspect
from functools import cache
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
from vwn.hf.layouts import fusable_norm, layout_of
from vwn.hf.stream import Reader, Stream, can_read_ahead
from vwn.nn.connection import Connection
from vwn.nn.embedding import repeat_over_slots
from vwn.nn.generalized import GeneralizedHyperConnection
from vwn.nn.geometry import Geometry
from vwn.nn.initialisation import StatesItsInitialValues
from vwn.nn.relatives import HyperConnection, ManifoldHyperConnection

# transformers' names for a cache: from 5.24 on, before that, and before that of Mamba's kind
CACHE_NAMES = ("cache", "past_key_values", "cache_params")
_OPTIONAL = ("position_ids", *CACHE_NAMES, "output_hidden_states", "output_attentions", "stream")


class VirtualWidthLayer:
    """Mixin for a decoder layer: for each sublayer read, run, write (eq. 10)."""

    connections: Any  # a ModuleList of connections, one for each sublayer
    layout: Any  # a Layout or a Structure

    def forward(self, *args: Any, stream: Stream | None = None, **context: Any) -> Any:
        """What the layer returns, on a state ``[B, S, D']``; the other arguments are what the backbone hands it."""
        state: Any = next(value for value in (*args, *context.values()) if isinstance(value, Tensor))
        return self.layout.run(self, Seam(self, Stream() if stream is None else stream, state.dtype), *args, **context)

    def readers(self, dtype: torch.dtype) -> list[Reader]:
        """For each sublayer its connection, and its norm where the read takes that on."""
        return [
            Reader(c, fusable_norm(self.layout.norm(self, i), dtype) if c.fuses_norm(dtype) else None)
            for i, c in enumerate(self.connections)
        ]

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _new, (widened_layer_class, type(self).__mro__[2]), self.__dict__


class Seam:
    """Where one layer meets the stream in one forward pass.

    Args:
        layer: a virtual-width layer.
        stream: what accompanies the state.
        dtype: of the state.
    """

    def __init__(self, layer: Any, stream: Stream, dtype: torch.dtype) -> None:
        self._layer, self._stream, self._readers = layer, stream, layer.readers(dtype)

    def read(self, i: int, state: Tensor) -> Tensor:
        """The input of sublayer ``i``, behind the norm that the layout has for it: ``[B, S, D'] -> [B, S, D]``."""
        reader = self._readers[i]
        x = self._stream.read(state, reader)
        norm = self._layer.layout.norm(self._layer, i)
        return x if norm is None or reader.norm is not None else norm(x)

    def write(self, i: int, state: Tensor, z: Tensor) -> Tensor:
        """The state after the output ``z`` ``[B, S, D]`` of sublayer ``i``, reading for the next one meanwhile."""
        if not isinstance(z, Tensor):
            name = type(self._layer).__mro__[2].__name__
            raise UserError(
                f"{name} adds {z!r}, no tensor, to its residual stream in sublayer {i}; "
                "make it a tensor of the stream's shape"
            )
        ahead = self._readers[i + 1] if i + 1 < len(self._readers) else self._next_layers_reader(state.dtype)
        return self._stream.write(state, z.to(state.dtype), self._readers[i].connection, ahead)

    def scale(self, state: Tensor, factor: Any) -> Tensor:
        """The state times a number, or times ``D`` of them in every slot."""
        geometry = self._readers[0].connection.geometry
        if isinstance(factor, Tensor) and factor.ndim and factor.shape[-1] == geometry.hidden_size > 1:
            factor = repeat_over_slots(factor, geometry)
        return state * factor

    def zeros(self, x: Tensor) -> Tensor:
        """Stands in for the stream in a function that would add it."""
        return torch.zeros_like(x)

    def _next_layers_reader(self, dtype: torch.dtype) -> Reader | None:
        following = self._stream.after(self._layer)
        if isinstance(following, VirtualWidthLayer) and can_read_ahead(self._layer, following):
            return following.readers(dtype)[0]  # not for a wrapper, which may run its layer twice
        return None


class VirtualWidthBackbone:
    """Mixin for a backbone: initialises our modules among its own, and takes the arguments that it knows."""

    anatomy: Anatomy
    arguments: frozenset[str] | None  # that its forward takes; None if it takes any
    cache_name: str  # what its forward calls a cache

    def run(self, cache: Any = None, **arguments: Any) -> Any:
        """Its forward, without what it has no argument for and could not use, such as positions beside ALiBi."""
        arguments[self.cache_name] = cache
        if self.arguments is not None:
            arguments = {k: v for k, v in arguments.items() if k in self.arguments or k not in _OPTIONAL}
        return self(**arguments)  # type: ignore[operator]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        init_virtual_width(module)

    # transformers finds out by reading the source of a class's module; for a class made here that is the base's.
    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return cls.__mro__[2]._can_set_attn_implementation()  # type: ignore[attr-defined]

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return cls.__mro__[2]._can_set_experts_implementation()  # type: ignore[attr-defined]

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _new, (widened_backbone_class, type(self).__mro__[2]), self.__dict__


class RepeatedOverSlots:
    """Mixin for a module whose output of width ``D`` is added to the embedding, such as positions."""

    geometry: Geometry

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """``[..., D']``: the module's output, once in every slot (slot ``j`` = segment ``j mod m``)."""
        return repeat_over_slots(super().forward(*args, **kwargs), self.geometry)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _new, (repeated_class, type(self).__mro__[2]), self.__dict__


class NoPositions(nn.Module):
    """Adds nothing where a backbone adds positions."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """A zero, whatever it is asked for."""
        like = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return torch.zeros((), device=like.device)


class NormedInBlocks:
    """Mixin for a norm of width ``D`` over the embedding: it normalises every ``D`` numbers, the last partly again."""

    geometry: Geometry

    def forward(self, state: Tensor) -> Tensor:
        """``[..., D'] -> [..., D']``."""
        g = self.geometry
        blocks = list(state.split(g.hidden_size, dim=-1))
        missing = g.hidden_size - blocks[-1].shape[-1]
        blocks[-1] = torch.cat([blocks[-1], blocks[0][..., g.hidden_size - missing :]], dim=-1)
        normed = [super(NormedInBlocks, self).forward(block) for block in blocks]  # type: ignore[misc]
        return torch.cat(normed, dim=-1)[..., : g.over_width]

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _new, (normed_class, type(self).__mro__[2]), self.__dict__


@cache
def widened_layer_class(layer_class: Any) -> Any:
    """Subclass of a decoder layer class that runs through its connections."""
    return type(f"VirtualWidth{layer_class.__name__}", (VirtualWidthLayer, layer_class), {})


@cache
def widened_backbone_class(backbone_class: Any) -> Any:
    """Subclass of a backbone class that knows how our modules start."""
    return type(f"VirtualWidth{backbone_class.__name__}", (VirtualWidthBackbone, backbone_class), {})


@cache
def repeated_class(module_class: Any) -> Any:
    """Subclass of a module class that fills all slots."""
    return type(f"Repeated{module_class.__name__}", (RepeatedOverSlots, module_class), {})


@cache
def normed_class(module_class: Any) -> Any:
    """Subclass of a norm's class that normalises block by block."""
    return type(f"InBlocks{module_class.__name__}", (NormedInBlocks, module_class), {})


def _new(make_class: Any, base: type) -> Any:
    """Unpickle an instance of a class that is made on demand."""
    cls = make_class(base)
    return cls.__new__(cls)


def init_virtual_width(module: nn.Module) -> None:
    """Initialise one module of ours, leaving alone what was loaded."""
    if isinstance(module, StatesItsInitialValues):
        for name, value in module.initial_values().items():
            init.copy_(getattr(module, name), value)


def build_backbone(config: VirtualWidthConfig, backbone: PreTrainedConfig) -> tuple[Any, nn.Module, nn.Embedding]:
    """A backbone that runs on over-width states, newly made.

    Args:
        config: the virtual width.
        backbone: config of the backbone to build; ``config.backbone``, or its one-layer version for MTP.

    Returns:
        see :func:`widen_backbone`.

    Raises:
        UserError: a backbone that cannot be widened, with the reason.
    """
    refuse_family(backbone)
    return widen_backbone(config, widened_backbone_class(base_model_class(backbone))(backbone))


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
    refuse_family(model.config)
    model.anatomy, (model.arguments, model.cache_name) = find_anatomy(model), _arguments(model)
    if not isinstance(model, VirtualWidthBackbone):
        kind: Any = type(model)
        model.__class__ = widened_backbone_class(kind)
        with torch.device("meta"):  # transformers notes what a class can record when one of it is made
            type(model)(model.config)
    norm, table = model.anatomy.take_norm(model), model.anatomy.take_embedding(model)
    _widen_front(config, model)
    first = 0
    for layer in model.anatomy.layers(model):
        layout = layout_of(layer)  # one that is not a sum is refused as a plain baseline too
        if config.connection != "residual":
            _widen_layer(layer, layout, config, first)
        first += len(layout.names)
    model._no_split_modules = {type(layer).__name__ for layer in model.anatomy.layers(model)}
    return model, norm, table


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


def build_mtp_layer(config: VirtualWidthConfig, index: int) -> tuple[Any, nn.Module]:
    """A backbone of one layer, of the kind of the backbone's last, for MTP module number ``index``; and its norm."""
    family, kind = family_of(config.backbone), config.backbone.model_type
    reason = family.no_mtp
    try:
        if reason is None:
            model, norm, _ = build_backbone(config, config.mtp_backbone())
            depth = config.backbone.num_hidden_layers
            old = model.anatomy.layers(model)[0]
            layer_class = type(old).__mro__[2] if config.connection != "residual" else type(old)
            layer = layer_class(config.backbone, depth - 1)
    except (
        ValueError,
        TypeError,
        AttributeError,
        StrictDataclassError,
    ) as error:  # types count layers their way
        reason = str(error).strip().splitlines()[-1].strip()
    if reason is not None:
        raise UserError(f"a backbone of type {kind} cannot have MTP modules, set num_mtp_modules to 0: {reason}")
    stack = model.anatomy.stack(model)
    for name in family.positions:  # the state has them already
        setattr(stack, name, NoPositions())
    if family.embedding_norm:
        setattr(stack, family.embedding_norm, nn.Identity())
    for module in layer.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = 0  # its cache, should it get one, has one layer
    layout = layout_of(layer)
    if config.connection != "residual":
        _widen_layer(layer, layout, config, (depth + index) * len(layout.names))
    model.anatomy.layers(model)[0] = layer
    return model, norm


def _widen_layer(layer: Any, layout: Any, config: VirtualWidthConfig, first: int) -> None:
    layer.layout = layout
    layer.connections = nn.ModuleList(_connection(config, first + i) for i in range(len(layout.names)))
    kind: Any = type(layer)
    layer.__class__ = widened_layer_class(kind)


def _widen_front(config: VirtualWidthConfig, model: Any) -> None:
    """Fit what stands between embedding and layers to the over-width state."""
    if config.geometry.n == config.geometry.m:
        return
    family, stack = family_of(model.config), model.anatomy.stack(model)
    for names, make_class in ((family.positions, repeated_class), ((family.embedding_norm,), normed_class)):
        for name in filter(None, names):
            module: Any = getattr(stack, name)
            kind: Any = type(module)
            module.geometry, module.__class__ = config.geometry, make_class(kind)


def _arguments(model: nn.Module) -> tuple[frozenset[str] | None, str]:
    """What a backbone's ``forward`` takes (None if anything), and its name for a cache."""
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    cache_name = next((name for name in CACHE_NAMES if name in parameters), "past_key_values")
    return None if takes_any else frozenset(parameters), cache_name


def _connection(config: VirtualWidthConfig, index: int) -> Connection:
    """The connection of sublayer number ``index`` of the model."""
    g = config.geometry
    if config.connection == "mhc":
        return ManifoldHyperConnection(g.hidden_size, g.n, index, frozen=config.frozen)
    shared: dict[str, Any] = {"dynamic": config.dynamic, "frozen": config.frozen}
    if config.connection == "hc":
        return HyperConnection(g.hidden_size, g.m, g.n, index, **shared)
    return GeneralizedHyperConnection(g.hidden_size, g.m, g.n, carry_constraint=config.carry_constraint, **shared)


def base_model_class(config: PreTrainedConfig) -> Any:
    """The class of the base model inside the causal LM of a transformers config.

    Raises:
        UserError: transformers has no causal LM for it.
    """
    try:
        causal_class = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise UserError(f"transformers has no causal LM for the config {type(config).__name__}") from None
    found = AutoModel._model_mapping.get(type(config), None)
    classes = found if isinstance(found, tuple) else (found,)
    with torch.device("meta"):
        causal: Any = causal_class(config) if found is None or len(classes) > 1 else None
    return type(getattr(causal, causal.base_model_prefix)) if causal is not None else classes[0]
