"""A plan: one model on one layout. What it needs, whether it fits, what to try if not, how long a step takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from vwn.cost.cluster.boundary import Boundary, boundary
from vwn.cost.cluster.hardware import Cluster
from vwn.cost.cluster.layout import Layout, layouts, make_layout
from vwn.cost.cluster.memory import Memory, memory
from vwn.cost.cluster.options import PlanOptions
from vwn.cost.cluster.shape import ModelShape, model_shape
from vwn.cost.cluster.timing import StepTime, step_time
from vwn.cost.cluster.traffic import Traffic, traffic
from vwn.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Plan:
    """A model, a cluster and a layout, and what follows."""

    shape: ModelShape
    cluster: Cluster
    options: PlanOptions
    layout: Layout
    memory: Memory
    traffic: Traffic
    time: StepTime

    @property
    def usable(self) -> float:
        """Bytes of a GPU that the run may take."""
        return self.cluster.gpu.memory_gb * 1e9 * self.options.usable_memory

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return self.memory.total <= self.usable

    @property
    def tokens_per_gpu(self) -> float:
        """Per second."""
        return self.options.batch_tokens / self.time.step / self.cluster.gpus

    @property
    def mfu(self) -> float:
        """Model FLOPs, without what runs again, over what the GPUs could do in the time of a step."""
        peak = self.cluster.gpu.tflops * 1e12
        return self.tokens_per_gpu * 3 * self.shape.forward_flops / peak

    @property
    def checkpoint_bytes(self) -> float:
        """Parameters and optimiser state."""
        return self.shape.parameters * (self.options.bytes.store + self.options.optimizer_bytes)

    @property
    def boundaries(self) -> list[Boundary]:
        """Between the stages, from the first to the last."""
        stages = self.layout.stage_layers(len(self.shape.layers))[:-1]
        return [boundary(self.shape.ratio, 2 * layers.stop, 2 * len(layers)) for layers in stages]

    @property
    def advice(self) -> str:
        """Why it does not fit, and the first single change that would do; empty where it fits."""
        if self.fits:
            return ""
        parts = {k: v for k, v in asdict(self.memory).items() if not isinstance(v, str) and k != "stage"}
        largest = max(parts, key=lambda name: parts[name])
        reason = (
            f"{self.memory.total / 1e9:.1f} GB of {self.usable / 1e9:.1f} usable, most for {largest} "
            f"({parts[largest] / 1e9:.1f} GB, {_MOMENTS[self.memory.moment]})"
        )
        for words, plan in _changes(self):
            if plan.fits:
                return f"{reason}; {words} makes it {plan.memory.total / 1e9:.1f} GB"
        if largest == "buffers" and self.memory.moment == "table" and self.shape.direct and self.shape.widened:
            return f"{reason}; the direct table is gathered whole: try the arm with ,embedding=factorised, or --tp"
        return f"{reason}; no single change does: combine full checkpointing with more --tp, or take more GPUs"


_MOMENTS = {"loss": "at the loss", "layer": "in a layer's backward", "table": "at the table's gradient"}


def make_plan(shape: ModelShape, cluster: Cluster, options: PlanOptions, layout: Layout) -> Plan:
    """All numbers of one model on one layout."""
    sent = traffic(shape, layout, options)
    time = step_time(shape, layout, cluster, options, sent)
    return Plan(shape, cluster, options, layout, memory(shape, layout, options), sent, time)


def plans(configs: Mapping[str, PreTrainedConfig], cluster: Cluster, options: PlanOptions, window: int) -> dict:
    """The best layouts of every model: those that fit by their time, and then those that do not by their memory.

    Args:
        configs: name to config.
        cluster: to train on.
        options: degrees left open are tried.
        window: tokens of a window.

    Returns:
        name to plans, ``options.show`` at most; where nothing fits, the one that comes closest.

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


def _changes(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """The same with one thing changed, the cheapest change first."""
    options, layout, shape, cluster = plan.options, plan.layout, plan.shape, plan.cluster
    changed: list[tuple[str, dict[str, Any]]] = []
    if not options.fused_loss:
        changed.append(("--fused-loss", {"fused_loss": True}))
    if options.checkpointing == "none":
        changed.append(("--checkpointing selective", {"checkpointing": "selective"}))
    if options.keep_states_every == 1 and options.checkpointing != "full" and shape.ratio > 1:
        changed.append(("--keep-states-every 4", {"keep_states_every": 4}))
    if options.checkpointing != "full":
        changed.append(("--checkpointing full", {"checkpointing": "full", "keep_states_every": 1}))
    if options.micro_batch > 1:
        changed.append(("--micro-batch 1", {"micro_batch": 1}))
    degrees = [(layout.tp, layout.fsdp * layout.replicas, layout.pp)]
    degrees += [(tp, cluster.gpus // (tp * layout.pp), layout.pp) for tp in (2, 4, 8) if tp > layout.tp]
    degrees += [(layout.tp, cluster.gpus // (layout.tp * pp), pp) for pp in (2, 4, 8, 16) if pp > layout.pp]
    for words, fields in changed:
        new = replace(options, **fields)
        if made := _tried(plan, new, layout.tp, layout.fsdp, layout.pp):
            yield words, made
    for tp, fsdp, pp in degrees:
        if fsdp and (made := _tried(plan, options, tp, fsdp, pp)):
            yield f"--tp {tp} --fsdp {fsdp} --pp {pp}", made


def _tried(plan: Plan, options: PlanOptions, tp: int, fsdp: int, pp: int) -> Plan | None:
    try:
        layout = make_layout(plan.shape, plan.cluster, options, tp, fsdp, pp)
    except UserError:
        return None
    return make_plan(plan.shape, plan.cluster, options, layout)
