"""torchtitan's entry point on a CPU: what torchtitan 0.3.0 takes of a GPU, or of torch 2.14, put in its place first.

``python titan_train.py RECORD.jsonl --module titan_configs --config tiny ...``, once for every process.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.pipelining import schedules


def put_shim_in_place() -> None:
    torch._utils._get_available_device_type = lambda: "cpu"
    accelerator = SimpleNamespace(
        **{name: getattr(torch.cpu, name) for name in ("set_device", "synchronize", "device_count")},
        current_device=lambda: 0,
        get_device_name=lambda *_: "CPU",
        get_device_properties=lambda *_: SimpleNamespace(total_memory=1, name="CPU"),
        memory_stats=lambda *_: {},
        reset_peak_memory_stats=lambda: None,
        empty_cache=lambda: None,
    )
    torch._utils._get_device_module = lambda _: accelerator
    if not hasattr(dist, "set_timeout"):  # torch 2.14
        dist.set_timeout = lambda timeout, group=None: None
    schedules.PipelineScheduleSingle.step = _step


def _step(self, *, arg_mbs=None, kwarg_mbs=None, target_mbs=None, losses=None, loss_kwargs=None, return_outputs=True):
    """Takes microbatches as torch 2.14 does."""
    self._stage.has_backward = self._has_backward
    self._stage.clear_runtime_states()
    self._step_microbatches(arg_mbs, kwarg_mbs, target_mbs, losses, return_outputs, loss_kwargs)


def main() -> None:
    put_shim_in_place()
    record = Path(sys.argv.pop(1))
    from torchtitan import train
    from torchtitan.components.metrics import MetricsProcessor

    log = MetricsProcessor.log

    def recorded(self, step, global_avg_loss, global_max_loss, grad_norm, extra_metrics=None):
        with record.open("a") as f:
            f.write(json.dumps({"step": step, "loss": float(global_avg_loss), "grad_norm": float(grad_norm)}) + "\n")
        if step == int(os.environ.get("TITAN_KILL_AT", -1)):
            os._exit(9)
        log(self, step, global_avg_loss, global_max_loss, grad_norm, extra_metrics)

    MetricsProcessor.log = recorded
    train.main()


if __name__ == "__main__":
    main()
