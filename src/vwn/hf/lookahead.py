"""Per-forward state: the read computed ahead for the next layer, and how to rebuild dropped states.

The write of one sublayer and the read of the next are one pass over the state, also where the next sublayer belongs to
the next layer. Between layers transformers hands on the state alone, so what was read for the next layer waits here,
and so does what is needed to rebuild states that are not kept for the backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vwn import ops
from vwn.nn.connection import Connection, has_hooks
from vwn.nn.generalized import GeneralizedHyperConnection
from vwn.ops import NormWeights, RoutingWeights


class Reader(NamedTuple):
    """The sublayer that reads next: its connection, and its own norm if that is to be fused into the read."""

    connection: Connection
    norm: NormWeights | None = None


class Lookahead:
    """Reads and writes of one forward pass.

    Args:
        layers: of the backbone, in the order in which they run.
        keep_every: keep one over-width state in this many for the backward and rebuild the others from it.
    """

    def __init__(self, layers: Sequence[Any] = (), keep_every: int = 1) -> None:
        self._layers, self._position, self._compiling = list(layers), 0, torch.compiler.is_compiling()
        self.keep_every, self.used = keep_every, False
        self._read_ahead: tuple[Tensor, int | None, Reader, bool, Tensor] | None = None
        self._last: tuple[Tensor, int | None, Unchanged | Rebuilt] | None = None
        self._writes = 0  # since the first state

    def after(self, layer: Any) -> Any:
        """Return the layer that runs after ``layer``, or ``None``: it is the last, or not itself among the layers."""
        if torch.compiler.is_compiling() and not self._compiling:
            return None  # layers compiled one by one share a graph only if none knows the next
        for i in range(self._position, len(self._layers) - 1):
            if self._layers[i] is layer:
                self._position = i + 1
                return self._layers[i + 1]
        return None

    def read(self, state: Tensor, reader: Reader) -> Tensor:
        """Read for ``reader``, ``[..., D'] -> [..., D]``, or return what the last write has read for it."""
        self.used = True
        ahead, self._read_ahead = self._read_ahead, None
        if ahead is not None:
            written, version, made_for, with_grad, x = ahead
            same_reader = made_for.connection is reader.connection and (made_for.norm is None) == (reader.norm is None)
            same_state = written is state and version == _version(state)
            if same_state and same_reader and with_grad == torch.is_grad_enabled():
                return x
        with self._saving(state):
            return reader.connection.read(state, reader.norm)

    def write_read(self, state: Tensor, z: Tensor, connection: Connection, reader: Reader) -> tuple[Tensor, Tensor]:
        """Write ``z`` and read for ``reader``: the new state ``[..., D']`` and ``[..., D]``."""
        with self._saving(state):
            new, x = connection.write_read(state, z, reader.connection, reader.norm)
        self._note(state, z, connection, new)
        return new, x

    def write(self, state: Tensor, z: Tensor, connection: Connection, ahead: Reader | None = None) -> Tensor:
        """Write ``z``: the new state ``[..., D']``. With ``ahead``, read for that layer as well and keep it for it."""
        if ahead is not None:
            new, x = self.write_read(state, z, connection, ahead)
            self._read_ahead = new, _version(new), ahead, torch.is_grad_enabled(), x
            return new
        with self._saving(state):
            new = connection.write(state, z)
        self._note(state, z, connection, new)
        return new

    def _note(self, state: Tensor, z: Tensor, connection: Connection, new: Tensor) -> None:
        if self.keep_every > 1 and torch.is_grad_enabled():
            assert isinstance(connection, GeneralizedHyperConnection)
            before, self._writes = self._kept(state), self._writes + 1
            if self._writes % self.keep_every and not has_hooks(connection, connection.write):  # which may change it
                self._last = new, _version(new), Rebuilt(before, z.detach(), connection)
            else:
                self._last = new, _version(new), Unchanged(new.detach())

    def _kept(self, state: Tensor) -> Unchanged | Rebuilt:
        last = self._last
        if last is None or last[0] is not state or last[1] != _version(state):  # the first, or changed by somebody
            self._writes = 0
            last = self._last = state, _version(state), Unchanged(state.detach())
        return last[2]

    def _saving(self, state: Tensor) -> AbstractContextManager[Any]:
        """Have the op save how to rebuild ``state`` instead of the state."""
        if self.keep_every == 1 or not torch.is_grad_enabled():
            return nullcontext()
        kept, address, shape = self._kept(state), state.data_ptr(), state.shape

        def pack(t: Tensor) -> Unchanged | Rebuilt:
            if t.data_ptr() != address or t.shape != shape:
                return Unchanged(t)
            kept.uses += 1
            return kept

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.take())


class Unchanged:
    """A tensor that must still be as it was: hooks on what autograd saves switch off its own check."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version, self.uses = tensor, tensor._version, 0

    def take(self) -> Tensor:
        """Return the tensor; a ``RuntimeError`` if it was changed in place."""
        if self._tensor._version != self._version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self._tensor.shape)} that the backward needs was changed in place"
            )
        return self._tensor

    state = take


class Rebuilt:
    """A state ``[..., D']`` that is rebuilt: from the one before, a sublayer's output ``z`` and the connection."""

    def __init__(self, before: Unchanged | Rebuilt, z: Tensor, connection: GeneralizedHyperConnection) -> None:
        self._before, self._z, self._backend = before, Unchanged(z), connection.backend
        self._weights = [Unchanged(w) if isinstance(w, Tensor) else w for w in connection.weights]
        self._rebuilt: Tensor | None = None
        self.uses = 0
        """Nodes of the graph that will :meth:`take` it."""

    def take(self) -> Tensor:
        """Return the state; once all who need it have it, it is let go."""
        state = self.state()
        self.uses -= 1
        if self.uses <= 0:
            self._rebuilt = None
        return state

    def state(self) -> Tensor:
        """Return the state, rebuilt if it was let go."""
        if self._rebuilt is None:
            taken: Any = (w.take() if isinstance(w, Unchanged) else w for w in self._weights)
            with torch.no_grad():
                self._rebuilt = ops.write(self._before.state(), self._z.take(), RoutingWeights(*taken), self._backend)
        return self._rebuilt


def can_read_ahead(layer: Any, following: Any) -> bool:
    """Return whether ``layer`` may read for ``following``: with its parameters, outside its ``forward``.

    Not where a layer is recomputed on its own (gradient checkpointing), and not where the parameters are elsewhere
    until that layer runs: sharded (FSDP, ZeRO) or on another device; not where hooks look at the read, and not past a
    hook whose changes in place would not be counted. The bits are the same either way.
    """
    uncounted = torch.compiler.is_compiling() or torch.is_inference_mode_enabled()
    if uncounted and (layer._forward_hooks or following._forward_pre_hooks):
        return False
    if any(getattr(x, "gradient_checkpointing", False) and x.training for x in (layer, following)):
        return False
    first = following.connections[0]
    if has_hooks(first, first.read):
        return False
    return keeps_its_weights(following) and _first_weight(layer).device == _first_weight(following).device


def keeps_its_weights(layer: Any) -> bool:
    """Return whether a layer's weights are there outside its ``forward``: not sharded by FSDP or ZeRO."""
    weight, shape = _first_weight(layer), next(iter(layer.connections[0].shapes.values()))
    sharded = hasattr(layer, "unshard") or hasattr(weight, "device_mesh") or hasattr(weight, "ds_id")
    return not sharded and weight.shape == shape


def _first_weight(layer: Any) -> Tensor:
    connection = layer.connections[0]
    return getattr(connection, next(iter(connection.shapes)))


def _version(state: Tensor) -> int | None:
    """Count changes in place, which a hook may have made; what is compiled or in inference mode does not count."""
    return None if torch.compiler.is_compiling() or state.is_inference() else state._version
