"""Plans as rows for `--json` and as text of at most 110 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from vwn.cost.cluster.plan import Plan

_NAME_WIDTH = 14


def plan_rows(found: Mapping[str, list[Plan]]) -> list[dict[str, Any]]:
    """Plain numbers: bytes, seconds, FLOPs; one dict for each plan."""
    return [_row(name, plan) for name, made in found.items() for plan in made]


def plan_text(found: Mapping[str, list[Plan]]) -> str:
    """What ``vwn cost --cluster`` prints."""
    named = [(name, plan) for name, made in found.items() for plan in made]
    lines = [*_heading(named[0][1]), "", *_layout_lines(named), "", *_time_lines(named), "", *_sent_lines(named)]
    notes = [f"{name}: does not fit: {plan.advice}" for name, plan in named if not plan.fits]
    notes += [note for name, plan in named if (note := _boundary_note(name, plan))]
    notes = [line for note in notes for line in textwrap.wrap(note, 110, subsequent_indent="  ")]
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
        "boundaries": [asdict(b) | {"least": b.least, "best": b.best} for b in plan.boundaries],
        "time": asdict(plan.time) | {"step": plan.time.step, "measured": None},
        "tokens_per_second_per_gpu": plan.tokens_per_gpu,
        "mfu": plan.mfu,
        "checkpoint": {
            "bytes": plan.checkpoint_bytes,
            "seconds": plan.checkpoint_bytes / (plan.options.storage_gb_s * 1e9),
        },
    }


def _heading(plan: Plan) -> list[str]:
    c, o = plan.cluster, plan.options
    g = c.gpu
    return [
        f"{c.gpus} GPUs {c.name}, {c.nodes} nodes of {c.per_node}: {g.memory_gb:g} GB, {g.tflops:g} TFLOP/s, "
        f"{g.hbm_gb_s:g} GB/s; GB/s in a node {g.intra_gb_s:g}, between {g.inter_gb_s:g}",
        f"{o.batch_tokens:,} tokens a step, windows of {plan.shape.window}, {o.micro_batch} at once; {o.precision}, "
        f"checkpointing {o.checkpointing}, {'fused loss' if o.fused_loss else 'logits in memory'}",
    ]


def _layout_lines(named: list[tuple[str, Plan]]) -> list[str]:
    lines = [
        f"{'':{_NAME_WIDTH}} {'params':>7} {'tp':>3} {'fsdp':>5} {'copies':>6} {'pp':>3} {'M':>4} | GB per GPU: "
        f"{'state':>6} {'buffers':>7} {'activ.':>6} {'logits':>6} {'total':>6} {'fits':>5}"
    ]
    for name, plan in named:
        x, m = plan.layout, plan.memory
        gb = [m.parameters + m.gradients + m.optimizer, m.buffers, m.activations, m.logits, m.total]
        cells = " ".join(f"{_gb(v):>{w}}" for v, w in zip(gb, (6, 7, 6, 6, 6), strict=True))
        lines.append(
            f"{_short(name)} {_count(plan.shape.parameters):>7} {x.tp:>3} {x.fsdp:>5} {x.replicas:>6} {x.pp:>3} "
            f"{x.micro_batches:>4} | {'':12}{cells} {'yes' if plan.fits else 'NO':>5}"
        )
    return lines


def _time_lines(named: list[tuple[str, Plan]]) -> list[str]:
    lines = [
        f"{'seconds':{_NAME_WIDTH}} {'step':>7} = {'compute':>7} {'connect.':>8} {'tp':>6} {'bubble':>6} "
        f"{'pipeline':>8} {'fsdp':>6} {'optim.':>6} | {'tok/s/GPU':>9} {'MFU':>5} {'measured':>12}"
    ]
    for name, plan in named:
        t = plan.time
        cells = zip((t.compute, t.connections, t.tp, t.bubble, t.pipeline, t.fsdp, t.optimizer), (7, 8, 6, 6, 8, 6, 6),
                    strict=True)  # fmt: skip
        lines.append(
            f"{_short(name)} {t.step:>7.3f}   {' '.join(f'{v:>{w}.3f}' for v, w in cells)} | "
            f"{plan.tokens_per_gpu:>9,.0f} {plan.mfu:>5.1%} {'not measured':>12}"
        )
    return lines


def _sent_lines(named: list[tuple[str, Plan]]) -> list[str]:
    lines = [
        f"{'GB sent by one':{_NAME_WIDTH}} {'fsdp':>8} {'copies':>8} {'tp':>8} {'pipeline':>8} | "
        f"{'checkpoint':>11} {'to write':>9}"
    ]
    for name, plan in named:
        sent = (plan.traffic.fsdp.sent, plan.traffic.replicas.sent, plan.traffic.tp.sent, plan.traffic.pipeline)
        seconds = plan.checkpoint_bytes / (plan.options.storage_gb_s * 1e9)
        lines.append(
            f"{_short(name)} {' '.join(f'{_gb(v):>8}' for v in sent)} | {_gb(plan.checkpoint_bytes):>8} GB "
            f"{seconds:>7.0f} s"
        )
    return lines


def _boundary_note(name: str, plan: Plan) -> str:
    """The first boundary, the cheapest to rebuild, in words."""
    if not plan.boundaries:
        return ""
    b = plan.boundaries[0]
    rest = "" if b.best == "state" else f"; from {int(b.state) + 1} sublayers on the state is less"
    return (
        f"{name}: the first boundary, behind {b.sublayers} sublayers: state {b.state:g} D, all outputs so far "
        f"{b.outputs:g} D: send the {b.best}{rest}"
    )


def _legend(plan: Plan) -> list[str]:
    o = plan.options
    return [
        "M: micro-batches. state: parameters, gradients, optimiser. buffers: gathered parameters, whole gradients.",
        f"assumed: {o.efficiency:.0%} of peak FLOP/s, {o.bandwidth_share:.0%} of bandwidths, {o.usable_memory:.0%} of "
        f"memory, {o.overlap:.0%} of computing to hide sending.",
        "A roofline, no measurement. Experts are spread evenly, over no GPUs of their own.",
    ]


def _short(name: str) -> str:
    return f"{name if len(name) <= _NAME_WIDTH else name[: _NAME_WIDTH - 1] + '…':{_NAME_WIDTH}}"


def _gb(value: float) -> str:
    value /= 1e9
    return f"{value:.0f}" if value >= 999.5 else f"{value:.1f}" if value >= 99.95 else f"{value:.2f}"


def _count(value: float) -> str:
    return f"{value / 1e9:.3g}B" if value >= 0.9995e9 else f"{value / 1e6:.3g}M"
