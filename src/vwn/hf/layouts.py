"""Layouts of decoder layers: their sublayers, each a pre-norm, a core and a post-norm.

That is all that virtual width needs to know of a layer. The residual adds are not part of it: they are what the
connections replace. Layers of transformers need no layout, theirs is found (:mod:`vwn.hf.sublayers`).
"""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vwn.common.errors import UserError
from vwn.hf.on_demand import own_class
from vwn.hf.residual import ResidualStream


@dataclass(frozen=True)
class Sublayer:
    """One sublayer ``T`` of a decoder layer (eq. 10): ``D -> D``, with its own norms, without its residual add.

    Args:
        core: attribute of the decoder layer that holds the attention, FFN or MoE.
        pre_norm: attribute of the norm in front of it, if any.
        post_norm: attribute of the norm behind it, if any.
        takes_context: whether the core gets mask, positions and cache (attention does, an FFN does not).
    """

    core: str
    pre_norm: str | None = None
    post_norm: str | None = None
    takes_context: bool = False

    def __call__(self, layer: Any, stream: ResidualStream, context: dict[str, Any]) -> Tensor:
        """The sublayer's output ``[B, S, D]``, with the modules of ``layer``."""
        x: Any = getattr(layer, self.pre_norm)(stream) if self.pre_norm else stream.read()
        core = getattr(layer, self.core)
        z = core(hidden_states=x, **context) if self.takes_context else core(x)
        z = z[0] if isinstance(z, tuple) else z
        if not isinstance(z, Tensor) or z.shape != x.shape:
            got = list(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise UserError(
                f"sublayer {self.core!r} of {own_class(layer).__name__} should return a tensor {list(x.shape)} as it "
                f"was given, or a tuple that begins with one, got {got}"
            )
        return getattr(layer, self.post_norm)(z) if self.post_norm else z


class Layout(tuple[Sublayer, ...]):
    """The sublayers of a decoder layer, in the order in which they run."""

    @property
    def names(self) -> list[str]:
        """The attributes of the cores."""
        return [sublayer.core for sublayer in self]

    def check(self, layer: nn.Module) -> None:
        """Raise a ``UserError`` if the layer lacks a module that the layout names, or cannot be called as it says."""
        for sublayer in self:
            for name in filter(None, (sublayer.core, sublayer.pre_norm, sublayer.post_norm)):
                if not callable(getattr(layer, name, None)):
                    has = ", ".join(name for name, _ in layer.named_children())
                    raise UserError(
                        f"the layout of {own_class(layer).__name__} names {name!r}, which the layer does not have; "
                        f"it has {has}"
                    )
            takes = (
                inspect.signature(getattr(layer, sublayer.core).forward).parameters if sublayer.takes_context else {}
            )
            if takes and "hidden_states" not in takes:
                raise UserError(
                    f"sublayer {sublayer.core!r} of {own_class(layer).__name__} takes its input as "
                    f"{next(iter(takes))!r}; with takes_context=True it has to be called 'hidden_states'"
                )

    @property
    def norms(self) -> list[str | None]:
        """The attributes of the pre-norms."""
        return [sublayer.pre_norm for sublayer in self]

    def run(self, layer: Any, stream: ResidualStream, *args: Any, **context: Any) -> ResidualStream:
        """Add every sublayer to the stream of a layer; ``context`` is what the backbone hands its layers by name."""
        if args:
            raise UserError(
                f"{own_class(layer).__name__} has a registered layout and takes everything but the state by keyword; "
                "have the backbone hand mask, positions and cache to its layers by name"
            )
        for sublayer in self:
            stream = stream + sublayer(layer, stream, context)
        return stream


_LAYOUTS: dict[str, Layout] = {}
_MEANT: dict[str, type] = {}  # the class that a name was found to mean


def register_layout(decoder_layer: type | str, layout: Iterable[Sublayer]) -> None:
    """Say what the decoder layers of a class consist of, instead of having it found out.

    The layout must reproduce the layer: with ``m = n = 1`` and frozen connections the widened model has to equal the
    backbone to the bit, which is the test to write for a new one. Every process that builds or loads such a model has
    to register it.

    Args:
        decoder_layer: the class, its full name ``"package.module.Class"``, or its bare name if only one class has it.
        layout: its sublayers, in the order in which they run.

    Raises:
        UserError: no sublayers, or something else among them. What a layer lacks shows when a model is built.
    """
    name = _full_name(decoder_layer) if isinstance(decoder_layer, type) else decoder_layer
    found = Layout(layout)
    if not found or not all(isinstance(sublayer, Sublayer) for sublayer in found):
        raise UserError(
            f"the layout of {name} should be one or more Sublayer(...), in the order in which they run, "
            f"got {tuple(found)}"
        )
    _LAYOUTS[name] = found
    _MEANT.pop(name, None)


def layout_of(layer: nn.Module) -> Any:
    """Return the layout found for a widened layer, or the one registered for its class, or ``None``."""
    return layer.layout if hasattr(layer, "layout") else registered_layout(layer)


def registered_layout(layer: nn.Module) -> Layout | None:
    """Return the layout that was registered for a layer's class, if one was.

    Raises:
        UserError: the layer lacks what its layout names, or two classes have the name that was registered.
    """
    kind = type(layer)
    found = _LAYOUTS.get(_full_name(kind))
    if found is None and (found := _LAYOUTS.get(kind.__name__)) is not None:
        meant = _MEANT.setdefault(kind.__name__, kind)
        if meant is not kind:
            raise UserError(
                f"a layout is registered for {kind.__name__}, which is {_full_name(meant)} and {_full_name(kind)}; "
                "register it for the class instead of its bare name"
            )
    if found is not None:
        found.check(layer)
    return found


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
