"""What a decoder layer consists of: its sublayers, each a pre-norm, a core and a post-norm.

That is all that virtual width needs to know of a layer. The residual adds are not part of it: they are what the
connections replace. Layers of transformers need no layout, theirs is found (:mod:`vwn.hf.structure`).
"""

import ast
import inspect
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from vwn.common.errors import UserError
from vwn.hf.structure import Structure, find_structure
from vwn.ops import NormWeights


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

    def __call__(self, layer: Any, x: Tensor, context: dict[str, Any]) -> Tensor:
        """``[B, S, D] -> [B, S, D]`` behind the pre-norm, with the modules of ``layer``."""
        core = getattr(layer, self.core)
        z = core(hidden_states=x, **context) if self.takes_context else core(x)
        z = z[0] if isinstance(z, tuple) else z
        if not isinstance(z, Tensor) or z.shape != x.shape:
            got = list(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise UserError(
                f"sublayer {self.core!r} of {_class_name(layer)} should return a tensor {list(x.shape)} as it was "
                f"given, or a tuple that begins with one, got {got}"
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
                        f"the layout of {_class_name(layer)} names {name!r}, which the layer does not have; "
                        f"it has {has}"
                    )
            takes = (
                inspect.signature(getattr(layer, sublayer.core).forward).parameters if sublayer.takes_context else {}
            )
            if takes and "hidden_states" not in takes:
                raise UserError(
                    f"sublayer {sublayer.core!r} of {_class_name(layer)} takes its input as {next(iter(takes))!r}; "
                    "with takes_context=True it has to be called 'hidden_states'"
                )

    def norm(self, layer: Any, i: int) -> Any:
        """The pre-norm of sublayer ``i``, if it has one."""
        name = self[i].pre_norm
        return getattr(layer, name) if name else None

    def run(self, layer: Any, seam: Any, hidden_states: Tensor, *args: Any, **context: Any) -> Tensor:
        """The layer on an over-width state ``[B, S, D']``: for each sublayer read, run, write (eq. 10).

        Args:
            layer: the decoder layer.
            seam: has ``read(i, state)`` and ``write(i, state, z)``.
            hidden_states: the state.
            args, context: mask, positions, cache and whatever else the backbone hands its layers.
        """
        if args:
            raise UserError(
                f"{_class_name(layer)} has a registered layout and takes everything but the state by keyword; have the "
                "backbone hand mask, positions and cache to its layers by name"
            )
        state = hidden_states
        for i, sublayer in enumerate(self):
            state = seam.write(i, state, sublayer(layer, seam.read(i, state), context))
        return state


PRE_NORM = Layout(
    (
        Sublayer("self_attn", pre_norm="input_layernorm", takes_context=True),
        Sublayer("mlp", pre_norm="post_attention_layernorm"),
    )
)

_LAYOUTS: dict[str, Layout] = {}


def register_layout(decoder_layer: str, layout: Iterable[Sublayer]) -> None:
    """Say what the decoder layers of class name ``decoder_layer`` consist of, instead of having it found out.

    The layout must reproduce the layer: with ``m = n = 1`` and frozen connections the widened model has to equal the
    backbone to the bit, which is the test to write for a new one. Every process that builds or loads such a model has
    to register it.

    Raises:
        UserError: no sublayers, or something else among them. What a layer lacks shows when a model is built.
    """
    found = Layout(layout)
    if not found or not all(isinstance(sublayer, Sublayer) for sublayer in found):
        raise UserError(
            f"the layout of {decoder_layer} should be one or more Sublayer(...), in the order in which they run, "
            f"got {tuple(found)}"
        )
    _LAYOUTS[decoder_layer] = found


def layout_of(layer: nn.Module) -> Layout | Structure:
    """What a decoder layer consists of: as registered, or else found in the source of its ``forward``.

    Raises:
        UserError: it does not just add to its residual stream, or lacks what its layout names.
    """
    registered = _LAYOUTS.get(type(layer).__name__)
    if registered is None:
        return find_structure(layer)
    registered.check(layer)
    return registered


def _class_name(layer: Any) -> str:
    """Of the layer's own class, widened or not."""
    kind = type(layer)
    return kind.__mro__[2].__name__ if kind.__name__.startswith("VirtualWidth") else kind.__name__


def fusable_norm(norm: Any, dtype: torch.dtype) -> NormWeights | None:
    """The weights of a norm if it is the RMSNorm that the ops know, in ``dtype`` and without hooks."""
    kind: Any = type(norm)
    if norm is None or has_hooks(norm) or not _is_plain_rms_norm(kind):
        return None
    return NormWeights(norm.weight, norm.variance_epsilon) if norm.weight.dtype == dtype else None


def has_hooks(module: nn.Module) -> bool:
    """Whether something is to happen when the module runs, so that it must be run."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


@cache
def _is_plain_rms_norm(norm_class: Any) -> bool:
    """Whether a norm computes Llama's ``weight * round(x / rms(x))``; others have, say, a gain of ``1 + weight``."""
    if norm_class is LlamaRMSNorm or "RMSNorm" not in norm_class.__name__:
        return norm_class is LlamaRMSNorm
    try:
        return _body(norm_class) == _body(LlamaRMSNorm)
    except (OSError, TypeError, SyntaxError):
        return False


def _body(norm_class: type) -> list[str]:
    forward: Any = norm_class.forward  # type: ignore[attr-defined]
    function: Any = ast.parse(textwrap.dedent(inspect.getsource(forward))).body[0]
    docstring = ast.get_docstring(function) is not None
    return [ast.unparse(statement) for statement in function.body[docstring:]]
