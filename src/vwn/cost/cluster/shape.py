"""Shape of a model, for plans: parameters by place, and widths of saved activations."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from vwn.common.errors import UserError
from vwn.cost.model import cost_of_model, count, expert_shares
from vwn.nn.geometry import Geometry
from vwn.nn.ngram import NgramEmbedding

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_UNKNOWN = (
    "training of {} cannot be planned: its layers are not laid out as those of Llama, Qwen3, Mixtral or Qwen3-MoE. "
    "Without --cluster its cost is shown"
)


@dataclass(frozen=True)
class Weights:
    """Numbers of parameters of some modules."""

    split: int = 0
    """Matrices and tables, which tensor parallelism divides."""
    whole: int = 0
    """Norms, routers, connections and linears at the wide ends, which every tensor-parallel rank has."""

    def on_rank(self, tp: int) -> float:
        """Return the number on one tensor-parallel rank."""
        return self.split / tp + self.whole


@dataclass(frozen=True)
class LayerShape:
    """Parameters of a layer, and the widths per token of the activations it saves for the backward."""

    weights: Weights
    attention: int
    """``q``, ``k``, ``v`` and the heads' output."""
    hidden: int
    """Outputs of the first matrices of the FFN, ``2 F`` if gated, or of all experts that a token meets."""
    routed: int
    """Copies of tokens sent to experts, and what these return."""


@dataclass(frozen=True)
class ModelShape:
    """A causal language model, for plans."""

    parameters: int
    """Number of parameters, tied ones once."""
    window: int
    """Tokens of a window."""
    widened: bool
    """True if it has connections; if not, a sublayer's output is not kept."""
    geometry: Geometry
    """``(D, m, n)``; ``(D, 1, 1)`` of a plain model, whose state is ``D`` wide."""
    layers: tuple[LayerShape, ...]
    mtp: tuple[LayerShape, ...]
    """The MTP modules; their weights include fuse and reduce."""
    table: Weights
    """The embedding."""
    tail: Weights
    """Reduce, final norm and unembedding."""
    vocab_size: int
    heads: tuple[int, int]
    """Attention's query heads and key-value heads."""

    @property
    def ratio(self) -> float:
        """Virtual width factor ``r``."""
        return self.geometry.ratio

    def on_rank(self, tp: int) -> float:
        """Return the number of parameters on one tensor-parallel rank."""
        return sum(w.on_rank(tp) for w in [self.table, *(x.weights for x in (*self.layers, *self.mtp)), self.tail])


def model_shape(config: PreTrainedConfig, window: int) -> ModelShape:
    """Describe the model of a config, built on the meta device.

    Args:
        config: of a causal language model whose attention has ``q_proj`` and ``o_proj``, such as Llama's or Mixtral's.
        window: tokens of a window.

    Raises:
        UserError: another kind of model, or as :func:`vwn.cost.model_cost`.
    """
    model, counted = count(config, window)
    cost = cost_of_model(model, counted)
    base, text = model.base_model, model.config.get_text_config()
    if not all(hasattr(base, name) for name in ("layers", "embed_tokens")):
        raise UserError(_UNKNOWN.format(type(model).__name__))
    experts = expert_shares(model, counted)
    predictors = list(getattr(base, "mtp", ()))
    inner = {id(p) for part in (base.embed_tokens, base.layers, *predictors) for p in part.parameters()}
    tail = [module for module in model.modules() if any(id(p) not in inner for p in module.parameters(recurse=False))]
    geometry = cost.connection.geometry if cost.connection else Geometry(text.hidden_size, 1, 1)

    return ModelShape(
        parameters=cost.parameters,
        window=window,
        widened=cost.connection is not None,
        geometry=geometry,
        layers=tuple(_layer(model, layer, experts) for layer in base.layers),
        mtp=tuple(_layer(model, predictor, experts) for predictor in predictors),
        table=_weights([base.embed_tokens], experts),
        tail=_weights(tail, experts, inner),
        vocab_size=text.vocab_size,
        heads=(text.num_attention_heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads),
    )


def _weights(modules: Iterable[nn.Module], experts: Container[nn.Module], without: Iterable[int] = ()) -> Weights:
    """Count the parameters of modules and of all that is inside them, each once."""
    seen, split, whole = set(without), 0, 0
    for module in (inner for outer in modules for inner in outer.modules()):
        divided = isinstance(module, nn.Linear | nn.Embedding | NgramEmbedding) or module in experts
        for p in module.parameters(recurse=False):
            if id(p) not in seen:
                seen.add(id(p))
                if divided and p.ndim > 1:
                    split += p.numel()
                else:
                    whole += p.numel()
    return Weights(split, whole)


def _layer(model: Any, layer: nn.Module, experts: Mapping[nn.Module, float]) -> LayerShape:
    width = model.config.get_text_config().hidden_size
    attention = hidden = routed = 0
    inside: set[nn.Module] = set()
    for module in layer.modules():
        q, o = getattr(module, "q_proj", None), getattr(module, "o_proj", None)
        if isinstance(q, nn.Linear) and isinstance(o, nn.Linear):
            inside.update(module.modules())
            attention += sum(x.out_features for n in "qkv" if (x := getattr(module, f"{n}_proj", None)) is not None)
            attention += o.in_features
        elif module in experts:
            stacks = [p for p in module.parameters(recurse=False) if p.ndim == 3]
            hidden += round(experts[module] * 2 * sum(p.numel() for p in stacks) / (3 * width))  # gate, up, down alike
            routed += 2 * round(experts[module] * stacks[0].shape[0]) * width
        elif isinstance(module, nn.Linear) and module not in inside and module.in_features == width:
            hidden += module.out_features
    if not attention:
        raise UserError(_UNKNOWN.format(type(model).__name__))
    return LayerShape(_weights([layer], experts), attention, hidden, routed)
