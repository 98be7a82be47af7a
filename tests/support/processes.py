"""Training in several gloo processes, which are forked from one that has imported everything already."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import socket
import time
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["processes", "vwn.training.run", "transformers.trainer", "tensorboard"])


def shard_on_cpu() -> None:
    """Have accelerate shard on a CPU, where it otherwise copies: by default it promotes devices other than that."""
    from accelerate.state import AcceleratorState, DistributedType

    init = AcceleratorState.__init__

    def promoted(self, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = promoted


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _run(rank: int, world: int, port: int, local: int, log: Path, sharded: bool, target: Any, args: tuple) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank % local), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(local),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable(2)  # a crash says where it was
    import torch

    torch.set_num_threads(1)
    if sharded:
        shard_on_cpu()
    target(*args)


class Processes:
    """``world`` processes that call ``target(*args)``, a function of a test module; killed on leaving the context."""

    def __init__(self, target: Any, *args: Any, world: int = 2, local: int | None = None, shim: bool = True, log: Any):
        log.mkdir(parents=True, exist_ok=True)
        port, self.logs = free_port(), [log / f"rank{i}.log" for i in range(world)]
        common = (world, port, local or world)
        self.all = [
            CONTEXT.Process(target=_run, args=(i, *common, self.logs[i], shim, target, args), daemon=True)
            for i in range(world)
        ]

    def __enter__(self) -> Processes:
        for process in self.all:
            process.start()
        return self

    def __exit__(self, *_: Any) -> None:
        for process in self.all:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.join(30)

    def wait(self, timeout: float = 180) -> list[int | None]:
        """Exit codes, once all have ended."""
        deadline = time.monotonic() + timeout
        for process in self.all:
            process.join(max(0.1, deadline - time.monotonic()))
        return [process.exitcode for process in self.all]

    def said(self) -> str:
        return "\n".join(path.read_text() for path in self.logs if path.exists())


def trained(run: Any, log: Path, world: int = 2, **options: Any) -> None:
    """Train ``run`` to its end in ``world`` processes."""
    with Processes(train_run, run, world=world, log=log, **options) as processes:
        assert processes.wait() == [0] * world, processes.said()


def train_run(run: Any) -> None:
    from vwn.training.run import train

    train(run)
