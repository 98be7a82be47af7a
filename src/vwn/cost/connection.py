"""Cost of one connection per token and sublayer (section 3.5 of the paper): FLOPs, saved activations, bytes moved.

``D`` backbone width, ``m`` segments, ``n`` slots, ``r = n/m``, ``D' = r D``, ``e`` bytes per element. A multiply and an
add are two FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass

from vwn.common.errors import UserError
from vwn.nn.geometry import Geometry

PLAIN_ACTIVATION_BYTES = 34
"""Bytes per token and unit of ``D`` that a plain layer saves: 16 bit, selective recomputation (section 3.5)."""

_NORM_FLOPS = {"ghc": 4, "hc": 7, "mhc": 3}  # by kind of connection, per number of the state


@dataclass(frozen=True)
class ConnectionCost:
    """Cost of one connection per token and sublayer (section 3.5, and the same parts of its relatives).

    All parts but norm and Sinkhorn are matrix products, which is what ``torch.utils.flop_counter`` counts.
    """

    geometry: Geometry
    norm_flops: int
    """``4 r D``: the slot norm, elementwise, so no FLOP counter sees it. Zero when static. HC's LayerNorm takes
    ``7 r D``, mHC's norm without a gain ``3 r D``."""
    dynamic_parameter_flops: int
    """``2 (2m + n) r D``: the slots times ``[W_α | W_β]`` (eqs. 13-14). Zero when static. In mHC the whole state makes
    every coefficient: ``2 (2n + n²) r D``. A carry that is the identity takes ``n`` away, here and in the next part."""
    width_connection_flops: int
    """``2 (m + n) r D``: read and carry, ``[Å | Â]ᵀ H'``."""
    depth_connection_flops: int
    """``2 n D``: write, ``Bᵀ Z``."""
    activation_bytes: float
    """``4 η r D`` with ``η = ½``: what both connections of a layer save beyond a plain layer's ``34 D``, in 16 bit."""
    forward_bytes: int
    """``(2r + 2) D e``: the least that a write and the next read together move, with the state and ``Z`` in, the state
    and ``X`` out; coefficients are left out."""
    backward_bytes: int
    """``(3r + 3) D e``, with state, ``Z`` and ``B`` saved and the other coefficients computed again."""
    sinkhorn_flops: int = 0
    """``4 n²`` a round: sums and quotients of rows and columns. Zero where the carry is free."""

    @property
    def matmul_flops(self) -> int:
        """FLOPs of the matrix products."""
        return self.dynamic_parameter_flops + self.width_connection_flops + self.depth_connection_flops

    @property
    def flops(self) -> int:
        """FLOPs of all parts."""
        return self.norm_flops + self.matmul_flops + self.sinkhorn_flops

    @property
    def activation_overhead(self) -> float:
        """Saved activations relative to a plain layer's; 0.088 for ``(2, 3)``."""
        return self.activation_bytes / (PLAIN_ACTIVATION_BYTES * self.geometry.hidden_size)


def connection_cost(
    geometry: Geometry,
    bytes_per_element: int = 2,
    dynamic: bool = True,
    kind: str = "ghc",
    sinkhorn_rounds: int = 0,
    learned_carry: bool = True,
) -> ConnectionCost:
    """Compute the cost of one connection by the formulas of section 3.5.

    Args:
        geometry: ``(D, m, n)``.
        bytes_per_element: ``e`` of the state, for the bytes moved; the activation formulas are the paper's, for 16 bit.
        dynamic: whether the routing depends on the token.
        kind: ``"ghc"``, ``"hc"`` or ``"mhc"``.
        sinkhorn_rounds: rounds for a doubly-stochastic carry.
        learned_carry: whether the carry is learned; else it is the identity.

    Raises:
        UserError: an unknown ``kind``.
    """
    if kind not in _NORM_FLOPS:
        raise UserError(f"the cost of a connection of kind {kind!r} is not known; known are {', '.join(_NORM_FLOPS)}")
    m, n, narrow, wide = geometry.m, geometry.n, geometry.hidden_size, geometry.over_width
    carry = n if learned_carry else 0
    e = bytes_per_element
    return ConnectionCost(
        geometry=geometry,
        norm_flops=_NORM_FLOPS[kind] * wide if dynamic else 0,
        dynamic_parameter_flops=2 * (2 * n + n * n if kind == "mhc" else 2 * m + carry) * wide if dynamic else 0,
        width_connection_flops=2 * (m + carry) * wide,
        depth_connection_flops=2 * n * narrow,
        activation_bytes=2.0 * wide,
        forward_bytes=(2 * wide + 2 * narrow) * e,
        backward_bytes=(3 * wide + 3 * narrow) * e,
        sinkhorn_flops=4 * n * n * sinkhorn_rounds,
    )
