"""Plans as rows for ``--json`` and as text of at most 110 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from vwn.cost.cluster.plan import Plan
from vwn.cost.table import align, count


def plan_rows(found: Mapping[str, list[Plan]]) -> list[dict[str, Any]]:
    """Return plain numbers (bytes, seconds, FLOPs), one dict for each plan."""
    return [_row(name, plan) for name, plans in found.items() for plan in plans]


def _row(name: str, plan: Plan) -> dict[str, Any]:
    sent, time = plan.traffic, plan.time
    return {
        "name": name,
        "parameters": plan.shape.parameters,
        "r": plan.shape.ratio,
        "cluster": asdict(plan.cluster) | {"gpus": plan.cluster.gpus},
        "options": asdict(plan.options),
        "window": plan.shape.window,
        "layout": asdict(plan.layout) | {"bubble": plan.layout.bubble},
        "memory": asdict(plan.memory) | {"total": plan.memory.total, "usable": plan.usable},
        "fits": plan.fits,
        "advice": plan.advice or None,
        "sent": {kind: getattr(sent, kind).sent for kind in ("fsdp", "replicas", "tp")}
        | {"pipeline": sent.pipeline, "boundary": sent.boundary},
        "time": asdict(time) | {"step": time.step},
        "tokens_per_second_per_gpu": plan.tokens_per_gpu,
        "mfu": plan.mfu,
        "checkpoint_bytes": plan.checkpoint_bytes,
    }


def plan_text(found: Mapping[str, list[Plan]]) -> str:
    """Return what ``vwn cost --cluster`` prints."""
    degrees = ("params", "tp", "fsdp", "copies", "pp", "M")
    memory = [["GB per GPU", *degrees, "state", "buffers", "activations", "logits", "total", "fits"]]
    parts = ("compute", "connections", "tp", "bubble", "pipeline", "fsdp", "optimizer")
    times, sent, notes = [["seconds", "step", *parts, "tok/s/GPU", "MFU"]], [], []
    sent.append(["GB sent by one", "fsdp", "copies", "tp", "pipeline", "checkpoint"])
    for name, plan in [(name, plan) for name, plans in found.items() for plan in plans]:
        x, m, t, s = plan.layout, plan.memory, plan.time, plan.traffic
        layout = [str(k) for k in (x.tp, x.fsdp, x.replicas, x.pp, x.micro_batches)]
        live = [_gb(v) for v in (m.state, m.buffers, m.activations, m.logits, m.total)]
        memory.append([name, count(plan.shape.parameters), *layout, *live, "yes" if plan.fits else "NO"])
        seconds = [f"{getattr(t, part):.3f}" for part in ("step", *parts)]
        times.append([name, *seconds, f"{plan.tokens_per_gpu:,.0f}", f"{plan.mfu:.1%}"])
        sent.append([name, *map(_gb, (s.fsdp.sent, s.replicas.sent, s.tp.sent, s.pipeline, plan.checkpoint_bytes))])
        if not plan.fits:
            notes += textwrap.wrap(f"{name}: does not fit: {plan.advice}", 110, subsequent_indent="  ")
    plan = next(iter(found.values()))[0]
    tables = [line for rows in (memory, times, sent) for line in ("", *align(rows))]
    return "\n".join([*_heading(plan), *tables, *([""] if notes else []), *notes, "", *_legend(plan)])


def _heading(plan: Plan) -> list[str]:
    c, o, g = plan.cluster, plan.options, plan.cluster.gpu
    return [
        f"{c.gpus} GPUs {c.name}, {c.nodes} nodes of {c.per_node}: {g.memory_gb:g} GB, {g.tflops:g} TFLOP/s, "
        f"{g.hbm_gb_s:g} GB/s; GB/s in a node {g.intra_gb_s:g}, between {g.inter_gb_s:g}",
        f"{o.batch_tokens:,} tokens a step, windows of {plan.shape.window}, {o.micro_batch} at once; {o.precision}, "
        f"checkpointing {o.checkpointing}, {'fused loss' if o.fused_loss else 'logits in memory'}",
    ]


def _legend(plan: Plan) -> list[str]:
    o = plan.options
    return [
        "M: micro-batches. state: parameters, gradients, optimiser. buffers: gathered parameters, whole gradients.",
        "step: the sum of the seconds behind it.",
        f"Assumed: {o.efficiency:.0%} of peak FLOP/s, {o.bandwidth_share:.0%} of bandwidths, {o.usable_memory:.0%} of "
        f"memory; {o.overlap:.0%} of computing hides sending.",
        "An estimate by a roofline, not a measurement. Experts are spread evenly; there is no expert parallelism.",
    ]


def _gb(value: float) -> str:
    value /= 1e9
    return f"{value:.0f}" if value >= 999.5 else f"{value:.1f}" if value >= 99.95 else f"{value:.2f}"
