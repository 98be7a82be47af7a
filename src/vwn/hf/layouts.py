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
        return getattr(layer, self.post_norm)(z) if self.post_norm else z


class Layout(tuple[Sublayer, ...]):
    """The sublayers of a decoder layer, in the order in which they run."""

    @property
    def names(self) -> list[str]:
        """The attributes of the cores."""
        return [sublayer.core for sublayer in self]

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
            raise TypeError(f"{type(layer).__name__} takes everything but the state by keyword")
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
    backbone to the bit, which is the test to write for a new one.
    """
    _LAYOUTS[decoder_layer] = Layout(layout)


def layout_of(layer: nn.Module) -> Layout | Structure:
    """What a decoder layer consists of: as registered, or else found in the source of its ``forward``.

    Raises:
        UserError: it does not just add to its residual stream.
    """
    registered = _LAYOUTS.get(type(layer).__name__)
    return find_structure(layer) if registered is None else registered


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
