"""The bytes that one GPU of the busiest stage sends in a step; it receives as many."""

from __future__ import annotations

from dataclasses import dataclass

from vwn.cost.cluster.layout import Layout
from vwn.cost.cluster.memory import stage_weights
from vwn.cost.cluster.options import PlanOptions
from vwn.cost.cluster.shape import ModelShape


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind: ``data`` bytes in all, in ``messages`` calls in a group of ``size`` GPUs."""

    data: float
    messages: float
    size: int

    @property
    def sent(self) -> float:
        """Bytes that each GPU sends."""
        return self.data * (self.size - 1) / self.size


@dataclass(frozen=True)
class Traffic:
    """The collectives and messages of a step."""

    fsdp: Collective
    """All-gathers of parameters and reduce-scatters of gradients."""
    replicas: Collective
    """All-reduces of the gradients that are left, each a reduce-scatter and an all-gather."""
    tp: Collective
    """Around every sublayer ``D`` wide, at the table ``D'`` wide where that is direct, at the heads ``D`` wide."""
    boundary: float
    """Bytes of one micro-batch's state over a pipeline boundary, one way, from one GPU: ``r D / tp`` per token."""
    boundaries: int
    """Such messages that a GPU sends in a step."""

    @property
    def pipeline(self) -> float:
        """Bytes over boundaries."""
        return self.boundary * self.boundaries


def traffic(shape: ModelShape, layout: Layout, options: PlanOptions) -> Traffic:
    """Return the traffic of the stage with the most parameters and the most layers."""
    e, tp, m = options.bytes, layout.tp, layout.micro_batches
    tokens, width = options.micro_batch * shape.window, shape.geometry.hidden_size
    stages = [stage_weights(shape, layout, stage) for stage in range(layout.pp)]
    groups = max(stages, key=lambda groups: sum(w.on_rank(tp) for w in groups))
    held = sum(w.on_rank(tp) for w in groups)
    # A pipeline keeps its parameters gathered and reduces once; else both are done for every micro-batch.
    gathers, reduces = (1, 1) if layout.pp > 1 else (2 * m, m)
    layers = max(len(x) for x in layout.stage_layers(len(shape.layers))) + len(shape.mtp)
    around = 4 + {"none": 4, "selective": 6, "full": 8}[options.checkpointing]  # of the forward, and of the backward
    at_table = 2 * (shape.ratio if shape.direct else 1)
    at_heads = 2 * (1 + len(shape.mtp))
    inner = layers * around + (at_table + at_heads if layout.pp == 1 else max(at_table, at_heads))
    return Traffic(
        fsdp=Collective(
            held * (gathers * e.compute + reduces * e.reduce), len(groups) * (gathers + reduces), layout.fsdp
        ),
        replicas=Collective(2 * held / layout.fsdp * e.reduce * reduces, 2 * len(groups) * reduces, layout.replicas),
        tp=Collective(tokens * m * inner * width * e.compute, m * (layers * around + 4), tp),
        boundary=tokens * shape.ratio * width * e.compute / tp if layout.pp > 1 else 0.0,
        boundaries=m * min(2, 2 * (layout.pp - 1)),
    )
