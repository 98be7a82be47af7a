"""The ops as PyTorch knows them: ``vwn::read``, ``vwn::write``, ``vwn::write_read`` and their backwards.

One opaque op each, so that ``torch.compile``, checkpointing and sharding see a single node. Only the inputs are saved
for the backward; the routing is computed again there.

The arguments of an op, in this order: ``state``; if it writes, ``z`` and the fields of the writing connection's
``RoutingWeights``; if it reads, those of the reading one's and of the norm; ``backend``. Its backward has the gradients
of the results in front of them and ``needs_weights`` behind. It returns a list, because what is not needed is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import CustomOpDef
from torch.utils.flop_counter import register_flop_formula

from vwn.common.errors import UserError
from vwn.ops.backends import choose, module
from vwn.ops.weights import Inputs, NormWeights, RoutingWeights, check


def _parsed(arguments: Iterable[Any], writes: bool, reads: bool) -> tuple[Inputs, str]:
    """The arguments of an op, and the name of its backend."""
    given, count = iter(arguments), len(RoutingWeights._fields)
    state, z = next(given), next(given) if writes else None
    write = RoutingWeights(*islice(given, count)) if writes else None
    read = RoutingWeights(*islice(given, count)) if reads else None
    norm = NormWeights(next(given), next(given)) if reads else None
    return Inputs(state, z, write, read, None if norm is None or norm.weight is None else norm), next(given)


def _schema(writes: bool, reads: bool) -> str:
    def fields(prefix: str) -> list[str]:
        kinds = {"eps": "float", "bias_alpha": "Tensor"}
        return [f"{kinds.get(field, 'Tensor?')} {prefix}{field}" for field in RoutingWeights._fields]

    written = ["Tensor z", *fields("")] if writes else []
    read = [*fields("read_"), "Tensor? norm", "float norm_eps"] if reads else []
    return ", ".join(["Tensor state", *written, *read, "str backend"])


def _run(step: str, inputs: Inputs, backend: str, before: Sequence[Any] = (), after: Sequence[Any] = ()) -> Any:
    """Run ``forward`` or ``backward`` of the backend, chosen here, where ``torch.compile`` does not look."""
    check(inputs, *before)
    state, z, write, read, norm = inputs
    name = choose(backend, state.device, state.dtype, inputs.sizes[1])
    weights = [_ready(of, detached=name == "reference") for of in (write, read, norm)]
    inputs = Inputs(_tokens(state), None if z is None else _tokens(z), *weights)
    return getattr(module(name), step)(*(None if t is None else _tokens(t) for t in before), inputs, *after)


def _tokens(t: Tensor) -> Tensor:
    """``[..., W]`` to contiguous ``[T, W]``."""
    return t.reshape(-1, t.shape[-1]).contiguous()


def _shaped(t: Tensor, shape: Sequence[int]) -> Tensor:
    """A result in another shape, but no view to autograd, which would forbid to change it in place."""
    return torch.ops.aten._unsafe_view(t, shape)


def _ready(weights: Any, detached: bool) -> Any:
    """Make contiguous; detach, as torch.matmul takes another route, to other bits, for what requires a gradient."""
    if weights is None:
        return None
    if not detached and all(t.is_contiguous() for t in weights if isinstance(t, Tensor)):
        return weights
    return type(weights)(*(t.detach().contiguous() if isinstance(t, Tensor) else t for t in weights))


def _like(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _flops(given: Any) -> int:
    """FLOPs of the matrix products (section 3.5), from :class:`Inputs` with shapes in place of tensors.

    Of the read: ``m`` columns of routing, when dynamic, and the read itself, ``2 m D'`` per token each. Of the write:
    ``m + n`` columns of routing, when dynamic, the carry ``2 n D'`` and the write ``2 n D``; an identity: no carry.
    """
    total, size = 0, math.prod(given.state)
    if given.write is not None:
        n, columns = given.write.bias_alpha
        total += 2 * (columns * given.write.dynamic + (n if columns > n else 0)) * size + 2 * n * math.prod(given.z)
    if given.read is not None:
        n, columns = given.read.bias_alpha
        total += 2 * (columns - n if columns > n else columns) * size * (2 if given.read.dynamic else 1)
    return total


def _define(name: str, writes: bool, reads: bool) -> Callable[..., Any]:
    """Define an op, its backward, what both return without running, and their FLOPs; returns what calls it."""
    results, first = writes + reads, 1 + writes  # how many; and of the inputs those that are no weights

    def forward(*arguments: Any) -> Any:
        inputs, backend = _parsed(arguments, writes, reads)
        new, x = _run("forward", inputs, backend)
        out = [_shaped(new, inputs.state.shape)] if writes else []
        out += [_shaped(x, [*inputs.state.shape[:-1], x.shape[-1]])] if reads else []
        return tuple(out) if results > 1 else out[0]

    def fake_forward(*arguments: Any) -> Any:
        inputs, _ = _parsed(arguments, writes, reads)
        check(inputs)
        m, _, d = inputs.sizes
        out = [_like(inputs.state)] if writes else []
        out += [inputs.state.new_empty(*inputs.state.shape[:-1], m * d)] if reads else []
        return tuple(out) if results > 1 else out[0]

    def backward(*arguments: Any) -> list[Tensor]:
        """Gradients of the state, of ``z`` and, if needed, of the weights and the norm's weight that are there."""
        grads, needs_weights = arguments[:results], arguments[-1]
        inputs, backend = _parsed(arguments[results:-1], writes, reads)
        before = (grads[0] if writes else None, grads[-1] if reads else None)
        found = _run("backward", inputs, backend, before, [needs_weights])
        return [*map(_shaped, found[:first], [t.shape for t in arguments[results : results + first]]), *found[first:]]

    def fake_backward(*inputs: Any) -> list[Tensor]:
        tensors = [t for t in inputs[results:-1] if isinstance(t, Tensor)]
        return [_like(t) for t in (tensors if inputs[-1] else tensors[:first])]

    arguments = _schema(writes, reads)
    returned = "Tensor" if results == 1 else "(Tensor, Tensor)"
    op = torch.library.custom_op(f"vwn::{name}", forward, mutates_args=(), schema=f"({arguments}) -> {returned}")
    grads = ", ".join(["Tensor grad_state"] * writes + ["Tensor grad_x"] * reads)
    schema = f"({grads}, {arguments}, bool needs_weights) -> Tensor[]"
    back = torch.library.custom_op(f"vwn::{name}_backward", backward, mutates_args=(), schema=schema)
    op.register_fake(fake_forward)
    back.register_fake(fake_backward)

    packets = torch.ops.vwn

    @register_flop_formula(getattr(packets, name))
    def _of_forward(*inputs: Any, **_: Any) -> int:
        return _flops(_parsed(inputs, writes, reads)[0])

    @register_flop_formula(getattr(packets, f"{name}_backward"))
    def _of_backward(*inputs: Any, **_: Any) -> int:  # without what it computes again
        return 2 * _flops(_parsed(inputs[results:], writes, reads)[0])

    return _differentiated(op, forward, back, backward, first)


_PLAIN = {Tensor, nn.Parameter, type(None), float, bool, str}
_DISPATCH_MODES = (torch._C._are_functorch_transforms_active, torch._C._len_torch_dispatch_stack)
_OBSERVERS = (*_DISPATCH_MODES, torch.autograd._profiler_enabled, torch.jit.is_tracing)


def _is_seen(inputs: Sequence[Any]) -> bool:
    """Return whether something looks on; if not, the code runs without its op, which takes 25 to 100 microseconds."""
    seen = torch.compiler.is_compiling() or any(active() for active in _OBSERVERS) or inputs[0].is_meta
    return seen or not {type(value) for value in inputs} <= _PLAIN


def _differentiated(
    op: CustomOpDef, forward_: Callable[..., Any], back: CustomOpDef, backward_: Callable[..., Any], first: int
) -> Callable[..., Any]:
    """Save the inputs of ``op`` and hand them, as they came, to ``back`` behind the gradients of the results."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in inputs))
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]

    def run_backward(ctx: Any, *grads: Tensor) -> Any:
        tensors, needs_weights = ctx.saved_tensors, any(ctx.needs_input_grad[first:])
        inputs = [other if t is None else t for t, other in zip(tensors, ctx.others, strict=True)]
        given = (*grads, *inputs, needs_weights)
        found = iter((back if torch.is_grad_enabled() or _is_seen(given) else backward_)(*given))
        wanted = [t is not None and (i < first or needs_weights) for i, t in enumerate(tensors)]
        return tuple(next(found) if wants else None for wants in wanted)

    def no_second_derivative(ctx: Any, *grads: Any) -> None:
        raise UserError("the connections have no second derivative")

    op.register_autograd(run_backward, setup_context=setup_context)
    back.register_autograd(no_second_derivative)

    class Differentiated(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            setup_context(ctx, inputs, None)
            return forward_(*inputs)

        backward = staticmethod(run_backward)

    def call(*inputs: Any) -> Any:
        if _is_seen(inputs):
            func = torch._C._functorch
            levels = () if torch.compiler.is_compiling() else func.get_interpreter_stack() or ()
            if any(level.key() == func.TransformType.Grad for level in levels):
                raise UserError("torch.func has no derivative of the connections; use torch.autograd")
            return op(*inputs)
        return Differentiated.apply(*inputs) if torch.is_grad_enabled() else forward_(*inputs)

    return call


read = _define("read", writes=False, reads=True)
write = _define("write", writes=True, reads=False)
write_read = _define("write_read", writes=True, reads=True)
