"""Plans: the memory a model needs on a layout, whether it fits, what to change if not, the time of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vwn.cost.cluster.hardware import Cluster
from vwn.cost.cluster.layout import Layout, layouts
from vwn.cost.cluster.memory import Memory, memory
from vwn.cost.cluster.options import PlanOptions
from vwn.cost.cluster.shape import ModelShape, model_shape
from vwn.cost.cluster.timing import StepTime, Traffic, step_time, traffic

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Plan:
    """The memory, traffic and time of one model on one layout of a cluster."""

    shape: ModelShape
    cluster: Cluster
    options: PlanOptions
    layout: Layout
    memory: Memory
    traffic: Traffic
    time: StepTime

    @property
    def usable(self) -> float:
        """Bytes of a GPU that the run may use."""
        return self.cluster.gpu.memory_gb * 1e9 * self.options.usable_memory

    @property
    def fits(self) -> bool:
        """Whether the run fits in the usable memory."""
        return self.memory.total <= self.usable

    @property
    def tokens_per_gpu(self) -> float:
        """Tokens per second and GPU."""
        return self.options.batch_tokens / self.time.step / self.cluster.gpus

    @property
    def mfu(self) -> float:
        """Model FLOPs, without what runs again, over what the GPUs could do in the time of a step."""
        return self.tokens_per_gpu * 3 * self.shape.cost.flops.total / (self.cluster.gpu.tflops * 1e12)

    @property
    def checkpoint_bytes(self) -> float:
        """Parameters and optimiser state."""
        return self.shape.parameters * (self.options.bytes.store + self.options.optimizer_bytes)

    @property
    def advice(self) -> str:
        """Why the plan does not fit and what lowers the largest part; empty where it fits."""
        if self.fits:
            return ""
        m = self.memory
        parts = {"state": m.state, "buffers": m.buffers, "activations": m.activations, "logits": m.logits}
        largest = max(parts, key=lambda name: parts[name])
        return (
            f"{m.total / 1e9:.1f} GB of {self.usable / 1e9:.1f} usable, most for {largest} ({parts[largest] / 1e9:.1f} "
            f"GB, {_MOMENTS[m.moment]}); lower it by {_REMEDIES[largest]}"
        )


_MOMENTS = {"loss": "at the loss", "layer": "in a layer's backward", "table": "at the table's gradient"}
_REMEDIES = {
    "state": "a larger --fsdp, or more GPUs",
    "buffers": "a larger --tp, or embedding=factorised for a wide table",
    "activations": "--checkpointing full, --keep-states-every, a smaller --micro-batch or a larger --tp",
    "logits": "--fused-loss",
}


def make_plan(shape: ModelShape, cluster: Cluster, options: PlanOptions, layout: Layout) -> Plan:
    """Plan one model on one layout."""
    sent = traffic(shape, layout, options)
    time = step_time(shape, layout, cluster, options, sent)
    return Plan(shape, cluster, options, layout, memory(shape, layout, options), sent, time)


def plans(configs: Mapping[str, PreTrainedConfig], cluster: Cluster, options: PlanOptions, window: int) -> dict:
    """Find the fastest layouts of every model; where none fits, the one that comes closest.

    Args:
        configs: name to config.
        cluster: to train on.
        options: degrees left open are tried.
        window: tokens of a window.

    Returns:
        name to plans, ``options.show`` at most.

    Raises:
        UserError: options out of range, a model whose cost is not known, no layout.
    """
    options.check()
    found = {}
    for name, config in configs.items():
        shape = model_shape(config, window)
        made = [make_plan(shape, cluster, options, layout) for layout in layouts(shape, cluster, options)]
        fitting = sorted((p for p in made if p.fits), key=lambda p: p.time.step)
        found[name] = fitting[: options.show] or [min(made, key=lambda p: p.memory.total)]
    return found
