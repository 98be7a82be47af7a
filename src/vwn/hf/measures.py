"""Measures of the routing matrices, summed up batch by batch, and the forward pass that they are taken in.

Shapes: ``T`` tokens, ``n`` slots, ``m`` segments, ``d = D / m`` segment width, ``L`` sublayers. All in the dtype of the
routing: float32, or float64 for a float64 model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from vwn.hf import VirtualWidthForCausalLM
from vwn.nn.connection import Connection, Routing

SATURATED = 0.99
DYNAMIC = ("dynamic_alpha", "dynamic_beta", "pre_weight", "post_weight", "res_weight")
"""Weights of any kind of connection that the token's state is multiplied with."""


class DepthMap:
    """Share of every source that reaches every reader, averaged over tokens: the terms of eq. 17.

    The readers are the sublayers and, last, the final state; the sources are the embedding ``H'_0`` and the sublayers.
    """

    def __init__(self, sublayers: int) -> None:
        size = sublayers + 1
        self._gain = torch.zeros(size, size, dtype=torch.float64)
        self._carried = torch.zeros(size, size, dtype=torch.float64)
        self._read = torch.zeros(size, dtype=torch.float64)
        self._tokens = 0
        self._sources: list[Tensor] = []  # of one batch: H'_0, Z_1, ...: [T, n, d], then [T, m, d]
        self._paths: list[Tensor] = []  # (Â_1 ⋯ Â_l)ᵀ, then (Â_{t+1} ⋯ Â_l)ᵀ B_tᵀ: [T, n, n], then [T, n, m]
        self.unrolled_error = 0.0
        """The final state against the sum of eq. 17, relative, of the batch where they differ most."""

    def add(self, state: Tensor, z: Tensor, parts: dict[str, Tensor]) -> None:
        """Count what reaches the next sublayer, and go on by it.

        Args:
            state: that it reads, ``[T, n, d]``.
            z: its output, ``[T, m, d]``.
            parts: its routing, see :func:`split`.
        """
        if not self._sources:
            n = state.shape[-2]
            self._sources = [state]
            self._paths = [torch.eye(n, dtype=state.dtype, device=state.device).expand(state.shape[0], n, n)]
        self._count((parts["read"].mT @ path for path in self._paths), parts["read"].mT @ state)
        self._paths = [parts["carry"].mT @ path for path in self._paths] + [parts["write"].mT]  # products in eq. 17
        self._sources.append(z)

    def finish(self, state: Tensor) -> None:
        """Count what reaches the final state of a batch, ``[T, n, d]``, which is looked at as it is."""
        error = torch.linalg.vector_norm(self._count(self._paths, state) - state) / torch.linalg.vector_norm(state)
        self.unrolled_error = float(torch.maximum(error, error.new_tensor(self.unrolled_error)))  # keeps NaN
        self._tokens += state.shape[0]
        self._sources = []

    def _count(self, paths: Iterable[Tensor], x: Tensor) -> Tensor:
        """Count one reader, by the paths from all sources to what it reads, ``x``; return the sum of what arrives."""
        reader, total = len(self._sources) - 1, torch.zeros_like(x)
        for source, (path, z) in enumerate(zip(paths, self._sources, strict=True)):
            # ‖path‖_F / √rows: the RMS that arrives of a source of independent numbers of RMS 1
            self._gain[reader, source] += path.square().sum((-2, -1)).div(path.shape[-2]).sqrt().double().sum().cpu()
            arrived = path @ z
            self._carried[reader, source] += arrived.square().double().mean((-2, -1)).sum().cpu()
            total += arrived
        self._read[reader] += x.square().double().mean((-2, -1)).sum().cpu()
        return total

    def result(self) -> dict[str, Any]:
        """Return ``gain`` and ``carried``, a row for each reader and a number for each source before it."""
        carried = (self._carried / self._read[:, None]).sqrt()
        return {
            "gain": [row[: i + 1].tolist() for i, row in enumerate(self._gain / self._tokens)],
            "carried": [row[: i + 1].tolist() for i, row in enumerate(carried)],
            "input_rms": (self._read / self._tokens).sqrt().tolist(),
            "unrolled_error": self.unrolled_error,
        }


class SublayerStatistics:
    """Spectrum of the carry, use of the slots, static and dynamic part of one sublayer's routing."""

    def __init__(self) -> None:
        self._radii: list[Tensor] = []
        self._slots: dict[str, Tensor] = {}
        self._parts: dict[str, dict[str, Tensor]] = {}
        self._static: dict[str, Tensor] = {}
        self._tokens = 0

    def add(self, state: Tensor, routing: Routing, static: Routing, scales: dict[str, Tensor]) -> None:
        """Count some tokens: the states ``[T, n, d]`` that the sublayer reads and the routing of these.

        Args:
            static: routing without the dynamic part, ``[1, n, m+n]`` and ``[1, m, n]``.
            scales: ``S`` of each part whose dynamic part is ``S ∘ tanh(…)``.
        """
        parts, self._static = split(routing), split(static)
        self._tokens += state.shape[0]
        self._radii.append(spectral_radius(parts["carry"]))
        slots = {
            "read": parts["read"].norm(dim=-1),
            "written": parts["write"].norm(dim=-2),
            "kept": parts["carry"].diagonal(dim1=-2, dim2=-1),
            "rms": state.square().mean(-1),
        }
        for name, value in slots.items():
            self._slots[name] = self._slots.get(name, 0) + value.double().sum(0)
        for name, part in parts.items():
            dynamic = (part - self._static[name]).double()
            found = {"sum": dynamic, "square": dynamic.square()}
            if name in scales:
                found["saturated"] = (dynamic.abs() > SATURATED * scales[name].abs()).double()
            sums = self._parts.setdefault(name, {})
            sums.update({what: sums.get(what, 0) + value.sum(0) for what, value in found.items()})

    def result(self) -> dict[str, Any]:
        """Return ``spectral_radius``, ``slots`` (a number each), and ``routing`` of read, carry and write."""
        radii = torch.cat(self._radii).double()
        low, high = torch.quantile(radii, torch.tensor([0.05, 0.95], dtype=radii.dtype)).tolist()
        slots = {name: value / self._tokens for name, value in self._slots.items()}
        slots["rms"] = slots["rms"].sqrt()
        routing: dict[str, Any] = {}
        for name, sums in self._parts.items():
            mean, square = sums["sum"] / self._tokens, sums["square"] / self._tokens
            routing[name] = {
                "static": float(self._static[name].double().square().mean().sqrt()),
                "dynamic": float(square.mean().sqrt()),
                "varying": float((square - mean.square()).clamp(min=0).mean().sqrt()),
                "saturated": float(sums["saturated"].mean()) / self._tokens if "saturated" in sums else None,
            }
        return {
            "spectral_radius": {"mean": float(radii.mean()), "low": low, "high": high},
            "slots": {name: value.tolist() for name, value in slots.items()},
            "routing": routing,
        }


def split(routing: Routing) -> dict[str, Tensor]:
    """Return ``read``: ``Å`` ``[..., n, m]``, ``carry``: ``Â`` ``[..., n, n]``, ``write``: ``B`` ``[..., m, n]``."""
    m = routing.beta.shape[-2]
    return {"read": routing.alpha[..., :m], "carry": routing.alpha[..., m:], "write": routing.beta}


def spectral_radius(carry: Tensor) -> Tensor:
    """Compute the largest absolute eigenvalue, ``[T, n, n] -> [T]``, on the CPU; once if all matrices are the same."""
    carry = carry.cpu()
    if bool((carry == carry[:1]).all()):
        return torch.linalg.eigvals(carry[:1]).abs().amax(-1).expand(carry.shape[0])
    return torch.linalg.eigvals(carry).abs().amax(-1)


def static_routing(connection: Connection, state: Tensor) -> Routing:
    """Return the matrices with dynamic weights at zero, for one token: ``[1, n, m+n]`` and ``[1, m, n]``."""
    twin = deepcopy(connection)
    for name in DYNAMIC:
        if name in twin.shapes:
            getattr(twin, name).data.zero_()
    return twin.routing_matrices(state[:1])


def tanh_scales(connection: Connection) -> dict[str, Tensor]:
    """Return ``S`` of each part of the routing that is ``S ∘ tanh(…)`` + static (eqs. 13-14); empty if none is."""
    if "scale_alpha" not in connection.shapes:
        return {}
    m, n = connection.geometry.m, connection.geometry.n
    alpha, beta = (getattr(connection, name).detach() for name in ("scale_alpha", "scale_beta"))
    alpha = alpha if alpha.ndim == 2 else alpha.expand(n, m + n)  # Hyper-Connections have one number for each matrix
    scales = {"read": alpha[:, :m], "carry": alpha[:, m:], "write": beta.expand(m, n)}
    if getattr(connection, "carry_constraint", "none") != "none":
        del scales["carry"]
    return scales


@torch.no_grad()
def record(
    model: VirtualWidthForCausalLM, ids: Tensor, visit: Callable[[int, Tensor, Tensor, Connection], None]
) -> Tensor:
    """Run a model and show every sublayer of its backbone; MTP modules do not run.

    Args:
        model: with virtual width, in evaluation mode.
        ids: tokens, ``[B, S]``.
        visit: called with the number of the sublayer (from 0), the state that it read, ``[B, S, D']``, its output
            ``Z``, ``[B, S, D]``, and its connection.

    Returns:
        the final state, ``[B, S, D']``.
    """
    connections = [connection for layer in model.model.layers for connection in layer.connections]

    def hook(i: int) -> Any:
        return lambda _, given, __: visit(i, given[0], given[1], connections[i])

    hooks = [connection.write.register_forward_hook(hook(i)) for i, connection in enumerate(connections)]
    try:  # the whole model, so that what shards it gathers its weights
        return model(ids, use_cache=False, output_over_width_state=True, logits_to_keep=1).over_width_state
    finally:
        for handle in hooks:
            handle.remove()


def sublayer_names(model: VirtualWidthForCausalLM) -> list[str]:
    """Return ``attn 1, mlp 1, attn 2, ...``, in the order in which they run."""
    layers = enumerate(model.model.layers, 1)
    return [f"{name.removeprefix('self_')} {number}" for number, layer in layers for name in layer.layout.names]
