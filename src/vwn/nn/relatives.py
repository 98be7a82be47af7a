"""Relatives of virtual width behind the same interface: Hyper-Connections, Frac-Connections, mHC, as in their papers.

Shapes: ``...`` any leading dimensions, ``n`` slots (streams), ``m`` segments (fractions), ``d = D / m``. Plain PyTorch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vwn.nn.connection import Connection
from vwn.nn.geometry import Geometry
from vwn.ops.reference import inverse_rms
from vwn.ops.sinkhorn import ROUNDS, sinkhorn

INITIAL_SCALE = 0.01
"""Scale of the part that depends on the token, in both papers."""


class HyperConnection(Connection):
    """Hyper-Connections (arXiv 2409.19606; ``m = 1``) and Frac-Connections (arXiv 2503.14125; ``n = m``).

    Generalized Hyper-Connections with LayerNorm for the slot norm, no ``τ``, and one scale for each matrix. A model of
    Hyper-Connections has ``n`` copies of an embedding in front and sums the streams behind.

    Args:
        hidden_size: backbone width ``D``.
        m: 1, or fraction rate, which divides ``D``.
        n: streams, or ``m``; anything from ``m`` on will do.
        index: number of the sublayer in the model; with ``m = 1`` the read starts at stream ``index mod n``.
        dynamic: whether the routing depends on the token's state or is a parameter alone.
        frozen: keep everything at its initial value, as buffers of the same names.
        eps: added to the variance in the slot norm.
        backend: ``"auto"`` or ``"reference"``: there is but one.

    Raises:
        ValueError: invalid ``(D, m, n)``, or another ``backend``.
    """

    kind = "hc"

    bias_alpha: Tensor
    bias_beta: Tensor
    dynamic_alpha: Tensor
    dynamic_beta: Tensor
    scale_alpha: Tensor
    scale_beta: Tensor
    slot_norm: Tensor
    slot_norm_bias: Tensor

    def __init__(
        self,
        hidden_size: int,
        m: int,
        n: int,
        index: int = 0,
        dynamic: bool = True,
        frozen: bool = False,
        eps: float = 1e-5,
        backend: str = "auto",
    ) -> None:
        geometry = Geometry(hidden_size, m, n)
        shapes: dict[str, tuple[int, ...]] = {"bias_alpha": (n, m + n), "bias_beta": (m, n)}
        if dynamic:
            d = geometry.segment_size
            shapes |= {"dynamic_alpha": (d, m + n), "dynamic_beta": (d, m), "scale_alpha": (1,), "scale_beta": (1,)}
            shapes |= {"slot_norm": (d,), "slot_norm_bias": (d,)}
        self.index, self.dynamic, self.eps = index, dynamic, eps
        super().__init__(geometry, shapes, frozen, backend)

    def initial_values(self) -> dict[str, Tensor]:
        """The read starts at stream ``index mod n``, or at the first ``m`` slots, every slot carries itself, and slot
        ``j`` receives segment ``j mod m``; the dynamic part starts at zero with scales of 0.01."""
        m, n = self.geometry.m, self.geometry.n
        slot = torch.arange(n)
        read = torch.eye(n)[:, [self.index % n]] if m == 1 else torch.eye(n)[:, :m]
        values = {
            "bias_alpha": torch.cat([read, torch.eye(n)], dim=1),
            "bias_beta": (torch.arange(m)[:, None] == slot[None, :] % m).float(),
        }
        if self.dynamic:
            values |= {
                name: torch.zeros(self.shapes[name]) for name in ("dynamic_alpha", "dynamic_beta", "slot_norm_bias")
            }
            values |= {name: torch.full((1,), INITIAL_SCALE) for name in ("scale_alpha", "scale_beta")}
            values["slot_norm"] = torch.ones(self.shapes["slot_norm"])
        return values

    def read_matrix(self, slots: Tensor) -> Tensor:
        """Compute ``Å = s_α tanh(LN(H') W_α) + A``, the first ``m`` columns: ``[..., n, m]``."""
        m, static = self.geometry.m, self.bias_alpha.to(slots.dtype)[:, : self.geometry.m]
        if not self.dynamic:
            return static
        weight, scale = self.dynamic_alpha.to(slots.dtype)[:, :m], self.scale_alpha.to(slots.dtype)
        return scale * torch.tanh(self._normed(slots) @ weight) + static

    def write_matrices(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Compute ``Â``, the other ``n`` columns, and ``B = s_β tanh(LN(H') W_β)ᵀ + B``."""
        m, n, dtype = self.geometry.m, self.geometry.n, slots.dtype
        carry, beta = self.bias_alpha.to(dtype)[:, m:], self.bias_beta.to(dtype)
        if not self.dynamic:
            return carry, beta
        weight = torch.cat([self.dynamic_alpha[:, m:], self.dynamic_beta], dim=1).to(dtype)
        dynamic_carry, dynamic_beta = torch.tanh(self._normed(slots) @ weight).split([n, m], dim=-1)
        return self.scale_alpha.to(dtype) * dynamic_carry + carry, self.scale_beta.to(dtype) * dynamic_beta.mT + beta

    def _normed(self, slots: Tensor) -> Tensor:
        weight, bias = self.slot_norm.to(slots.dtype), self.slot_norm_bias.to(slots.dtype)
        return F.layer_norm(slots, weight.shape, weight, bias, self.eps)


class ManifoldHyperConnection(Connection):
    """Manifold-constrained Hyper-Connections (mHC, arXiv 2512.24880), ``m = 1``: the routing of all streams comes from
    the whole normalised state, and the carry is doubly stochastic.

    ``x̄ = H' / rms(H')``, ``Å = σ(a₁ x̄ φ_pre + b_pre)``, ``B = 2 σ(a₂ x̄ φ_post + b_post)`` and
    ``Â = Sinkhorn(a₃ x̄ φ_res + b_res)``; φ, a and b are here called weight, scale and bias.

    Args:
        hidden_size: backbone width ``D``.
        n: streams of that width.
        index: number of the sublayer in the model; the read starts at stream ``index mod n``.
        frozen: keep everything at its initial value, as buffers of the same names.
        eps: added to the mean square of the state.
        routing_eps: added to ``Å``, and to the sums in Sinkhorn's scaling; DeepSeek-V4's.
        sinkhorn_rounds: rounds of Sinkhorn's scaling.
        backend: ``"auto"``, ``"reference"`` or ``"compiled"``; all of them run plain PyTorch.

    Raises:
        ValueError: invalid sizes, or another ``backend``.
    """

    kind = "mhc"

    def __init__(
        self,
        hidden_size: int,
        n: int,
        index: int = 0,
        frozen: bool = False,
        eps: float = 1e-6,
        routing_eps: float = 1e-6,
        sinkhorn_rounds: int = ROUNDS,
        backend: str = "auto",
    ) -> None:
        geometry = Geometry(hidden_size, 1, n)
        self.index, self.eps = index, eps
        self.routing_eps, self.sinkhorn_rounds = routing_eps, sinkhorn_rounds
        shapes: dict[str, tuple[int, ...]] = {}
        for name, bias in (("pre", (n,)), ("post", (n,)), ("res", (n, n))):
            columns = n * n if name == "res" else n
            shapes |= {f"{name}_weight": (geometry.over_width, columns), f"{name}_bias": bias, f"{name}_scale": (1,)}
        super().__init__(geometry, shapes, frozen, backend)

    def initial_values(self) -> dict[str, Tensor]:
        """The paper leaves the biases open. Streams that start alike and read alike would stay alike, so the read is
        3 at its own stream and -3 elsewhere: nearly 1 and nearly 0 with a slope of 0.045 left. Every stream receives
        ``2 σ(0) = 1`` times the output, and the carry, 3 on the diagonal and -3 elsewhere, is nearly the identity."""
        n = self.geometry.n
        at_own = 6 * torch.eye(n) - 3
        values = {f"{name}_weight": torch.zeros(self.shapes[f"{name}_weight"]) for name in ("pre", "post", "res")}
        values |= {"pre_bias": at_own[self.index % n], "post_bias": torch.zeros(n), "res_bias": at_own}
        return values | {f"{name}_scale": torch.full((1,), INITIAL_SCALE) for name in ("pre", "post", "res")}

    @property
    def backends(self) -> tuple[str, ...]:
        """Names that :meth:`set_backend` takes; all of them run plain PyTorch."""
        return ("auto", "reference", "compiled")

    def read_matrix(self, slots: Tensor) -> Tensor:
        """Compute ``Å``, ``[..., n, 1]``."""
        return torch.sigmoid(self._logits(slots, "pre")[0]).unsqueeze(-1) + self.routing_eps

    def write_matrices(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Compute ``Â``, ``[..., n, n]``, and ``B``, ``[..., 1, n]``."""
        res, post = self._logits(slots, "res", "post")
        return sinkhorn(res, self.sinkhorn_rounds, self.routing_eps), 2 * torch.sigmoid(post).unsqueeze(-2)

    def _logits(self, slots: Tensor, *names: str) -> list[Tensor]:
        """Compute ``a x̄ φ + b`` for each name, in the shape of ``b``."""
        weights, biases, scales = (
            [getattr(self, f"{name}_{part}").to(slots.dtype) for name in names] for part in ("weight", "bias", "scale")
        )
        flat = slots.flatten(-2)
        projected = (flat @ torch.cat(weights, dim=1)) * inverse_rms(flat, self.eps)
        parts = projected.split([w.shape[1] for w in weights], dim=-1)
        return [a * part.unflatten(-1, b.shape) + b for part, a, b in zip(parts, scales, biases, strict=True)]
