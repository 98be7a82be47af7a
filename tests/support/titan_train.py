"""torchtitan's entry point on a CPU: what torchtitan 0.3.0 takes of a GPU, or of torch 2.14, put in its place first.

``python titan_train.py`` imports all of it once and forks the processes of each run that it is asked for.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
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
        is_available=lambda: True,
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


def layout(metrics):
    """Describe every weight: its kind, the names of its mesh, its placement, and the shape of this rank's part."""
    weights = {}
    for part in metrics.model_parts:
        for name, p in part.named_parameters():
            kind = [type(p.data).__name__]
            if hasattr(p, "placements"):
                kind += [p.device_mesh.mesh_dim_names, [str(x) for x in p.placements], p.to_local().shape]
            weights[name.replace("_checkpoint_wrapped_module.", "")] = kind
    return weights


def main(record: Path) -> None:
    log, forward, states = MetricsProcessor.log, Block.forward, []

    def watched(self, state, *args):
        states.append([type(state).__name__, *state.shape])
        return forward(self, state, *args)

    def recorded(self, step, global_avg_loss, global_max_loss, grad_norm, extra_metrics=None):
        with record.open("a") as f:
            f.write(json.dumps({"step": step, "loss": float(global_avg_loss), "grad_norm": float(grad_norm)}) + "\n")
        if step == int(os.environ.get("TITAN_KILL_AT", -1)):
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 1:
            record.with_suffix(".layout").write_text(json.dumps({"states": states, "weights": layout(self)}))
        log(self, step, global_avg_loss, global_max_loss, grad_norm, extra_metrics)

    MetricsProcessor.log, Block.forward = recorded, watched
    train.main()


def start(environment: dict[str, str], log: str, record: str, arguments: list[str]) -> int:
    """Fork a process of a run; its id."""
    if child := os.fork():
        return child
    signal.alarm(300)
    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ |= environment
        sys.argv[1:] = arguments
        main(Path(record))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    put_shim_in_place()
    from torchtitan import train
    from torchtitan.components.metrics import MetricsProcessor

    import titan_configs  # noqa: F401
    from vwn.titan.modules import Block

    for line in sys.stdin:  # the arguments of `start`, for each process of a run
        children = [start(*process) for process in json.loads(line)]
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
