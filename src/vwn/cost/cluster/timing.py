"""The time of a step, estimated by a roofline.

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
from vwn.cost.cluster.traffic import Traffic


@dataclass(frozen=True)
class StepTime:
    """Seconds; the parts add up to the step."""

    compute: float
    """Matrix products and attention."""
    connections: float
    tp: float
    bubble: float
    pipeline: float
    """Transfers over boundaries that nothing hides."""
    fsdp: float
    """Gathering and reducing beyond what computing hides."""
    optimizer: float

    @property
    def step(self) -> float:
        """The sum."""
        return sum(asdict(self).values())


def step_time(shape: ModelShape, layout: Layout, cluster: Cluster, options: PlanOptions, sent: Traffic) -> StepTime:
    """Estimate the parts of a step."""
    m, share = layout.micro_batches, options.bandwidth_share
    tokens = options.micro_batch * shape.window / layout.tp * m
    compute, connections = (tokens * x for x in _per_token(shape, layout, cluster, options))
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


def _per_token(shape: ModelShape, layout: Layout, cluster: Cluster, options: PlanOptions) -> tuple[float, float]:
    """Seconds per token of the slowest stage: computing, connections; forward, backward and what runs again."""
    peak = cluster.gpu.tflops * 1e12 * options.efficiency
    memory = cluster.gpu.hbm_gb_s * 1e9 * options.bandwidth_share
    again = options.checkpointing == "full"
    slowest = (0.0, 0.0)
    for stage, layers in enumerate(layout.stage_layers(len(shape.layers))):
        last = stage == layout.pp - 1
        count = len(layers) + (len(shape.mtp) if last else 0)
        flops = count * shape.layer_flops * (4 if again else 3)
        flops += 3 * ((shape.first_flops if stage == 0 else 0) + (shape.last_flops if last else 0))
        forward, backward = shape.connection_traffic
        if options.checkpointing == "selective":  # what was read is read again
            backward += 2 * shape.geometry.hidden_size * (shape.ratio + 1) * shape.widened
        elements = forward * (2 if again else 1) + backward
        rebuilt = 2 * (1 - 1 / options.keep_states_every) * shape.widened  # writes
        elements += rebuilt * shape.geometry.hidden_size * (2 * shape.ratio + 1)
        arithmetic = count * shape.connection_flops * (4 if again else 3) / peak
        moving = count * elements * options.bytes.compute / memory
        slowest = max(slowest, (flops / peak, max(arithmetic, moving)), key=sum)
    return slowest
