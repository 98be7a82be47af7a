"""Small decoder layers of every habit of writing a residual add, and a way to run them with virtual width.

The widened layer must compute what the layer does in any basis of the slots, so that each routing weight matters.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vwn.hf.layer import VirtualWidthLayer, take_residuals
from vwn.hf.layouts import FoundLayout
from vwn.hf.on_demand import own_class
from vwn.hf.sublayers import meta_copy
from vwn.nn.connection import Connections
from vwn.nn.generalized import GeneralizedHyperConnection

D, N = 6, 3


class Norm(nn.LayerNorm):
    def __init__(self) -> None:
        super().__init__(D)


class Core(nn.Module):
    """Mixes tokens and channels, and hands on weights too, as attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor, mask: Any = None) -> tuple[Tensor, Tensor]:
        z = self.outer(torch.tanh(self.inner(x)).cumsum(1))
        return (z if mask is None else z * mask), z.mean()


def add(x: Tensor, residual: Tensor, p: float = 0.0, training: bool = False) -> Tensor:
    out = F.dropout(x, p, training)
    return residual + out


def add_where_there_is_one(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    if bias is not None:
        x = x + bias
    if residual is not None:
        x = x + residual
    return x


class Adding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        if self.linear is None:
            x = torch.zeros_like(residual)
        return add(self.linear(x), residual)


class AddingAttention(Adding):
    def forward(self, x: Tensor, residual: Tensor, mask: Any = None) -> tuple[Tensor, Tensor]:
        out = add(self.linear(x), residual=residual)
        return out, x.mean()


class Layer(nn.Module):
    """What the toy layers are made of."""

    parallel, scale = True, 0.7

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3, self.norm4 = Norm(), Norm(), Norm(), Norm()
        self.attn, self.mlp = Core(), nn.Linear(D, D)
        self.adding, self.adding_attention = Adding(), AddingAttention()
        self.gain = nn.Parameter(torch.ones(D))
        self.drop = nn.Dropout(0.1)
        self.identity = nn.Identity()
        self.relu_in_place = nn.ReLU(inplace=True)


class PreNorm(Layer):
    def forward(self, hidden_states: Tensor, mask: Any = None, **kwargs: Any) -> Tensor:
        residual = hidden_states
        hidden_states = self.norm1(hidden_states)
        hidden_states, _ = self.attn(hidden_states, mask)
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.norm2(hidden_states)
        hidden_states = self.mlp(hidden_states)
        return residual + hidden_states


class PostNormInside(Layer):
    def forward(self, h: Tensor) -> Tensor:
        r = h
        h, _ = self.attn(h)
        h = r + self.norm1(h)
        r = h
        h = self.norm2(self.mlp(h))
        return r + h


class Helpers(Layer):
    def forward(self, h: Tensor, mask: Any = None) -> tuple[Tensor, Tensor]:
        h, weight = self.adding_attention(self.norm1(h), h, mask=mask)
        h = add_where_there_is_one(self.mlp(h), self.mlp.bias, residual=h)
        h = self.adding(self.norm2(h), h)
        return h, weight


class Casts(Layer):
    def forward(self, h: Tensor) -> Tensor:
        r = h
        h = self.norm1(r.to(dtype=self.norm1.weight.dtype))
        r = r.to(torch.float64)
        h = r + self.attn(h)[0]
        h = h.type_as(self.gain)
        return (h + self.mlp(self.norm2(h))).to(h.dtype).contiguous()


class Arguments(Layer):
    def forward(self, hidden: Tensor, mask: Any = None, *, factor: float = 0.5, flag: bool = False) -> Any:
        """Annotations, defaults, ``del`` and a tuple; the stream's name is used for something else in between."""
        z, w = self.attn(self.norm1(hidden), mask)
        both: Tensor
        both = hidden = hidden + z * factor
        hidden: Tensor = self.norm2(hidden)  # type: ignore[no-redef]
        hidden = both + self.mlp(hidden) if self.parallel else both
        del z, both
        return hidden, w, f"{hidden.shape}"


WIDENED = [PreNorm, PostNormInside, Helpers, Casts, Arguments]


def found(layer: Any) -> FoundLayout:
    """What a layer consists of, by a pass without numbers."""
    probe = meta_copy(layer)
    take_residuals(probe, None)
    with torch.no_grad():
        probe(torch.empty(2, 4, D, device="meta", dtype=torch.bfloat16))
    return probe.layout


def widened(layer: Any, layout: FoundLayout | None = None) -> Any:
    """The same weights, read from and written to a state of ``N`` slots."""
    layout = layout or found(layer)
    wide = copy.deepcopy(layer)
    connections = [GeneralizedHyperConnection(D, 1, N, dynamic=False, backend="reference") for _ in layout.names]
    wide.connections = Connections(connections).double()
    take_residuals(wide, layout)
    assert isinstance(wide, VirtualWidthLayer)
    assert own_class(wide) is type(layer)
    return wide


@torch.no_grad()
def change_basis(wide: Any) -> tuple[Tensor, Tensor]:
    """Other routing weights in every sublayer, the same function: after ``k`` writes the state is ``G_k H``.

    Row 0 of ``H`` is the plain stream, the others get every output as well. Returns the first ``G`` and the inverse of
    the last.
    """
    generator = torch.Generator().manual_seed(7)

    def basis() -> Tensor:
        return torch.eye(N).double() + 0.4 * torch.randn(N, N, generator=generator, dtype=torch.float64)

    first = before = basis()
    for connection in wide.connections:
        after = basis()
        back = torch.linalg.inv(before)
        connection.bias_alpha[:, :1] = back.T[:, :1]
        connection.bias_alpha[:, 1:] = (after @ back).T
        connection.bias_beta[:] = (after @ torch.ones(N, 1).double()).T
        before = after
    return first, torch.linalg.inv(before)


def run_plain(layer: Any, h: Tensor, **arguments: Any) -> tuple[Tensor, Any]:
    out = layer(h.clone(), **arguments)
    out, *rest = out if isinstance(out, tuple) else (out,)
    return out, rest[0] if rest else None


def run_wide(wide: Any, h: Tensor, **arguments: Any) -> tuple[Tensor, Any]:
    first, last = change_basis(wide)
    others = torch.randn(*h.shape[:-1], N - 1, D, dtype=h.dtype, generator=torch.Generator().manual_seed(8))
    state = first @ torch.cat([h[..., None, :], others], dim=-2)
    out = wide(state.flatten(-2), **arguments)
    state, *rest = out if isinstance(out, tuple) else (out,)
    return (last @ state.unflatten(-1, (N, D)))[..., 0, :], rest[0] if rest else None
