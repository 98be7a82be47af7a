"""Plans: the memory a model needs on a cluster, whether it fits, and what to change if not."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from vwn.cost.cluster.memory import Memory, ParallelLayout, make_layout, memory
from vwn.cost.cluster.options import Cluster, PlanOptions
from vwn.cost.cluster.shape import ModelShape, model_shape
from vwn.cost.table import align, count

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

USABLE = 0.92
"""Share of a GPU's memory for the run; the rest is for the driver, communication and fragmentation."""
_REMEDIES = {
    "state": "a larger --fsdp, or more GPUs",
    "buffers": "a larger --tp, or embedding=factorised for a wide table",
    "activations": "--checkpointing full, --keep-states-every, a smaller --micro-batch or a larger --tp",
    "logits": "--fused-loss",
}


@dataclass(frozen=True)
class Plan:
    """The memory of one model on a cluster."""

    shape: ModelShape
    cluster: Cluster
    options: PlanOptions
    layout: ParallelLayout
    memory: Memory

    @property
    def usable(self) -> float:
        """Bytes of a GPU that the run may use."""
        return self.cluster.memory_gb * 1e9 * USABLE

    @property
    def fits(self) -> bool:
        """Return whether the run fits in the usable memory."""
        return self.memory.total <= self.usable

    @property
    def advice(self) -> str:
        """Return why the plan does not fit and what lowers the largest part; empty where it fits."""
        if self.fits:
            return ""
        m = self.memory
        largest = max(_REMEDIES, key=lambda name: getattr(m, name))
        return (
            f"{m.total / 1e9:.1f} GB of {self.usable / 1e9:.1f} usable, most for {largest} "
            f"({getattr(m, largest) / 1e9:.1f} GB); lower it by {_REMEDIES[largest]}"
        )


def plans(
    configs: Mapping[str, PreTrainedConfig], cluster: Cluster, options: PlanOptions, window: int
) -> dict[str, Plan]:
    """Plan the training of every model.

    Args:
        configs: name to config.
        cluster: to train on.
        options: of the run.
        window: tokens of a window.

    Raises:
        UserError: options out of range or that do not fit the cluster, or a model whose cost is not known.
    """
    options.check()
    found = {}
    for name, config in configs.items():
        shape = model_shape(config, window)
        layout = make_layout(shape, cluster, options)
        found[name] = Plan(shape, cluster, options, layout, memory(shape, layout, options))
    return found


def plan_rows(found: Mapping[str, Plan]) -> list[dict[str, Any]]:
    """Return plain numbers, in bytes, one dict for each plan."""
    return [
        {
            "name": name,
            "parameters": plan.shape.parameters,
            "r": plan.shape.ratio,
            "layout": asdict(plan.layout),
            "memory": asdict(plan.memory) | {"total": plan.memory.total, "usable": plan.usable},
            "fits": plan.fits,
            "advice": plan.advice or None,
        }
        for name, plan in found.items()
    ]


def plan_text(found: Mapping[str, Plan]) -> str:
    """Return what ``vwn cost --cluster`` prints, at most 110 columns wide."""
    rows, notes = [["GB per GPU", "params", *_REMEDIES, "total", "fits"]], []
    for name, plan in found.items():
        memory = [f"{getattr(plan.memory, part) / 1e9:.2f}" for part in (*_REMEDIES, "total")]
        rows.append([name, count(plan.shape.parameters), *memory, "yes" if plan.fits else "NO"])
        if not plan.fits:
            notes += textwrap.wrap(f"{name}: does not fit: {plan.advice}", 110, subsequent_indent="  ")
    c, o, x = plan.cluster, plan.options, plan.layout
    heading = [
        f"{c.gpus} GPUs {c.name}, {c.nodes} nodes of {c.per_node}, {c.memory_gb:g} GB each: tensor parallel {x.tp}, "
        f"FSDP {x.fsdp}, copies {x.replicas}",
        f"windows of {plan.shape.window}, {o.micro_batch} at once; {o.precision}, checkpointing {o.checkpointing}, "
        f"{'fused loss' if o.fused_loss else 'logits in memory'}",
    ]
    legend = [
        "state: parameters, gradients, AdamW. buffers: gathered parameters, whole gradients.",
        f"fits: in {USABLE:.0%} of memory. Without expert parallelism.",
    ]
    return "\n".join([*heading, "", *align(rows), *([""] if notes else []), *notes, "", *legend])
