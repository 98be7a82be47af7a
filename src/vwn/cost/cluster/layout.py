"""Layouts of a model on a cluster: degrees of FSDP, replication, tensor and pipeline parallelism."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from vwn.common.errors import UserError
from vwn.cost.cluster.hardware import Cluster
from vwn.cost.cluster.options import PlanOptions
from vwn.cost.cluster.shape import ModelShape


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism, in torchtitan's order of ranks: neighbours share a tensor-parallel group, then an FSDP
    group, then are replicas (HSDP); pipeline stages are the farthest apart."""

    tp: int
    """Ranks that share every matrix, and the sequence of the over-width state."""
    fsdp: int
    """Ranks that share one copy of the parameters, each with its own data."""
    replicas: int
    """Copies of the parameters."""
    pp: int
    """Pipeline stages."""
    micro_batches: int
    """Micro-batches of a step, one after the other."""

    def stage_layers(self, layers: int) -> list[range]:
        """The layers of each stage; the first stages take what does not divide, for the last has the unembedding."""
        each, more = divmod(layers, self.pp)
        starts = [stage * each + min(stage, more) for stage in range(self.pp + 1)]
        return [range(a, b) for a, b in pairwise(starts)]

    @property
    def bubble(self) -> float:
        """Share of the step in which a stage waits (1F1B)."""
        return (self.pp - 1) / (self.micro_batches + self.pp - 1)


def make_layout(shape: ModelShape, cluster: Cluster, options: PlanOptions, tp: int, fsdp: int, pp: int) -> Layout:
    """Return the layout with these degrees.

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
    for tp in [options.tp] if options.tp else _divisors(cluster.per_node):
        for pp in [options.pp] if options.pp else _divisors(cluster.gpus):
            rest = max(1, cluster.gpus // (tp * pp))
            for fsdp in [options.fsdp] if options.fsdp else reversed(_divisors(rest)):
                try:
                    found.append(make_layout(shape, cluster, options, tp, fsdp, pp))
                except UserError as error:
                    reason = reason or error
    if not found:
        assert reason is not None  # every list of divisors has a 1
        raise reason
    return found


def _divisors(number: int) -> list[int]:
    return [k for k in range(1, number + 1) if number % k == 0]
