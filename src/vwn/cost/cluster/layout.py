"""Clusters, and layouts of a model on them: degrees of FSDP, replication and tensor parallelism."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vwn.common.errors import UserError
from vwn.cost.cluster.options import PlanOptions
from vwn.cost.cluster.shape import ModelShape

GPUS = {"a100": 80, "h100": 80, "h200": 141, "b200": 180, "mi300x": 192}
"""Memory by kind of GPU, in 10^9 bytes, from the vendors' data sheets."""


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal GPUs."""

    name: str
    memory_gb: float
    """Memory of a GPU, in 10^9 bytes."""
    per_node: int
    """GPUs in a node."""
    nodes: int

    @property
    def gpus(self) -> int:
        """Number of GPUs in all nodes."""
        return self.per_node * self.nodes


def parse_cluster(text: str) -> Cluster:
    """Read a cluster from ``KIND:GPUSxNODES``, where the kind is one of :data:`GPUS` or a memory such as ``24gb``.

    Raises:
        UserError: another form, or a kind that is not known.
    """
    found = re.fullmatch(r"(\w+):([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise UserError(f"--cluster is KIND:GPUSxNODES, such as h100:8x16 for 16 nodes of 8; got {text!r}")
    kind, per_node, nodes = found[1], int(found[2]), int(found[3])
    own = re.fullmatch(r"([1-9]\d*)gb", kind)
    if not own and kind not in GPUS:
        raise UserError(f"the GPU {kind!r} is not known ({', '.join(GPUS)}); give its memory, as in 24gb:8x2")
    return Cluster(kind, int(own[1]) if own else GPUS[kind], per_node, nodes)


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism; tensor parallelism stays inside a node."""

    tp: int
    """Ranks that share every matrix, and the sequence of the over-width state."""
    fsdp: int
    """Ranks that share one copy of the parameters, each with its own data."""
    replicas: int
    """Copies of the parameters (HSDP)."""


def make_layout(shape: ModelShape, cluster: Cluster, options: PlanOptions) -> Layout:
    """Return the layout with the degrees asked for.

    Raises:
        UserError: they do not fit the cluster or the model.
    """
    tp, (heads, kv_heads) = options.tp, shape.heads
    if kv_heads % tp or heads % tp:
        raise UserError(f"--tp {tp} does not divide the {kv_heads} key-value heads; take a divisor of {kv_heads}")
    if shape.window % tp:
        raise UserError(f"--tp {tp} does not divide the window of {shape.window}; it splits the sequence, so it must")
    if cluster.per_node % tp:
        raise UserError(f"--tp {tp} does not divide the {cluster.per_node} GPUs of a node, whose fast links it needs")
    ranks = cluster.gpus // tp
    fsdp = options.fsdp or ranks
    if ranks % fsdp:
        raise UserError(f"--tp {tp} × --fsdp {fsdp} = {tp * fsdp} does not divide the {cluster.gpus} GPUs")
    return Layout(tp, fsdp, ranks // fsdp)
