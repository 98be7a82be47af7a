"""The seam at which a residual connection is replaced: state in, sublayer input out; sublayer output in, state out.

Shapes: ``...`` any leading dimensions, ``n`` slots, ``m`` segments, ``d = D / m`` segment width, ``D' = n d``.
The state is ``[..., D']``, slot-major: its ``n x d`` matrix is a plain reshape.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from vwn.common.errors import UserError
from vwn.nn.geometry import Geometry
from vwn.nn.initialisation import StatesItsInitialValues
from vwn.ops import NormWeights, check_backend, state_dtype
from vwn.ops.reference import rms_norm


class Routing(NamedTuple):
    """The routing matrices of one sublayer, float32 (float64 for a float64 state)."""

    alpha: Tensor
    """``A = [Å | Â]``, ``[..., n, m + n]``: the first ``m`` columns read, the other ``n`` carry."""
    beta: Tensor
    """``B``, ``[..., m, n]``: what segment ``i`` of the sublayer's output adds to slot ``j``."""


def _without_autocast(state: Tensor) -> AbstractContextManager:
    """The routing is float32 also under autocast, which the meta device does not know."""
    return nullcontext() if state.is_meta else torch.autocast(state.device.type, enabled=False)


class Connection(StatesItsInitialValues):
    """One sublayer's connection to the over-width state (eq. 10), in plain PyTorch.

    A kind of connection says how its matrices come about, in :meth:`read_matrix` and :meth:`write_matrices`.

    Args:
        geometry: ``(D, m, n)``.
        shapes: of the weights, by name.
        frozen: keep the weights at their initial values, as buffers of the same names.
        backend: what runs the parts that have several, see :mod:`vwn.ops`.

    Raises:
        UserError: a ``backend`` that is unknown or that this kind of connection does not have.
    """

    kind: ClassVar[str]
    """Its name among the configuration's connections."""
    not_decayed: ClassVar[tuple[str, ...]] = ()
    """Weights that weight decay leaves alone, besides biases, gains and scalars."""
    dynamic: bool = True
    """Whether the routing depends on the token."""
    sinkhorn_rounds: int = 0
    """Rounds of Sinkhorn's scaling that the carry takes."""

    def __init__(
        self, geometry: Geometry, shapes: dict[str, tuple[int, ...]], frozen: bool = False, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.geometry, self.shapes = geometry, shapes
        self.set_backend(backend)
        for name, shape in shapes.items():
            if frozen:
                self.register_buffer(name, torch.empty(shape))
            else:
                self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.reset_parameters()

    @property
    def backends(self) -> tuple[str, ...]:
        """The names that :meth:`set_backend` takes."""
        return ("auto", "reference")

    @property
    def rewrites(self) -> bool:
        """Whether ``ops.write`` with its ``weights`` repeats its write, which rebuilding states takes."""
        return False

    def set_backend(self, backend: str) -> None:
        """Run on ``backend`` from now on.

        Raises:
            UserError: unknown, or not one that this kind of connection has.
        """
        if check_backend(backend) not in self.backends:
            names = " or ".join(map(repr, self.backends))
            raise UserError(f"backend {backend!r} does not run {self._title()}; use {names}")
        self.backend = backend

    def read_matrix(self, slots: Tensor) -> Tensor:
        """``Å``, ``[..., n, m]``, from the slots ``[..., n, d]``, in their dtype; without ``...`` if it is static."""
        raise NotImplementedError

    def write_matrices(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """``Â``, ``[..., n, n]``, and ``B``, ``[..., m, n]``, as :meth:`read_matrix`."""
        raise NotImplementedError

    def routing_matrices(self, state: Tensor) -> Routing:
        """The matrices ``A`` and ``B`` for a state, in float32 whatever the model's dtype.

        To look at; :meth:`read` and :meth:`write` compute what they need themselves.

        Args:
            state: over-width state, ``[..., D']``.

        Returns:
            ``A``: ``[..., n, m+n]`` and ``B``: ``[..., m, n]``; the same for every token when static.
        """
        with _without_autocast(state):
            slots = self._slots(state)
            read, (carry, beta) = self.read_matrix(slots), self.write_matrices(slots)
        lead = state.shape[:-1]
        read, carry, beta = (t.expand(*lead, *t.shape[-2:]) for t in (read, carry, beta))
        return Routing(torch.cat([read, carry], dim=-1), beta)

    def read(self, state: Tensor, norm: NormWeights | None = None) -> Tensor:
        """The sublayer's input ``X = Åᵀ H'`` (first line of eq. 10).

        Args:
            state: ``[..., D']``.
            norm: the sublayer's own RMSNorm, to be applied to ``X`` in the same pass.

        Returns:
            ``[..., D]`` in the state's dtype.

        Raises:
            UserError: a state of another width.
        """
        state = state.to(state_dtype(state))
        with _without_autocast(state):
            slots = self._slots(state)
            x = (self.read_matrix(slots).mT @ slots).flatten(-2).to(state.dtype)
            return x if norm is None else rms_norm(x, norm)

    def write(self, state: Tensor, z: Tensor) -> Tensor:
        """The new state ``Bᵀ Z + Âᵀ H'`` (second line of eq. 10).

        Args:
            state: the state that was read, ``[..., D']``.
            z: the sublayer's output, ``[..., D]``.

        Returns:
            ``[..., D']`` in the state's dtype.

        Raises:
            UserError: shapes that do not fit.
        """
        if z.shape != (*state.shape[:-1], self.geometry.hidden_size):
            wanted = (*state.shape[:-1], self.geometry.hidden_size)
            raise UserError(f"the sublayer's output must be {wanted} beside the state, got {tuple(z.shape)}")
        state = state.to(state_dtype(state))
        with _without_autocast(state):
            slots = self._slots(state)
            segments = z.to(state.dtype).unflatten(-1, (self.geometry.m, -1)).to(slots.dtype)
            carry, beta = self.write_matrices(slots)
            return (beta.mT @ segments + carry.mT @ slots).flatten(-2).to(state.dtype)

    def write_read(
        self, state: Tensor, z: Tensor, following: Connection, norm: NormWeights | None = None
    ) -> tuple[Tensor, Tensor]:
        """:meth:`write`, then ``following.read`` of the new state.

        Args:
            state: the state that was read, ``[..., D']``.
            z: the sublayer's output, ``[..., D]``.
            following: the connection of the next sublayer.
            norm: the next sublayer's own RMSNorm.

        Returns:
            the new state ``[..., D']`` and the next sublayer's input ``[..., D]``.
        """
        new = self.write(state, z)
        return new, following.read(new, norm)

    def fuses_norm(self, dtype: torch.dtype) -> bool:
        """Whether a read gains from taking on the sublayer's norm."""
        return False

    def forward(self, state: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """``[..., D'] -> [..., D']``: read, run ``sublayer`` (``[..., D] -> [..., D]``, with its own norm, without its
        residual add), write."""
        return self.write(state, sublayer(self.read(state)))

    def _slots(self, state: Tensor) -> Tensor:
        g = self.geometry
        if state.shape[-1:] != (g.over_width,) or not state.is_floating_point():
            got = f"{tuple(state.shape)} {str(state.dtype).removeprefix('torch.')}"
            raise UserError(f"the over-width state must be D' = {g.over_width} wide and floating point, got {got}")
        return state.unflatten(-1, (g.n, -1)).to(torch.promote_types(state.dtype, torch.float32))

    def _title(self) -> str:
        return f"a {type(self).__name__}"

    def extra_repr(self) -> str:
        g = self.geometry
        return f"D={g.hidden_size}, m={g.m}, n={g.n}"
