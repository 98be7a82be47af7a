"""Bytes that a GPU sends in a step, and the step's time by a roofline.

On the slowest stage a micro-batch takes the matrix products at a share of the peak, the connections at the slower of
their arithmetic and their bytes, and the tensor-parallel messages, which nothing hides.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from vwn.cost.cluster.hardware import Cluster
from vwn.cost.cluster.layout import Layout
from vwn.cost.cluster.memory import stage_weights
from vwn.cost.cluster.options import PlanOptions
from vwn.cost.cluster.shape import ModelShape
from vwn.cost.connection import BYTES_PER_ELEMENT


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind in a step: ``data`` bytes in all, in ``messages`` calls, among ``size`` GPUs."""

    data: float
    messages: float
    size: int

    @property
    def sent(self) -> float:
        """Bytes that each GPU sends; it receives as many."""
        return self.data * (self.size - 1) / self.size


@dataclass(frozen=True)
class Traffic:
    """Communication of a step, of the stage with the most parameters and the most layers."""

    fsdp: Collective
    """All-gathers of parameters and reduce-scatters of gradients."""
    replicas: Collective
    """All-reduces of the sharded gradients over the replicas, each a reduce-scatter and an all-gather."""
    tp: Collective
    """Around every sublayer ``D`` wide, at a direct table ``D'`` wide, at the heads ``D`` wide."""
    boundary: float
    """Bytes of one micro-batch's state over a stage boundary, one way, from one GPU: ``r D / tp`` per token."""
    boundaries: int
    """Such messages that a GPU sends in a step."""

    @property
    def pipeline(self) -> float:
        """Bytes that a GPU sends over stage boundaries in a step."""
        return self.boundary * self.boundaries


def traffic(shape: ModelShape, layout: Layout, options: PlanOptions) -> Traffic:
    """Count the bytes and messages of a step."""
    e, tp, m = options.bytes, layout.tp, layout.micro_batches
    tokens, width = options.micro_batch * shape.window, shape.geometry.hidden_size
    held, groups = max(
        (sum(w.on_rank(tp) for w in groups), len(groups))
        for groups in (stage_weights(shape, layout, stage) for stage in range(layout.pp))
    )
    # A pipeline keeps its parameters gathered and reduces once; else both are done for every micro-batch.
    gathers, reduces = (1, 1) if layout.pp > 1 else (2 * m, m)
    layers = max(len(x) for x in layout.stage_layers(len(shape.layers))) + len(shape.mtp)
    per_layer = 4 + {"none": 4, "selective": 6, "full": 8}[options.checkpointing]  # forward and backward
    at_table = 2 * (shape.ratio if shape.direct else 1)
    at_heads = 2 * (1 + len(shape.mtp))
    inner = layers * per_layer + (at_table + at_heads if layout.pp == 1 else max(at_table, at_heads))
    return Traffic(
        fsdp=Collective(held * (gathers * e.compute + reduces * e.reduce), groups * (gathers + reduces), layout.fsdp),
        replicas=Collective(2 * held / layout.fsdp * e.reduce * reduces, 2 * groups * reduces, layout.replicas),
        tp=Collective(tokens * m * inner * width * e.compute, m * (layers * per_layer + 4), tp),
        boundary=tokens * shape.ratio * width * e.compute / tp if layout.pp > 1 else 0.0,
        boundaries=m * min(2, 2 * (layout.pp - 1)),
    )


@dataclass(frozen=True)
class StepTime:
    """Seconds; the parts add up to the step."""

    compute: float
    """Matrix products and attention."""
    connections: float
    tp: float
    bubble: float
    pipeline: float
    """Transfers over stage boundaries that nothing hides."""
    fsdp: float
    """Gathering and reducing beyond what computing hides."""
    optimizer: float

    @property
    def step(self) -> float:
        """Seconds of the whole step."""
        return sum(asdict(self).values())


def step_time(shape: ModelShape, layout: Layout, cluster: Cluster, options: PlanOptions, sent: Traffic) -> StepTime:
    """Estimate the time of a step in parts."""
    m, share = layout.micro_batches, options.bandwidth_share
    tokens = options.micro_batch * shape.window / layout.tp * m
    compute, connections = (tokens * x for x in _seconds_per_token(shape, layout, cluster, options))
    tp = cluster.seconds(sent.tp.data, layout.tp, 1, share, sent.tp.messages)
    busy = compute + connections + tp
    hop = cluster.hop_seconds(sent.boundary, layout.tp * layout.fsdp * layout.replicas, share) if layout.pp > 1 else 0.0
    # The first micro-batch crosses every boundary and back, unhidden; of the others each hop beyond the overlap counts.
    pipeline = 2 * (layout.pp - 1) * hop + m * max(0.0, 2 * hop - options.overlap * busy / m)
    reducing = cluster.seconds(sent.fsdp.data, layout.fsdp, layout.tp, share, sent.fsdp.messages)
    across = layout.tp * layout.fsdp
    reducing += cluster.seconds(sent.replicas.data, layout.replicas, across, share, sent.replicas.messages)
    held = max(sum(w.on_rank(layout.tp) for w in stage_weights(shape, layout, s)) for s in range(layout.pp))
    moved = 3 * options.bytes.store + 2 * options.optimizer_bytes  # parameter, gradient and state in; two of them out
    return StepTime(
        compute=compute,
        connections=connections,
        tp=tp,
        bubble=(layout.pp - 1) / m * busy,
        pipeline=pipeline,
        fsdp=max(0.0, reducing - options.overlap * (compute + connections)),
        optimizer=held / layout.fsdp * moved / (cluster.gpu.hbm_gb_s * share * 1e9),
    )


def _seconds_per_token(
    shape: ModelShape, layout: Layout, cluster: Cluster, options: PlanOptions
) -> tuple[float, float]:
    """Seconds of computing and of connections on the slowest stage: forward, backward and what runs again."""
    flops, connection, depth = shape.cost.flops, shape.cost.connection, len(shape.layers) + len(shape.mtp)
    peak = cluster.gpu.tflops * 1e12 * options.efficiency
    passes = 4 if options.checkpointing == "full" else 3  # a backward is two forwards
    connections = 0.0  # seconds in a layer, whose two connections are joined in the middle, not to other layers
    if connection is not None:
        t, e, width = connection.traffic, options.bytes.compute / BYTES_PER_ELEMENT, shape.geometry.hidden_size
        moved = e * (t.forward_fused + t.forward_separate) * (passes - 2)
        moved += e * (t.backward_fused + t.backward_separate)
        if options.checkpointing == "selective":  # what was read is read again
            moved += options.bytes.compute * 2 * width * (shape.ratio + 1)
        rebuilt_writes = 2 * (1 - 1 / options.keep_states_every)
        moved += options.bytes.compute * rebuilt_writes * width * (2 * shape.ratio + 1)
        memory = cluster.gpu.hbm_gb_s * 1e9 * options.bandwidth_share
        connections = max(flops.connections / depth * passes / peak, moved / memory)
    slowest = (0.0, 0.0)
    for stage, layers in enumerate(layout.stage_layers(len(shape.layers))):
        count, ends = len(layers), flops.embedding if stage == 0 else 0
        if stage == layout.pp - 1:
            count += len(shape.mtp)
            ends += flops.reduce + flops.mtp_fuse + flops.unembedding
        seconds = (count * flops.layers / depth * passes + 3 * ends) / peak
        slowest = max(slowest, (seconds, count * connections), key=sum)
    return slowest
