"""Generalized Hyper-Connections (section 3.3): read from, and write to, an over-width state around one sublayer.

Shapes: ``...`` any leading dimensions, ``n`` slots, ``m`` segments, ``d = D / m`` segment width, ``D' = n d``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vwn import ops
from vwn.nn.connection import Connection, check_output, has_hooks
from vwn.nn.geometry import Geometry
from vwn.ops.reference import coefficients
from vwn.ops.sinkhorn import ROUNDS, sinkhorn
from vwn.ops.weights import NormWeights, RoutingWeights, columns_of

CARRY_CONSTRAINTS = ("none", "identity", "doubly_stochastic")

CARRY_SHARPNESS = 12.0
"""Factor on the logits of a doubly-stochastic carry: the largest whose gradients, of the order of
``exp(-12)``, are still ten times Adam's eps of 1e-8. Rows then start 2e-5 (3 slots) to 8e-4 (64) from the identity's:
less than bfloat16 resolves."""


class GeneralizedHyperConnection(Connection):
    """One sublayer's connection to the over-width state (eqs. 10, 12-16).

    Args:
        hidden_size: backbone width ``D``.
        m: fraction rate, divides ``D``.
        n: slots, ``n >= m``.
        dynamic: whether the routing depends on the token's state (eqs. 12-14) or is a parameter alone.
        carry_constraint: ``"none"``, the paper's free carry; ours are ``"identity"``, without its weights, and
            ``"doubly_stochastic"``, whose logits they are: rows and columns sum to one.
        frozen: keep everything at its initial value, as buffers of the same names; with ``m = n = 1`` and
            ``dynamic=False`` this is exactly the residual connection.
        eps: added to the mean square in the slot norm.
        backend: what runs the ops, see :mod:`vwn.ops`; not part of the state, so checkpoints do not depend on it.

    Raises:
        ValueError: invalid ``(D, m, n)``, an unknown ``carry_constraint`` or ``backend``, or a backend that does not
            run a constrained carry.
    """

    kind = "ghc"

    bias_alpha: Tensor

    def __init__(
        self,
        hidden_size: int,
        m: int,
        n: int,
        dynamic: bool = True,
        carry_constraint: str = "none",
        frozen: bool = False,
        eps: float = 1e-6,
        backend: str = "auto",
    ) -> None:
        geometry = Geometry(hidden_size, m, n)
        if carry_constraint not in CARRY_CONSTRAINTS:
            raise ValueError(f"carry_constraint must be one of {CARRY_CONSTRAINTS}, got {carry_constraint!r}")
        self.learned_carry = carry_constraint != "identity"
        columns = m + n if self.learned_carry else m
        shapes: dict[str, tuple[int, ...]] = {"bias_alpha": (n, columns), "bias_beta": (m, n)}
        if dynamic:
            d = geometry.segment_size
            shapes |= {"dynamic_alpha": (d, columns), "dynamic_beta": (d, m)}
            shapes |= {"scale_alpha": (n, columns), "scale_beta": (m, n), "slot_norm": (d,)}
        self.dynamic, self.carry_constraint, self.eps = dynamic, carry_constraint, eps
        self.sinkhorn_rounds = ROUNDS if carry_constraint == "doubly_stochastic" else 0
        super().__init__(geometry, shapes, frozen, backend)

    def initial_values(self) -> dict[str, Tensor]:
        """Eqs. 15-16: slots ``0..m-1`` start as the plain residual stream, every slot carries itself, and slot ``j``
        receives segment ``j mod m``; the dynamic part starts at zero with unit scales."""
        m, n = self.geometry.m, self.geometry.n
        slot = torch.arange(n)
        values = {
            "bias_alpha": torch.cat([torch.eye(n)[:, :m], torch.eye(n)], dim=1)[:, : self.shapes["bias_alpha"][1]],
            "bias_beta": (torch.arange(m)[:, None] == slot[None, :] % m).float(),  # B (eq. 15)
        }
        if self.dynamic:
            values |= {
                "dynamic_alpha": torch.zeros(self.shapes["dynamic_alpha"]),
                "dynamic_beta": torch.zeros(self.shapes["dynamic_beta"]),
                "scale_alpha": torch.ones(self.shapes["scale_alpha"]),
                "scale_beta": torch.ones(m, n),
                "slot_norm": torch.ones(self.geometry.segment_size),
            }
        return values

    @property
    def weights(self) -> RoutingWeights:
        """The parameters in the form that the ops take."""
        return RoutingWeights(**{name: getattr(self, name) for name in self.shapes}, eps=self.eps)

    @property
    def backends(self) -> tuple[str, ...]:
        """Names that :meth:`set_backend` takes: all, or those that can constrain the carry."""
        return ops.BACKENDS if self.has_fused_write else ("auto", "reference", "compiled")

    @property
    def has_fused_write(self) -> bool:
        """True if the ops can do the write: all but a doubly-stochastic carry."""
        return self.carry_constraint != "doubly_stochastic"

    def read_matrix(self, slots: Tensor) -> Tensor:
        """Compute ``Å = S_α ∘ tanh(H̄ W_α / τ) + A``, its first ``m`` columns (eq. 13): ``[..., n, m]``."""
        return coefficients(slots, columns_of(self.weights.to_read, slots.dtype))

    def write_matrices(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Compute ``Â``, the other ``n`` columns (eq. 13), and ``B = S_β ∘ tanh(H̄ W_β / τ)ᵀ + B`` (eq. 14):
        ``[..., n, n]`` and ``[..., m, n]``."""
        g = self.geometry
        weights = self.weights
        split = [weights.carry_columns, g.m]
        carry, beta = coefficients(slots, columns_of(weights, slots.dtype)).split(split, dim=-1)
        if not self.learned_carry:
            carry = torch.eye(g.n, dtype=beta.dtype, device=beta.device).expand(*beta.shape[:-1], g.n)
        if self.carry_constraint == "doubly_stochastic":
            carry = sinkhorn(CARRY_SHARPNESS * carry, self.sinkhorn_rounds, exact=True)
        return carry, beta.mT

    def _read(self, state: Tensor, norm: NormWeights | None = None) -> Tensor:
        return ops.read(state, self.weights, norm, self.backend)

    def _write(self, state: Tensor, z: Tensor) -> Tensor:
        return ops.write(state, z, self.weights, self.backend) if self.has_fused_write else super()._write(state, z)

    def write_read(
        self, state: Tensor, z: Tensor, following: Connection, norm: NormWeights | None = None
    ) -> tuple[Tensor, Tensor]:
        """Do as :meth:`Connection.write_read`; in one pass over the state if the ops do both and no hooks look on."""
        fused = (
            self.has_fused_write
            and isinstance(following, GeneralizedHyperConnection)
            and following.geometry == self.geometry
            and not has_hooks(self, self.write, following, following.read)
        )
        if not fused:
            return super().write_read(state, z, following, norm)
        check_output(z)
        return ops.write_read(state, z, self.weights, following.weights, norm, self.backend)  # type: ignore[arg-type]

    def fuses_norm(self, dtype: torch.dtype) -> bool:
        """Return whether a read gains from taking on the sublayer's norm: only with Triton, and without hooks."""
        backend = ops.choose(self.backend, self.bias_alpha.device, dtype, self.geometry.n)
        return backend == "triton" and not has_hooks(self.read)

    def _title(self) -> str:
        return f"a carry that is {self.carry_constraint!r}"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dynamic={self.dynamic}, carry_constraint={self.carry_constraint!r}"
