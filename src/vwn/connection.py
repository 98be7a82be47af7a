"""Generalized Hyper-Connections (section 3.3): read from, and write to, an over-width state around one sublayer.

Shapes: ``...`` any leading dimensions, ``n`` slots, ``m`` segments, ``d = D / m`` segment width, ``D' = n d``.
The state is ``[..., D']``, slot-major: its ``n x d`` matrix is a plain reshape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vwn.geometry import Geometry
from vwn.initialisation import StatesItsInitialValues

CARRY_CONSTRAINTS = ("none",)


class Routing(NamedTuple):
    """The routing matrices of one sublayer, float32 (float64 for a float64 state)."""

    alpha: Tensor
    """``A = [Å | Â]``, ``[..., n, m + n]``: the first ``m`` columns read, the other ``n`` carry."""
    beta: Tensor
    """``B``, ``[..., m, n]``: what segment ``i`` of the sublayer's output adds to slot ``j``."""


class GeneralizedHyperConnection(StatesItsInitialValues):
    """One sublayer's connection to the over-width state (eqs. 10, 12-16).

    Args:
        hidden_size: backbone width ``D``.
        m: fraction rate, divides ``D``.
        n: slots, ``n >= m``.
        dynamic: whether the routing depends on the token's state (eqs. 12-14) or is a parameter alone.
        carry_constraint: ``"none"``, the paper's free carry.
        frozen: keep everything at its initial value, as buffers of the same names; with ``m = n = 1`` and
            ``dynamic=False`` this is exactly the residual connection.
        eps: added to the mean square in the slot norm.

    Raises:
        ValueError: invalid ``(D, m, n)`` or an unknown ``carry_constraint``.
    """

    static_alpha: Tensor
    static_beta: Tensor
    dynamic_alpha: Tensor
    dynamic_beta: Tensor
    scale_alpha: Tensor
    scale_beta: Tensor
    norm_weight: Tensor

    def __init__(
        self,
        hidden_size: int,
        m: int,
        n: int,
        dynamic: bool = True,
        carry_constraint: str = "none",
        frozen: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.geometry = g = Geometry(hidden_size, m, n)
        if carry_constraint not in CARRY_CONSTRAINTS:
            raise ValueError(f"carry_constraint must be one of {CARRY_CONSTRAINTS}, got {carry_constraint!r}")
        self.dynamic, self.carry_constraint, self.eps = dynamic, carry_constraint, eps
        shapes: dict[str, tuple[int, ...]] = {"static_alpha": (n, m + n), "static_beta": (m, n)}
        if dynamic:
            d = g.segment_size
            shapes |= {"dynamic_alpha": (d, m + n), "dynamic_beta": (d, m)}
            shapes |= {"scale_alpha": (n, m + n), "scale_beta": (m, n), "norm_weight": (d,)}
        for name, shape in shapes.items():
            if frozen:
                self.register_buffer(name, torch.empty(shape))
            else:
                self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        """Eqs. 15-16: slots ``0..m-1`` start as the plain residual stream, every slot carries itself, and slot ``j``
        receives segment ``j mod m``; the dynamic part starts at zero with unit scales."""
        m, n = self.geometry.m, self.geometry.n
        slot = torch.arange(n)
        values = {
            "static_alpha": torch.cat([torch.eye(n)[:, :m], torch.eye(n)], dim=1),
            "static_beta": (torch.arange(m)[:, None] == slot[None, :] % m).float(),
        }
        if self.dynamic:
            values |= {
                "dynamic_alpha": torch.zeros_like(self.dynamic_alpha, device="cpu"),
                "dynamic_beta": torch.zeros_like(self.dynamic_beta, device="cpu"),
                "scale_alpha": torch.ones(n, m + n),
                "scale_beta": torch.ones(m, n),
                "norm_weight": torch.ones(self.geometry.segment_size),
            }
        return values

    def routing_matrices(self, state: Tensor) -> Routing:
        """The matrices ``A`` and ``B`` for a state (eqs. 12-14), in float32 whatever the model's dtype.

        Args:
            state: over-width state, ``[..., D']``.

        Returns:
            ``A``: ``[..., n, m+n]`` and ``B``: ``[..., m, n]``; the same for every token when static.
        """
        dtype = torch.promote_types(state.dtype, torch.float32)
        static_alpha, static_beta = self.static_alpha.to(dtype), self.static_beta.to(dtype)
        if not self.dynamic:
            lead = state.shape[:-1]
            return Routing(static_alpha.expand(*lead, -1, -1), static_beta.expand(*lead, -1, -1))
        with torch.autocast(state.device.type, enabled=False):
            slots = self._slots(state).to(dtype)
            normed = slots * torch.rsqrt(slots.square().mean(-1, keepdim=True) + self.eps) * self.norm_weight.to(dtype)
            weight = torch.cat([self.dynamic_alpha, self.dynamic_beta], dim=1).to(dtype) / slots.shape[-1] ** 0.5
            alpha, beta = torch.tanh(normed @ weight).split([self.geometry.m + self.geometry.n, self.geometry.m], -1)
            alpha = torch.addcmul(static_alpha, self.scale_alpha.to(dtype), alpha)  # eq. 13, tau = sqrt(d)
            beta = torch.addcmul(static_beta, self.scale_beta.to(dtype), beta.mT)  # eq. 14
        return Routing(alpha, beta)

    def read(self, state: Tensor) -> tuple[Tensor, Routing]:
        """The sublayer's input ``X = Åᵀ H'`` (first line of eq. 10).

        Args:
            state: ``[..., D']``.

        Returns:
            ``x``: ``[..., D]`` in the state's dtype, and the routing to hand to :meth:`write`.
        """
        routing = self.routing_matrices(state)
        with torch.autocast(state.device.type, enabled=False):
            read = routing.alpha[..., : self.geometry.m]
            x = read.mT @ self._slots(state).to(read.dtype)
        return x.flatten(-2).to(state.dtype), routing

    def write(self, state: Tensor, z: Tensor, routing: Routing) -> Tensor:
        """The new state ``Bᵀ Z + Âᵀ H'`` (second line of eq. 10).

        Args:
            state: the state that was read, ``[..., D']``.
            z: the sublayer's output, ``[..., D]``.
            routing: what :meth:`read` returned.

        Returns:
            ``[..., D']`` in the state's dtype.
        """
        with torch.autocast(state.device.type, enabled=False):
            carry = routing.alpha[..., self.geometry.m :]
            segments = z.unflatten(-1, (self.geometry.m, -1)).to(carry.dtype)
            new = routing.beta.mT @ segments + carry.mT @ self._slots(state).to(carry.dtype)
        return new.flatten(-2).to(state.dtype)

    def forward(self, state: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """``[..., D'] -> [..., D']``: read, run ``sublayer`` (``[..., D] -> [..., D]``, with its own norm, without its
        residual add), write."""
        x, routing = self.read(state)
        return self.write(state, sublayer(x), routing)

    def _slots(self, state: Tensor) -> Tensor:
        return state.unflatten(-1, (self.geometry.n, self.geometry.segment_size))

    def extra_repr(self) -> str:
        g = self.geometry
        return (
            f"D={g.hidden_size}, m={g.m}, n={g.n}, dynamic={self.dynamic}, carry_constraint={self.carry_constraint!r}"
        )
