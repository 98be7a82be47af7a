"""The modules of a decoder layer take what is read where the layer hands them its residual stream.

An RMSNorm as Llama's can be done by the read itself, in one operation.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from vwn.hf.on_demand import OnDemand, mix_in
from vwn.hf.residual import ResidualStream
from vwn.nn.connection import has_hooks
from vwn.ops import NormWeights
from vwn.ops.reference import rms_norm


def take_streams(layer: nn.Module) -> None:
    """Have the modules that a layer calls take what is read where the layer hands them its stream."""
    for name, module in called_modules(layer).items():
        if not name.startswith("connections."):
            read_for(module)


def called_modules(layer: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a layer by name; where they stand in lists, those in the lists."""
    found: dict[str, nn.Module] = {}
    for name, child in layer.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            found |= {f"{name}.{inner}": module for inner, module in called_modules(child).items()}
        else:
            found[name] = child
    return found


def read_for(module: nn.Module) -> None:
    """Have one module take what is read for a stream: by a hook, or, if it is an RMSNorm that reads can do, itself."""
    if not any(isinstance(hook, HandOver) for hook in module._forward_pre_hooks.values()):
        module.register_forward_pre_hook(HandOver(module), prepend=True, with_kwargs=True)
    if not isinstance(module, ReadingNorm) and "forward" not in vars(module) and _is_plain_rms_norm(module):
        mix_in(ReadingNorm, module)


class HandOver:
    """Forward pre-hook: hand a module what is read in place of a stream.

    An argument called ``residual`` stays the stream, as the module adds to it.
    """

    only_reads = True

    def __init__(self, module: nn.Module) -> None:
        names = list(inspect.signature(module.forward).parameters)
        self._residual = names.index("residual") if "residual" in names else None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Return the arguments, or ``None`` to leave them."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, ResidualStream):
                break
        else:
            return None
        if isinstance(module, ReadingNorm) and not has_hooks(module):
            return None
        new = tuple(v if i == self._residual else _read(v) for i, v in enumerate(args))
        return new, {k: v if k == "residual" else _read(v) for k, v in kwargs.items()}


def _read(value: Any) -> Any:
    return value.read() if isinstance(value, ResidualStream) else value


class ReadingNorm(OnDemand):
    """Mixin for an RMSNorm that the read of a stream can do in the same operation."""

    prefix = "Reading"

    def forward(self, hidden_states: Any) -> Tensor:
        """Return the normalised ``[..., D]``."""
        if isinstance(hidden_states, ResidualStream):
            return hidden_states.read(norm=self)  # type: ignore[arg-type]
        return super().forward(hidden_states)  # type: ignore[misc]


def fusable_norm(norm: Any, dtype: torch.dtype) -> NormWeights | None:
    """Return a norm's weights if a read can do it: one of :class:`ReadingNorm`, in ``dtype``, without other hooks."""
    if not issubclass(type(norm), ReadingNorm) or norm.weight.dtype != dtype or has_hooks(norm):
        return None
    return NormWeights(norm.weight, norm.variance_epsilon)


def _is_plain_rms_norm(norm: Any) -> bool:
    """Return whether a norm gives the bits of Llama's ``weight * round(x / rms(x))``; some have ``1 + weight``."""
    parameters = [name for name, _ in norm.named_parameters()]
    if "RMSNorm" not in type(norm).__name__ or parameters != ["weight"] or not hasattr(norm, "variance_epsilon"):
        return False
    probe, generator = copy.copy(norm), torch.Generator().manual_seed(0)
    probe._parameters, probe._forward_pre_hooks = {}, {}
    x = torch.randn(5, norm.weight.shape[0], generator=generator, device="cpu")
    for dtype in (torch.float32, torch.bfloat16):
        weights = NormWeights(nn.Parameter(x[0].to(dtype), requires_grad=False), norm.variance_epsilon)
        probe.weight = weights.weight
        try:
            if not torch.equal(probe(x.to(dtype)), rms_norm(x.to(dtype), weights)):
                return False
        except (RuntimeError, TypeError, AttributeError):
            return False
    return True
