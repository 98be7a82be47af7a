"""Layouts of decoder layers: their sublayers, each a pre-norm, a core and a post-norm.

That is all that virtual width needs to know of a layer. The residual adds are not part of it: they are what the
connections replace. Layers of transformers need no layout, theirs is found (:mod:`vwn.hf.sublayers`).
"""

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
        """Return the sublayer's output ``[B, S, D]``, with the modules of ``layer``."""
        x: Any = getattr(layer, self.pre_norm)(stream) if self.pre_norm else stream.read()
        core = getattr(layer, self.core)
        z = core(hidden_states=x, **context) if self.takes_context else core(x)
        z = z[0] if isinstance(z, tuple) else z
        return getattr(layer, self.post_norm)(z) if self.post_norm else z


class Layout(tuple[Sublayer, ...]):
    """The sublayers of a decoder layer, in the order in which they run."""

    @property
    def names(self) -> tuple[str, ...]:
        """The attributes of the cores."""
        return tuple(sublayer.core for sublayer in self)

    @property
    def norms(self) -> tuple[str | None, ...]:
        """The attributes of the pre-norms."""
        return tuple(sublayer.pre_norm for sublayer in self)

    def run(self, layer: Any, stream: ResidualStream, **context: Any) -> ResidualStream:
        """Add every sublayer to the stream of a layer; ``context`` is what the backbone hands its layers by name."""
        for sublayer in self:
            stream = stream + sublayer(layer, stream, context)
        return stream


class FoundLayout(Layout):
    """The layout of a layer that runs its own ``forward``: which modules it calls, in which order.

    A ``core`` is the first module of a sublayer that is no norm, a ``pre_norm`` an RMSNorm that is all that its read
    goes through.
    """


_LAYOUTS: dict[type, Layout] = {}


def register_layout(decoder_layer: type, layout: Iterable[Sublayer]) -> None:
    """Say what the decoder layers of a class consist of, instead of having it found out.

    The layout must reproduce the layer: with ``m = n = 1`` and frozen connections the widened model has to equal the
    backbone to the bit, which is the test to write for a new one. Every process that builds or loads such a model has
    to register it.

    Args:
        decoder_layer: the class.
        layout: its sublayers, in the order in which they run.

    Raises:
        UserError: no class, no sublayers, or something else among them. What a layer lacks shows when a model is built.
    """
    found = Layout(layout)
    if not isinstance(decoder_layer, type) or not found or not all(isinstance(s, Sublayer) for s in found):
        raise UserError(
            "register_layout takes the class of a decoder layer and one or more Sublayer(...), in the order in which "
            f"they run; got {decoder_layer!r} and {tuple(found)}"
        )
    _LAYOUTS[decoder_layer] = found


def layout_of(layer: nn.Module) -> Any:
    """Return the layout found for a widened layer, or the one registered for its class, or ``None``."""
    return layer.layout if hasattr(layer, "layout") else registered_layout(layer)


def registered_layout(layer: nn.Module) -> Layout | None:
    """Return the layout that was registered for a layer's class, if one was.

    Raises:
        UserError: the layer lacks a module that its layout names.
    """
    found = _LAYOUTS.get(type(layer))
    for name in (name for s in found or () for name in (s.core, s.pre_norm, s.post_norm) if name):
        if not callable(getattr(layer, name, None)):
            has = ", ".join(name for name, _ in layer.named_children())
            raise UserError(
                f"the layout of {own_class(layer).__name__} names {name!r}, which the layer does not have; it has {has}"
            )
    return found
