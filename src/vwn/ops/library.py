"""The ops as PyTorch knows them: ``vwn::read``, ``vwn::write``, ``vwn::write_read`` and their backwards.

One opaque op each, so that ``torch.compile``, checkpointing and sharding see a single node. Only the inputs are saved
for the backward; the routing is computed again there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

from vwn.ops.backends import Backend, choose, module
from vwn.ops.weights import NormWeights, ReadWeights, RoutingWeights, Weights


def _differentiate(op: CustomOpDef, backward: Callable[..., list[Tensor]], data: int) -> None:
    """Save the inputs of ``op`` and hand them, as they came, to ``backward`` behind the gradients of the results.

    The gradients it returns are of the tensors among them, in their order: of the first ``data``, which are no weights,
    and if weights need them of all.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
        ctx.save_for_backward(*_tensors(inputs))
        ctx.others = [value for value in inputs if not isinstance(value, Tensor)]

    def run_backward(ctx: Any, *grads: Tensor) -> Any:
        tensors, others = iter(ctx.saved_tensors), iter(ctx.others)
        inputs = [next(tensors if is_tensor else others) for is_tensor in ctx.is_tensor]
        needs_weights = any(ctx.needs_input_grad[data:])
        found = iter(backward(*grads, *inputs, needs_weights))
        wanted = [is_tensor and (i < data or needs_weights) for i, is_tensor in enumerate(ctx.is_tensor)]
        return tuple(next(found) if wants else None for wants in wanted)

    op.register_autograd(run_backward, setup_context=setup_context)


def _runner(backend: str, state: Tensor, slots: int) -> Backend:
    """Chosen inside the op, where ``torch.compile`` does not look."""
    return module(choose(backend, state.device, state.dtype, slots))


def _tokens(t: Tensor) -> Tensor:
    """``[..., W]`` to contiguous ``[T, W]``."""
    return t.reshape(-1, t.shape[-1]).contiguous()


def _shaped(t: Tensor, shape: Sequence[int]) -> Tensor:
    """A result in another shape, but no view to autograd, which would forbid to change it in place."""
    return torch.ops.aten._unsafe_view(t, shape)


def _detached(weights: Weights) -> Weights:
    """``torch.matmul`` takes another route, to other bits, for what requires a gradient."""
    return type(weights)(*(t.detach() if isinstance(t, Tensor) else t for t in weights))  # type: ignore[arg-type]


def _norm(weight: Tensor | None, eps: float) -> NormWeights | None:
    return None if weight is None else NormWeights(weight, eps)


def _hidden_size(state: Tensor, static_alpha: Tensor) -> int:
    n, columns = static_alpha.shape
    return state.shape[-1] // n * (columns - n)


@torch.library.custom_op("vwn::read", mutates_args=())
def read(
    state: Tensor,
    static_alpha: Tensor,
    dynamic_alpha: Tensor | None,
    scale_alpha: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    norm: Tensor | None,
    norm_eps: float,
    backend: str,
) -> Tensor:
    """``X = Åᵀ H'``: ``[..., D'] -> [..., D]``."""
    r = _detached(ReadWeights(static_alpha, dynamic_alpha, scale_alpha, norm_weight, eps))
    _, x = _runner(backend, state, r.n).forward(_tokens(state), None, None, r, _norm(norm, norm_eps))
    return _shaped(x, [*state.shape[:-1], _hidden_size(state, static_alpha)])


@torch.library.custom_op("vwn::write", mutates_args=())
def write(
    state: Tensor,
    z: Tensor,
    static_alpha: Tensor,
    static_beta: Tensor,
    dynamic_alpha: Tensor | None,
    dynamic_beta: Tensor | None,
    scale_alpha: Tensor | None,
    scale_beta: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    backend: str,
) -> Tensor:
    """``Bᵀ Z + Âᵀ H'``: ``[..., D'], [..., D] -> [..., D']``."""
    w = _detached(
        RoutingWeights(
            static_alpha, static_beta, dynamic_alpha, dynamic_beta, scale_alpha, scale_beta, norm_weight, eps
        )
    )
    new, _ = _runner(backend, state, w.n).forward(_tokens(state), _tokens(z), w, None, None)
    return _shaped(new, state.shape)


@torch.library.custom_op("vwn::write_read", mutates_args=())
def write_read(
    state: Tensor,
    z: Tensor,
    static_alpha: Tensor,
    static_beta: Tensor,
    dynamic_alpha: Tensor | None,
    dynamic_beta: Tensor | None,
    scale_alpha: Tensor | None,
    scale_beta: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    read_static_alpha: Tensor,
    read_dynamic_alpha: Tensor | None,
    read_scale_alpha: Tensor | None,
    read_norm_weight: Tensor | None,
    read_eps: float,
    norm: Tensor | None,
    norm_eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The write of one sublayer and the read of the next: ``-> [..., D'], [..., D]``."""
    w = _detached(
        RoutingWeights(
            static_alpha, static_beta, dynamic_alpha, dynamic_beta, scale_alpha, scale_beta, norm_weight, eps
        )
    )
    r = _detached(ReadWeights(read_static_alpha, read_dynamic_alpha, read_scale_alpha, read_norm_weight, read_eps))
    new, x = _runner(backend, state, w.n).forward(_tokens(state), _tokens(z), w, r, _norm(norm, norm_eps))
    return _shaped(new, state.shape), _shaped(x, z.shape)


# Their backwards, from the gradients of the results: lists, because what is not needed is left out


@torch.library.custom_op("vwn::read_backward", mutates_args=())
def read_backward(
    grad_x: Tensor,
    state: Tensor,
    static_alpha: Tensor,
    dynamic_alpha: Tensor | None,
    scale_alpha: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    norm: Tensor | None,
    norm_eps: float,
    backend: str,
    needs_weights: bool,
) -> list[Tensor]:
    """Gradients of the state, and if ``needs_weights`` of the weights and the norm's weight, those that are there."""
    r = _detached(ReadWeights(static_alpha, dynamic_alpha, scale_alpha, norm_weight, eps))
    first, *rest = _runner(backend, state, r.n).backward(
        None, _tokens(grad_x), _tokens(state), None, None, r, _norm(norm, norm_eps), needs_weights
    )
    return [_shaped(first, state.shape), *rest]


@torch.library.custom_op("vwn::write_backward", mutates_args=())
def write_backward(
    grad_state: Tensor,
    state: Tensor,
    z: Tensor,
    static_alpha: Tensor,
    static_beta: Tensor,
    dynamic_alpha: Tensor | None,
    dynamic_beta: Tensor | None,
    scale_alpha: Tensor | None,
    scale_beta: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    backend: str,
    needs_weights: bool,
) -> list[Tensor]:
    """Gradients of the state, of ``z``, and if ``needs_weights`` of the weights that are there."""
    w = _detached(
        RoutingWeights(
            static_alpha, static_beta, dynamic_alpha, dynamic_beta, scale_alpha, scale_beta, norm_weight, eps
        )
    )
    first, second, *rest = _runner(backend, state, w.n).backward(
        _tokens(grad_state), None, _tokens(state), _tokens(z), w, None, None, needs_weights
    )
    return [_shaped(first, state.shape), _shaped(second, z.shape), *rest]


@torch.library.custom_op("vwn::write_read_backward", mutates_args=())
def write_read_backward(
    grad_state: Tensor,
    grad_x: Tensor,
    state: Tensor,
    z: Tensor,
    static_alpha: Tensor,
    static_beta: Tensor,
    dynamic_alpha: Tensor | None,
    dynamic_beta: Tensor | None,
    scale_alpha: Tensor | None,
    scale_beta: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    read_static_alpha: Tensor,
    read_dynamic_alpha: Tensor | None,
    read_scale_alpha: Tensor | None,
    read_norm_weight: Tensor | None,
    read_eps: float,
    norm: Tensor | None,
    norm_eps: float,
    backend: str,
    needs_weights: bool,
) -> list[Tensor]:
    """Gradients of the state, of ``z``, and if ``needs_weights`` of both weights and the norm's weight, as above."""
    w = _detached(
        RoutingWeights(
            static_alpha, static_beta, dynamic_alpha, dynamic_beta, scale_alpha, scale_beta, norm_weight, eps
        )
    )
    r = _detached(ReadWeights(read_static_alpha, read_dynamic_alpha, read_scale_alpha, read_norm_weight, read_eps))
    first, second, *rest = _runner(backend, state, w.n).backward(
        _tokens(grad_state), _tokens(grad_x), _tokens(state), _tokens(z), w, r, _norm(norm, norm_eps), needs_weights
    )
    return [_shaped(first, state.shape), _shaped(second, z.shape), *rest]


# Shapes without running. `rest`: weights and options, as in the op


def _like(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    return [t for t in values if isinstance(t, Tensor)]


@read.register_fake
def _(state, static_alpha, *rest):
    return state.new_empty(*state.shape[:-1], _hidden_size(state, static_alpha))


@write.register_fake
def _(state, z, *rest):
    return _like(state)


@write_read.register_fake
def _(state, z, *rest):
    return _like(state), _like(z)


@read_backward.register_fake
def _(grad_x, state, *rest):
    *weights, needs_weights = rest
    return [_like(t) for t in (state, *(_tensors(weights) if needs_weights else ()))]


@write_backward.register_fake
def _(grad_state, state, z, *rest):
    *weights, needs_weights = rest
    return [_like(t) for t in (state, z, *(_tensors(weights) if needs_weights else ()))]


@write_read_backward.register_fake
def _(grad_state, grad_x, state, z, *rest):
    *weights, needs_weights = rest
    return [_like(t) for t in (state, z, *(_tensors(weights) if needs_weights else ()))]


_differentiate(read, read_backward, data=1)
_differentiate(write, write_backward, data=2)
_differentiate(write_read, write_read_backward, data=2)
