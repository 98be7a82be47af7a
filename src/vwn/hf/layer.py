"""A decoder layer that runs on an over-width state: its own ``forward``, with connections at its sublayers (eq. 10).

:class:`VirtualWidthLayer` hands the layer's own ``forward`` a :class:`~vwn.hf.residual.ResidualStream`. That calls
:class:`ConnectedPass`, which reads from and writes to the state through the :class:`~vwn.nn.connection.Connection` of
each sublayer.
"""

import inspect
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from vwn.hf.layouts import FoundLayout, Layout
from vwn.hf.lookahead import Lookahead, Reader, can_read_ahead
from vwn.hf.on_demand import OnDemand, mix_in
from vwn.hf.reading import called_modules, fusable_norm, read_for, take_streams
from vwn.hf.residual import LayerPass
from vwn.hf.sublayers import ProbePass
from vwn.nn.embedding import repeat_over_slots


class VirtualWidthLayer(OnDemand):
    """Mixin for a decoder layer: its own ``forward`` on an over-width state, through its connections (eq. 10)."""

    prefix = "VirtualWidth"

    connections: Any  # one for each sublayer
    layout: Any  # None until it is found
    state_name: str  # of the argument that is the state

    def forward(self, *args: Any, lookahead: Lookahead | None = None, **context: Any) -> Any:
        """Run the layer on a state ``[B, S, D']``; the other arguments are the backbone's, and so is the output."""
        state = args[0] if args else context.pop(self.state_name)
        if self.layout is None:
            probe = ProbePass(self, state)  # type: ignore[arg-type]
            out = probe.finish(super().forward(probe.stream(state), *args[1:], **context))  # type: ignore[misc]
            self.layout = probe.found()
            return out
        forward: Any = super().forward  # type: ignore[misc]
        if not isinstance(self.layout, FoundLayout):
            forward = partial(self.layout.run, self)

        def run_layer(state: Tensor) -> Any:
            run = ConnectedPass(self, Lookahead() if lookahead is None else lookahead, state)
            return run.finish(forward(run.stream(state), *args[1:], **context))

        return self.connections(state, run_layer)

    def reader(self, i: int, dtype: torch.dtype) -> Reader:
        """Return the connection of sublayer ``i``, and its norm where the read takes that on."""
        connection, name = self.connections[i], self.layout.norms[i]
        if name is None or not connection.fuses_norm(dtype):
            return Reader(connection)
        return Reader(connection, fusable_norm(reduce(getattr, name.split("."), self), dtype))

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module) and name != "connections":
            for module in called_modules(nn.ModuleList([value])).values():
                read_for(module)
        super().__setattr__(name, value)


class ConnectedPass(LayerPass):
    """One forward pass of a virtual-width layer, on a state ``[..., D']``."""

    def __init__(self, layer: Any, lookahead: Lookahead, state: Tensor) -> None:
        self._connections, self._lookahead = list(layer.connections), lookahead
        self._geometry = self._connections[0].geometry
        super().__init__(layer, torch.Size((*state.shape[:-1], self._geometry.hidden_size)), len(self._connections))

    def read(self, i: int, state: Tensor) -> Tensor:
        return self._lookahead.read(state, Reader(self._connections[i]))

    def read_normed(self, i: int, state: Tensor, norm: nn.Module) -> Tensor | None:
        connection = self._connections[i]
        weights = fusable_norm(norm, state.dtype) if connection.fuses_norm(state.dtype) else None
        return None if weights is None else self._lookahead.read(state, Reader(connection, weights))

    def write(self, i: int, state: Tensor, z: Tensor) -> Tensor:
        last = i + 1 == self.sublayers
        ahead = self._next_layers_reader(state.dtype) if last else self.layer.reader(i + 1, state.dtype)
        return self._lookahead.write(state, z.to(state.dtype), self._connections[i], ahead)

    def scale(self, state: Tensor, factor: Any) -> Tensor:
        if isinstance(factor, Tensor) and factor.ndim and factor.shape[-1] == self._geometry.hidden_size > 1:
            factor = repeat_over_slots(factor, self._geometry)
        return state * factor

    def _next_layers_reader(self, dtype: torch.dtype) -> Reader | None:
        following = self._lookahead.after(self.layer)
        if isinstance(following, VirtualWidthLayer) and can_read_ahead(self.layer, following):
            return following.reader(0, dtype)  # not for a wrapper, which may run its layer twice
        return None


def take_residuals(layer: Any, layout: Layout | None) -> None:
    """Make a decoder layer a virtual-width layer, in place; without a layout it finds it when it first runs."""
    take_streams(layer)
    layer.layout, layer.state_name = layout, next(iter(inspect.signature(layer.forward).parameters))
    mix_in(VirtualWidthLayer, layer)
