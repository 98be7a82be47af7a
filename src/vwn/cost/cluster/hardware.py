"""GPUs and the links between them: a small table from the vendors' data sheets; a word or a JSON file for a cluster."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields, replace
from math import ceil, inf
from pathlib import Path
from typing import Any

from vwn.common.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """One GPU. 10^9 bytes are a GB."""

    memory_gb: float
    tflops: float
    """Peak of dense matrix products in bfloat16, 10^12 FLOP/s."""
    hbm_gb_s: float
    """Bandwidth of its memory."""
    intra_gb_s: float
    """Bandwidth to the other GPUs of its node, one way: half of what data sheets add up."""
    inter_gb_s: float
    """Its share of the bandwidth between nodes, one way: one network port each, as in the vendors' own nodes."""


# Dense bfloat16 without sparsity, from the data sheets of A100 SXM 80 GB, H100 SXM, H200 SXM, HGX B200 and Instinct
# MI300X; the network is that of DGX A100 (200 Gb/s ports), DGX H100, H200 and B200, and usual with MI300X (400 Gb/s).
GPUS = {
    "a100": Gpu(80, 312, 2039, 300, 25),
    "h100": Gpu(80, 989, 3350, 450, 50),
    "h200": Gpu(141, 989, 4800, 450, 50),
    "b200": Gpu(180, 2250, 7700, 900, 50),
    "mi300x": Gpu(192, 1307, 5300, 448, 50),
}


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal GPUs."""

    name: str
    gpu: Gpu
    per_node: int
    """GPUs that share a node's fast links."""
    nodes: int
    latency_us: float = 5.0
    """Microseconds of one hop of a message."""

    @property
    def gpus(self) -> int:
        """Number of GPUs in all nodes."""
        return self.per_node * self.nodes

    def seconds(self, data: float, size: int, stride: int, share: float, messages: float) -> float:
        """Return the time of some all-gathers or reduce-scatters, each a ring.

        A GPU receives ``(N - 1) / N`` of the data, a node what its members together lack, over their ports.

        Args:
            data: bytes, all collectives together, whole (not a GPU's share of them).
            size: GPUs in the group, ``N``.
            stride: distance of neighbours in the group, in ranks.
            share: of the nominal bandwidth that is reached.
            messages: collectives, each of which waits ``N - 1`` hops.
        """
        if size == 1:
            return 0.0
        members = min(size, max(1, self.per_node // stride))
        nodes = ceil(size / members)
        inside = data * (size - 1) / size / self.gpu.intra_gb_s if members > 1 else 0.0
        between = data * (nodes - 1) / nodes / (members * self.gpu.inter_gb_s)
        return max(inside, between) / (share * 1e9) + messages * (size - 1) * self.latency_us * 1e-6

    def hop_seconds(self, data: float, stride: int, share: float) -> float:
        """Return the time of sending ``data`` bytes to the GPU ``stride`` ranks away."""
        near = stride < self.per_node
        return data / ((self.gpu.intra_gb_s if near else self.gpu.inter_gb_s) * share * 1e9) + self.latency_us * 1e-6


def parse_cluster(text: str) -> Cluster:
    """Read a cluster from its word, ``KIND:GPUSxNODES``, or from a JSON file.

    The file has ``per_node``, ``nodes`` and either ``gpu``, a kind of the table, or all fields of :class:`Gpu`; single
    ones beside ``gpu`` replace the table's. ``name`` and ``latency_us`` are optional.

    Raises:
        UserError: a kind, field or value that does not exist.
    """
    if text.endswith(".json"):
        return _from_file(Path(text))
    kind, _, size = text.partition(":")
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size)
    if not found:
        raise UserError(
            f"--cluster is KIND:GPUSxNODES, such as h100:8x16 for 16 nodes of 8, or a .json file; got {text!r}"
        )
    return Cluster(kind, _known(kind), int(found[1]), int(found[2]))


def _known(kind: Any) -> Gpu:
    if kind not in GPUS:
        raise UserError(
            f"the GPU {kind!r} is not in the table ({', '.join(GPUS)}); describe the cluster in a .json file "
            "(docs/scale.md)"
        )
    return GPUS[kind]


def _from_file(path: Path) -> Cluster:
    try:
        content = dict(json.loads(path.read_text()))
        kind = content.pop("gpu", None)
        numbers = {f.name: content.pop(f.name) for f in fields(Gpu) if f.name in content}
        gpu = Gpu(**numbers) if kind is None else replace(_known(kind), **numbers)
        described: dict[str, Any] = {"name": kind or path.stem, "gpu": gpu} | content
        cluster = Cluster(**described)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read the cluster {path}: {error}; docs/scale.md shows one") from error
    for name in ("per_node", "nodes"):
        value = getattr(cluster, name)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{name} of the cluster {path} must be a whole number, 1 or more, got {value!r}")
    for name, value in {**vars(gpu), "latency_us": cluster.latency_us}.items():
        if not isinstance(value, int | float) or not 0 < value < inf:
            raise UserError(f"{name} of the cluster {path} must be a number above 0, got {value!r}")
    return cluster
