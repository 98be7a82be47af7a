"""How a cluster's GPUs share the work: degrees of FSDP, replication, tensor and pipeline parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from vwn.cost.cluster.hardware import Cluster
from vwn.cost.cluster.options import PlanOptions
from vwn.cost.cluster.shape import ModelShape
from vwn.errors import UserError


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism, in the order of ranks: neighbours are of one tensor-parallel group, then of one FSDP
    group, then replicas (HSDP), and pipeline stages are the farthest apart, as torchtitan lays them out.

    Args:
        tp: ranks that share every matrix, and the sequence of the over-width state.
        fsdp: ranks that share one copy of the parameters, each with data of its own.
        replicas: such copies.
        pp: pipeline stages.
        micro_batches: that a step is made of, one after the other.
    """

    tp: int
    fsdp: int
    replicas: int
    pp: int
    micro_batches: int

    def stage_layers(self, layers: int) -> list[range]:
        """The layers of each stage; the first stages take what does not divide, for the last has the unembedding."""
        each, more = divmod(layers, self.pp)
        ends = [0]
        for stage in range(self.pp):
            ends.append(ends[-1] + each + (stage < more))
        return [range(a, b) for a, b in pairwise(ends)]

    @property
    def bubble(self) -> float:
        """Share of the step in which a stage waits (1F1B)."""
        return (self.pp - 1) / (self.micro_batches + self.pp - 1)


def make_layout(shape: ModelShape, cluster: Cluster, options: PlanOptions, tp: int, fsdp: int, pp: int) -> Layout:
    """The layout with these degrees.

    Raises:
        UserError: they do not fit the cluster, the model or the batch.
    """
    heads, kv_heads = shape.heads
    if kv_heads % tp or heads % tp:
        raise UserError(f"--tp {tp} does not divide the {kv_heads} key-value heads; take a divisor of {kv_heads}")
    if shape.window % tp:
        raise UserError(f"--tp {tp} does not divide the window of {shape.window}; it splits the sequence, so it must")
    if pp > len(shape.layers):
        raise UserError(f"--pp {pp} is more than the model's {len(shape.layers)} layers; lower it")
    if pp > 1 and shape.mtp:
        raise UserError(f"--pp {pp} does not go with MTP modules in the engine (torchtitan); take --pp 1 or --mtp 0")
    if cluster.gpus % (tp * fsdp * pp):
        raise UserError(
            f"--tp {tp} × --fsdp {fsdp} × --pp {pp} = {tp * fsdp * pp} does not divide the {cluster.gpus} GPUs"
        )
    replicas = cluster.gpus // (tp * fsdp * pp)
    at_once = fsdp * replicas * options.micro_batch * shape.window
    if options.batch_tokens % at_once:
        raise UserError(
            f"--batch-tokens {options.batch_tokens} is no multiple of the {at_once:,} tokens that {fsdp * replicas} "
            f"data-parallel ranks take at once ({options.micro_batch} × {shape.window} each); change one of them"
        )
    return Layout(tp, fsdp, replicas, pp, options.batch_tokens // at_once)


def layouts(shape: ModelShape, cluster: Cluster, options: PlanOptions) -> list[Layout]:
    """All layouts with the degrees asked for; those left open are tried, tensor parallelism inside a node only.

    Raises:
        UserError: there is none, with the reason of the one asked for or of the simplest.
    """
    found, reason = [], None
    for tp, pp, fsdp in _degrees(cluster, options):
        try:
            found.append(make_layout(shape, cluster, options, tp, fsdp, pp))
        except UserError as error:
            reason = reason or error
    if not found:
        raise reason or UserError(
            f"no layout has these degrees on {cluster.gpus} GPUs; leave --fsdp, --tp or --pp open"
        )
    return found


def _degrees(cluster: Cluster, options: PlanOptions) -> Iterator[tuple[int, int, int]]:
    for tp in [options.tp] if options.tp else _divisors(cluster.per_node):
        for pp in [options.pp] if options.pp else _divisors(cluster.gpus):
            rest = max(1, cluster.gpus // (tp * pp))
            for fsdp in [options.fsdp] if options.fsdp else reversed(_divisors(rest)):
                yield tp, pp, fsdp


def _divisors(number: int) -> list[int]:
    return [k for k in range(1, number + 1) if number % k == 0]
