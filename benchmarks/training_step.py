"""A whole training step, plain residuals against virtual width: time and memory.

Forward, loss with one further head (multi-token prediction), backward, clipping, fused AdamW; the same backbone, dense
and with experts. Every variant takes turns with the plain model, and its ratios are against the plain model's turns.
"""

from __future__ import annotations

import argparse
import gc
import os
from typing import Any

import torch
import torch._dynamo.utils

from benchmarks import measure, models
from benchmarks.measure import Memory, Times
from benchmarks.models import Training
from benchmarks.report import NOT_MEASURED, Report, parser

SHAPES = [(2, 3), (4, 16), (8, 64)]
VARIANTS: dict[str, dict[str, Any]] = {
    "auto": {},
    "identity carry": {"carry_constraint": "identity"},
    "reference": {"backend": "reference"},
    "keep_states_every=4": {"keep_states_every": 4},
    "all logits": {"loss_backend": "torch"},
    "checkpointing": {"checkpointing": True},
}
NOTES = {
    "unit": "one step: forward, two heads' loss, backward, clipping, fused AdamW",
    "time ratio": "median over that of the plain model in the same rounds and mode",
    "all logits, checkpointing": "of the plain model too, in that row",
    "saved": "allocated after the forward, above what there was before: what is kept for the backward",
    "peak": "most allocated during the step; with parameters and optimiser state in the total",
    "GPU precision": "bfloat16 autocast, as in vwn train",
}
COLUMNS = {
    "family": "6s",
    "threads": "7d",
    "mode": "8s",
    "connection": "10s",
    "variant": "19s",
    "median_ms": "10.2f",
    "plain_median_ms": "15.2f",
    "time_ratio": "10.3f",
    "saved_mb": "9.1f",
    "saved_ratio": "11.3f",
    "total_peak_mb": "13.1f",
    "peak_ratio": "10.3f",
    "graph_breaks": "12d",
}


def main() -> None:
    """Measure, show, write."""
    p = parser("training_step", __doc__)
    p.add_argument("--families", default="dense,moe", type=lambda text: text.split(","), help="dense,moe,narrow")
    p.add_argument(
        "--threads", type=lambda text: [int(t) for t in text.split(",")], help="on a CPU; by default 1 and all"
    )
    p.add_argument("--modes", type=lambda text: text.split(","), help="eager,compiled,bf16; on a GPU the first two")
    options = p.parse_args()
    report = Report(options, NOTES, COLUMNS)
    on_gpu = options.device == "cuda"
    modes = options.modes or (["eager", "compiled"] if on_gpu else ["eager"])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    everywhere = [torch.get_num_threads()] if on_gpu else [1] if options.quick else sorted({1, cores})
    for threads in options.threads or everywhere:
        measure.settle(threads)
        for family in options.families:
            for mode in modes:
                labels = {"family": family, "threads": threads, "mode": mode}
                # on a CPU the further variants once: they say nothing new with more threads
                further = on_gpu or (threads == 1 and not (options.quick and family == "moe"))
                _family(report, options, labels, further)
    report.done()


def _family(report: Report, options: argparse.Namespace, labels: dict[str, Any], further: bool) -> None:
    size = models.preset(labels["family"], options.device, options.quick)
    common = {"device": options.device, "batch": models.tokens(options.device, options.quick)}
    common |= {"compiled": labels["mode"] == "compiled", "bf16": labels["mode"] == "bf16"}
    shapes = options.shapes or (SHAPES[:2] if options.quick else SHAPES)
    arms = [(shape, "auto") for shape in shapes]
    if further:
        shape = (4, 16) if (4, 16) in shapes else shapes[-1]
        arms += [(shape, variant) for variant in VARIANTS if variant != "auto"]
    plain, saved = _built(size, None, {}, common)
    for shape, variant in arms:
        if variant in ("all logits", "checkpointing"):
            del plain
            _release(options.device)
            plain, saved = _built(size, None, VARIANTS[variant], common)
        row = labels | {"connection": list(shape), "variant": variant}
        if isinstance(plain, str):
            report.add(row | {NOT_MEASURED: f"the plain model: {plain}"})
            continue
        if variant.startswith("keep") and common["compiled"]:
            report.add(row | {NOT_MEASURED: "rebuilding states does not go through torch.compile"})
            continue
        changes = VARIANTS[variant] | ({"backend": options.backend} if variant != "reference" else {})
        wide, wide_saved = _built(size, shape, changes, common)
        if isinstance(wide, str):
            report.add(row | {NOT_MEASURED: wide})
        else:
            breaks = {}
            if common["compiled"]:
                breaks["graph_breaks"] = sum(torch._dynamo.utils.counters["graph_break"].values())
            report.add(row | breaks | _compared(plain, wide, saved, wide_saved, options))
        del wide
        _release(options.device)
    del plain
    _release(options.device)


def _built(
    size: models.Preset, connection: tuple[int, int] | None, changes: dict[str, Any], common: dict[str, Any]
) -> tuple[Training | str, Memory]:
    """A model that has taken two steps and the memory of its forward, or why there is none."""
    if common["compiled"]:
        torch._dynamo.config.recompile_limit = 64  # every model is a new function of the same code
        torch._dynamo.utils.counters.clear()
    try:
        training = Training(size, connection, **common, **changes)
        training.step()
        loss, saved = measure.memory_of(training.loss, torch.device(common["device"]))
        del loss
        training.step()
    except Exception as error:  # out of memory, or not for the compiler: the table says so and goes on
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}", Memory(0, 0)
    return training, saved


def _compared(
    plain: Training, wide: Training, plain_saved: Memory, saved: Memory, options: argparse.Namespace
) -> dict[str, Any]:
    device = torch.device(options.device)
    rounds = 3 if options.quick else 5 if options.device == "cpu" else 15
    times = measure.take_turns({"plain": plain.step, "wide": wide.step}, device, rounds, warmup=1, sample_seconds=0.0)
    peaks = {}
    for name, training in (("plain", plain), ("wide", wide)):
        _, memory = measure.memory_of(training.step, device)
        peaks[name] = training.held + memory.peak
    mb = 1e6
    return {
        **_times("plain_", times["plain"]),
        **_times("", times["wide"]),
        "time_ratio": times["wide"].median / times["plain"].median,
        "plain_saved_mb": plain_saved.live / mb,
        "saved_mb": saved.live / mb,
        "saved_ratio": saved.live / plain_saved.live,
        "plain_total_peak_mb": peaks["plain"] / mb,
        "total_peak_mb": peaks["wide"] / mb,
        "peak_ratio": peaks["wide"] / peaks["plain"],
    }


def _times(prefix: str, times: Times) -> dict[str, float]:
    return {f"{prefix}median_ms": times.median * 1e3, f"{prefix}min_ms": times.best * 1e3}


def _release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
