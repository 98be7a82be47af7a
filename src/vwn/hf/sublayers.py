"""Sublayers of a backbone's layers, found by one forward pass without numbers.

A copy of the backbone on the meta device runs once. Its layers add to a :class:`~vwn.hf.residual.ResidualStream`,
which counts the sums: each is one sublayer.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from vwn.common.errors import UserError
from vwn.hf.anatomy import check_order
from vwn.hf.layouts import FoundLayout, Sublayer
from vwn.hf.on_demand import own_class
from vwn.hf.reading import called_modules
from vwn.hf.residual import LayerPass


class ProbePass(LayerPass):
    """A pass with a plain residual stream ``[B, S, D]``, which notes what the layer does."""

    def __init__(self, layer: nn.Module, state: Tensor) -> None:
        super().__init__(layer, state.shape, None)
        self._calls: list[str] = []  # modules that are no norms, since the last sum
        self._modules = called_modules(layer)
        self._names: list[str] = []
        self._reads: list[tuple[int, str | None]] = []  # of which sublayer, by which norm
        self._hooks = [
            module.register_forward_pre_hook(lambda *_, name=name: self._calls.append(name), prepend=True)
            for name, module in self._modules.items()
            if "norm" not in type(module).__name__.lower()
        ]

    def read(self, i: int, state: Tensor) -> Tensor:
        self._reads.append((i, None))
        return state.clone()

    def read_normed(self, i: int, state: Tensor, norm: nn.Module) -> Tensor:
        self._reads.append((i, next((name for name, module in self._modules.items() if module is norm), None)))
        return norm.forward(state)

    def write(self, i: int, state: Tensor, z: Tensor) -> Tensor:
        if z.shape != state.shape:
            self.refuse(f"it adds a tensor {list(z.shape)} to its residual stream {list(state.shape)}")
        return state + z.to(state.dtype)

    def begin_sum(self) -> None:
        self._names.append(next(iter(self._calls), f"sublayer_{len(self._names)}").partition(".")[0])
        self._calls.clear()

    def found(self) -> FoundLayout:
        """Return the layer's sublayers; refuse a stream that is read behind the last sum."""
        for hook in self._hooks:
            hook.remove()
        if any(i == self.version for i, _ in self._reads):
            self.refuse("it uses its residual stream behind the last sum with it")
        norms = [[norm for i, norm in self._reads if i == k] for k in range(self.version)]
        single = [reads[0] if len(reads) == 1 else None for reads in norms]
        return FoundLayout(Sublayer(*found) for found in zip(self._names, single, strict=False))


def meta_copy(model: Any) -> Any:
    """Copy a model without memory or hooks, in bfloat16, which every operation has on the meta device."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        dtype = torch.bfloat16 if tensor.is_floating_point() else tensor.dtype
        meta = torch.empty_like(tensor, device="meta", dtype=dtype, requires_grad=False)
        memo[id(tensor)] = nn.Parameter(meta, requires_grad=False) if isinstance(tensor, nn.Parameter) else meta
    found = copy.deepcopy(model, memo).eval()
    for module in found.modules():
        vars(module).pop("forward", None)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            hooks.clear()
        if isinstance(kinds := getattr(module, "rope_type", None), dict):  # others look at the positions
            module.rope_type = dict.fromkeys(kinds, "default")
        elif kinds is not None:
            module.rope_type = "default"
    attention = "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"
    for config in {id(c): c for c in (getattr(m, "config", None) for m in found.modules()) if c is not None}.values():
        if getattr(config, "_experts_implementation", None) is not None:
            config._experts_implementation = "grouped_mm"  # others look at numbers
        if getattr(config, "_attn_implementation", None) not in (None, "eager", "sdpa"):
            config._attn_implementation = attention
    return found


def run_probe(model: Any, hidden_size: int) -> None:
    """Run a meta copy whose layers are widened, so that each of them notes what it consists of.

    Raises:
        UserError: a layer that does more to its residual stream than add to it, or that cannot run without numbers;
            layers that do not run in turn, with one norm behind them.
    """
    state, ran = torch.empty(2, 7, hidden_size, device="meta", dtype=torch.bfloat16), []
    for module in (*model.anatomy.stack(model).children(), *model.anatomy.layers(model)):
        module.register_forward_pre_hook(lambda module, _: ran.append(module))
    try:
        with torch.no_grad():
            model.run(inputs_embeds=state, use_cache=True)
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"the layers of {own_class(model).__name__} cannot be tried without numbers ({reason}); describe "
            "their sublayers with vwn.hf.register_layout, see docs/layouts.md"
        ) from error
    check_order(model, ran)
