"""Plans as rows for ``--json`` and as text of at most 110 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from vwn.cost.cluster.plan import Plan
from vwn.cost.table import count, short

_NAME_WIDTH = 14


def plan_rows(found: Mapping[str, list[Plan]]) -> list[dict[str, Any]]:
    """Return plain numbers (bytes, seconds, FLOPs), one dict for each plan."""
    return [_row(name, plan) for name, made in found.items() for plan in made]


def plan_text(found: Mapping[str, list[Plan]]) -> str:
    """Return what ``vwn cost --cluster`` prints."""
    named = [(name, plan) for name, made in found.items() for plan in made]
    notes = [f"{name}: does not fit: {plan.advice}" for name, plan in named if not plan.fits]
    notes = [line for note in notes for line in textwrap.wrap(note, 110, subsequent_indent="  ")]
    lines = [*_heading(named[0][1]), "", *_memory_lines(named), "", *_time_lines(named), "", *_sent_lines(named)]
    return "\n".join([*lines, *([""] if notes else []), *notes, "", *_legend(named[0][1])])


def _row(name: str, plan: Plan) -> dict[str, Any]:
    sent = plan.traffic
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
        "sent": {
            "fsdp": sent.fsdp.sent,
            "replicas": sent.replicas.sent,
            "tp": sent.tp.sent,
            "pipeline": sent.pipeline,
            "boundary": sent.boundary,
        },
        "time": asdict(plan.time) | {"step": plan.time.step},
        "tokens_per_second_per_gpu": plan.tokens_per_gpu,
        "mfu": plan.mfu,
        "checkpoint_bytes": plan.checkpoint_bytes,
    }


def _heading(plan: Plan) -> list[str]:
    c, o, g = plan.cluster, plan.options, plan.cluster.gpu
    return [
        f"{c.gpus} GPUs {c.name}, {c.nodes} nodes of {c.per_node}: {g.memory_gb:g} GB, {g.tflops:g} TFLOP/s, "
        f"{g.hbm_gb_s:g} GB/s; GB/s in a node {g.intra_gb_s:g}, between {g.inter_gb_s:g}",
        f"{o.batch_tokens:,} tokens a step, windows of {plan.shape.window}, {o.micro_batch} at once; {o.precision}, "
        f"checkpointing {o.checkpointing}, {'fused loss' if o.fused_loss else 'logits in memory'}",
    ]


def _memory_lines(named: list[tuple[str, Plan]]) -> list[str]:
    lines = [
        f"{'':{_NAME_WIDTH}} {'params':>7} {'tp':>3} {'fsdp':>5} {'copies':>6} {'pp':>3} {'M':>4} | GB per GPU: "
        f"{'state':>6} {'buffers':>7} {'activ.':>6} {'logits':>6} {'total':>6} {'fits':>5}"
    ]
    for name, plan in named:
        x, m = plan.layout, plan.memory
        gb = zip((m.state, m.buffers, m.activations, m.logits, m.total), (6, 7, 6, 6, 6), strict=True)
        lines.append(
            f"{short(name, _NAME_WIDTH)} {count(plan.shape.parameters):>7} {x.tp:>3} {x.fsdp:>5} {x.replicas:>6} "
            f"{x.pp:>3} {x.micro_batches:>4} | {'':12}{' '.join(f'{_gb(v):>{w}}' for v, w in gb)} "
            f"{'yes' if plan.fits else 'NO':>5}"
        )
    return lines


def _time_lines(named: list[tuple[str, Plan]]) -> list[str]:
    widths = {"compute": 7, "connections": 11, "tp": 6, "bubble": 6, "pipeline": 8, "fsdp": 6, "optimizer": 9}
    heads = " ".join(f"{part:>{width}}" for part, width in widths.items())
    lines = [f"{'seconds':{_NAME_WIDTH}} {'step':>7} = {heads} | {'tok/s/GPU':>9} {'MFU':>5}"]
    for name, plan in named:
        t = plan.time
        cells = " ".join(f"{getattr(t, part):>{width}.3f}" for part, width in widths.items())
        lines.append(
            f"{short(name, _NAME_WIDTH)} {t.step:>7.3f}   {cells} | {plan.tokens_per_gpu:>9,.0f} {plan.mfu:>5.1%}"
        )
    return lines


def _sent_lines(named: list[tuple[str, Plan]]) -> list[str]:
    lines = [
        f"{'GB sent by one':{_NAME_WIDTH}} {'fsdp':>8} {'copies':>8} {'tp':>8} {'pipeline':>8} | {'checkpoint':>11}"
    ]
    for name, plan in named:
        t = plan.traffic
        cells = " ".join(f"{_gb(v):>8}" for v in (t.fsdp.sent, t.replicas.sent, t.tp.sent, t.pipeline))
        lines.append(f"{short(name, _NAME_WIDTH)} {cells} | {_gb(plan.checkpoint_bytes):>8} GB")
    return lines


def _legend(plan: Plan) -> list[str]:
    o = plan.options
    return [
        "M: micro-batches. state: parameters, gradients, optimiser. buffers: gathered parameters, whole gradients.",
        f"Assumed: {o.efficiency:.0%} of peak FLOP/s, {o.bandwidth_share:.0%} of bandwidths, {o.usable_memory:.0%} of "
        f"memory; {o.overlap:.0%} of computing hides sending.",
        "An estimate by a roofline, not a measurement. Experts are spread evenly; there is no expert parallelism.",
    ]


def _gb(value: float) -> str:
    value /= 1e9
    return f"{value:.0f}" if value >= 999.5 else f"{value:.1f}" if value >= 99.95 else f"{value:.2f}"
