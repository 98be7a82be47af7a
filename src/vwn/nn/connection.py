"""A connection between one sublayer and the over-width state (section 3.3): read, run the sublayer, write.

Shapes: ``...`` any leading dimensions, ``n`` slots, ``m`` segments, ``d = D / m`` segment width, ``D' = n d``.
The state is ``[..., D']``, slot-major: its ``n x d`` matrix ``H'`` is a plain reshape.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from vwn.common.errors import UserError
from vwn.nn.geometry import Geometry
from vwn.nn.initialisation import StatesItsInitialValues
from vwn.ops import NormWeights, check_backend, state_dtype
from vwn.ops.reference import read_slots, rms_norm, write_slots


class Routing(NamedTuple):
    """The routing matrices of one sublayer, float32 (float64 for a float64 state)."""

    alpha: Tensor
    """``A = [Å | Â]``, ``[..., n, m + n]``: the first ``m`` columns read, the other ``n`` carry."""
    beta: Tensor
    """``B``, ``[..., m, n]``: what segment ``i`` of the sublayer's output adds to slot ``j``."""


class Read(nn.Module):
    """The read of a connection as a module, so that forward hooks see it: ``X = Åᵀ H'`` (first line of eq. 10).

    ``read(state)`` maps the over-width state ``[..., D']`` to the sublayer's input ``[..., D]`` in the state's dtype.
    """

    connection: Connection

    def forward(self, state: Tensor, norm: NormWeights | None = None) -> Tensor:
        """Return ``[..., D]``; behind ``norm``, the sublayer's own RMSNorm, in the same pass if one is given."""
        return self.connection(state, norm=norm)


class Write(nn.Module):
    """The write of a connection as a module, so that forward hooks see it: ``Bᵀ Z + Âᵀ H'`` (second line of eq. 10).

    ``write(state, z)`` maps the state that was read, ``[..., D']``, and the sublayer's output, ``[..., D]``, to the new
    state ``[..., D']`` in the state's dtype.
    """

    connection: Connection

    def forward(self, state: Tensor, z: Tensor) -> Tensor:
        """Return the new state, ``[..., D']``; a ``UserError`` if ``z`` is no tensor or does not fit."""
        check_output(z)
        return self.connection(state, z)


def check_output(z: Any) -> None:
    """Raise a ``UserError`` if a sublayer returned something other than one tensor, as attention modules often do."""
    if not isinstance(z, Tensor):
        raise UserError(
            f"the sublayer returned a {type(z).__name__}, and a connection writes one tensor [..., D]; if that is its "
            "first element, wrap the sublayer: lambda x: sublayer(x)[0]"
        )


def has_hooks(*modules: nn.Module) -> bool:
    """Return whether a call of a module does more than its ``forward``; pre-hooks with ``only_reads`` do not count."""
    return any(
        any((m._forward_hooks, m._backward_hooks, m._backward_pre_hooks, "forward" in vars(m)))
        or any(not getattr(hook, "only_reads", False) for hook in m._forward_pre_hooks.values())
        for m in modules
    )


class Connections(nn.ModuleList):
    """The connections of one layer.

    A layer runs inside a call of this module, so that FSDP2 can shard the connections of a layer as one unit, with a
    dtype of its own: ``fully_shard(layer.connections)``, then ``fully_shard(layer)``.
    """

    def forward(self, state: Tensor, layer: Callable[[Tensor], Any]) -> Any:
        """Return ``layer(state)``; the layer uses the connections."""
        return layer(state)


def _without_autocast(state: Tensor) -> AbstractContextManager:
    """The routing is float32 also under autocast, which the meta device does not know."""
    return nullcontext() if state.is_meta else torch.autocast(state.device.type, enabled=False)


class Connection(StatesItsInitialValues):
    """One sublayer's connection to the over-width state (eq. 10), in plain PyTorch.

    A subclass computes the matrices, in :meth:`read_matrix` and :meth:`write_matrices`. :attr:`read` and :attr:`write`
    are submodules without parameters, for forward hooks.

    Args:
        geometry: ``(D, m, n)``.
        shapes: shapes of the weights, by name.
        frozen: keep the weights at their initial values, as buffers of the same names.
        backend: what runs the parts that have several, see :mod:`vwn.ops`.

    Raises:
        UserError: a ``backend`` that is unknown or that this kind of connection does not have.
    """

    read: Read
    """``read(state)``: the sublayer's input ``X = Åᵀ H'``."""
    write: Write
    """``write(state, z)``: the new state ``Bᵀ Z + Âᵀ H'``."""
    kind: ClassVar[str]
    """Name in the configuration's ``connection``."""
    dynamic: bool = True
    """True if the routing depends on the token."""
    sinkhorn_rounds: int = 0
    """Rounds of Sinkhorn's scaling that the carry takes."""
    learned_carry: bool = True
    """False if the carry is the identity."""

    def __init__(
        self, geometry: Geometry, shapes: dict[str, tuple[int, ...]], frozen: bool = False, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.geometry, self.shapes = geometry, shapes
        self.read, self.write = Read(), Write()
        self.set_backend(backend)
        for name, shape in shapes.items():
            if frozen:
                self.register_buffer(name, torch.empty(shape))
            else:
                self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.reset_parameters()

    @property
    def backends(self) -> tuple[str, ...]:
        """Names that :meth:`set_backend` takes."""
        return ("auto", "reference")

    @property
    def has_fused_write(self) -> bool:
        """True if ``ops.write`` with its ``weights`` reproduces this write (needed for ``keep_states_every``)."""
        return False

    def set_backend(self, backend: str) -> None:
        """Run on ``backend`` from now on; a ``UserError`` if this kind of connection does not have it."""
        if check_backend(backend) not in self.backends:
            names = " or ".join(map(repr, self.backends))
            raise UserError(f"backend {backend!r} does not run {self._title()}; use {names}")
        self.backend = backend

    def read_matrix(self, slots: Tensor) -> Tensor:
        """Compute ``Å``, ``[..., n, m]``, from slots ``[..., n, d]``, in their dtype; without ``...`` if static."""
        raise NotImplementedError

    def write_matrices(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Compute ``Â``, ``[..., n, n]``, and ``B``, ``[..., m, n]``; see :meth:`read_matrix`."""
        raise NotImplementedError

    def routing_matrices(self, state: Tensor) -> Routing:
        """Compute the matrices ``A`` and ``B`` for a state, in float32 whatever the model's dtype.

        For inspection: :attr:`read` and :attr:`write` compute what they need themselves.

        Args:
            state: over-width state, ``[..., D']``.

        Returns:
            ``A``: ``[..., n, m+n]`` and ``B``: ``[..., m, n]``; the same for every token when static.
        """
        with _without_autocast(state):
            slots = self._slots(state)
            read, (carry, beta) = self.read_matrix(slots), self.write_matrices(slots)
        read, carry, beta = (t.expand(*state.shape[:-1], *t.shape[-2:]) for t in (read, carry, beta))
        return Routing(torch.cat([read, carry], dim=-1), beta)

    def forward(
        self, state: Tensor, z: Tensor | Callable[[Tensor], Tensor] | None = None, norm: NormWeights | None = None
    ) -> Tensor:
        """Read, run the sublayer, write: ``[..., D'] -> [..., D']`` (eq. 10).

        Args:
            state: ``[..., D']``.
            z: the sublayer, ``[..., D] -> [..., D]``, with its own norm and without its residual add. :attr:`read`
                and :attr:`write` leave it out, or give the sublayer's output, for their part of it.
            norm: see :class:`Read`.

        Raises:
            UserError: shapes that do not fit, or a sublayer that does not return one tensor.
        """
        if z is None:
            return self._read(state, norm)
        return self.write(state, z(self.read(state))) if callable(z) else self._write(state, z)

    def _read(self, state: Tensor, norm: NormWeights | None = None) -> Tensor:
        state = state.to(state_dtype(state))
        with _without_autocast(state):
            slots = self._slots(state)
            x = read_slots(slots, self.read_matrix(slots)).to(state.dtype)  # X = Åᵀ H' (eq. 10)
            return x if norm is None else rms_norm(x, norm)

    def _write(self, state: Tensor, z: Tensor) -> Tensor:
        if z.shape != (*state.shape[:-1], self.geometry.hidden_size):
            wanted = (*state.shape[:-1], self.geometry.hidden_size)
            raise UserError(f"the sublayer's output must be {wanted} beside the state, got {tuple(z.shape)}")
        state = state.to(state_dtype(state))
        with _without_autocast(state):
            slots = self._slots(state)
            segments = z.to(state.dtype).unflatten(-1, (self.geometry.m, -1)).to(slots.dtype)
            carry, beta = self.write_matrices(slots)
            return write_slots(slots, segments, carry, beta).to(state.dtype)  # Bᵀ Z + Âᵀ H' (eq. 10)

    def write_read(
        self, state: Tensor, z: Tensor, following: Connection, norm: NormWeights | None = None
    ) -> tuple[Tensor, Tensor]:
        """Write, then run ``following.read`` on the new state; in one pass where nothing has hooks on either.

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
        """Return whether a read gains from taking on the sublayer's norm."""
        return False

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, Read | Write):  # not as a submodule; also for the copies that DataParallel puts in
            value.__dict__["connection"] = self

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
