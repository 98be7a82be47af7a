"""Save a Trainer's checkpoints: whole checkpoints only, the last few of them, and nothing lost where the disk is full.

Checkpoints of a sharded run are PyTorch's distributed checkpoints: every process writes its part, and any number of
processes reads them. The others hold ``model.safetensors`` and ``optimizer.pt``.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import Trainer

from vwn.common.files import CannotWrite, read_json, sync, sync_directory, write_json
from vwn.common.processes import all_gather_object, broadcast, rank, world_size
from vwn.training.checkpoint.manifest import MANIFEST, STAGING, checkpoints, publish, rotate, seal, step_of

MODEL = "pytorch_model_fsdp_0"
"""Folder of the weights in a checkpoint of a sharded run, by accelerate's name."""
DATA_STATE = "data_state.json"
RUN_STATE = "run_state.json"
"""State of a run that transformers does not save: ``{name: [state of each process]}``."""


class SavingTrainer(Trainer):
    """A Trainer whose checkpoints are written aside, sealed with a manifest, renamed, and rotated.

    Args:
        keep_last: checkpoints that stay.
    """

    def __init__(self, *args: Any, keep_last: int = 2, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.keep_last = keep_last
        self.stateful: dict[str, Any] = {}
        """Parts of the run by name whose ``state_dict()`` each checkpoint holds as JSON, for every process. Their
        ``load_state_dict`` gets the states of all processes by rank; there may have been more or fewer than now."""
        self.stream: Any = None  # the loader of streamed data: it alone knows where they stand
        self._whole: list[int] = []
        self._staging: Path | None = None

    def create_accelerator_and_postprocess(self) -> None:
        """Gather weights in float32; autocast computes in bfloat16 what it does in one process.

        FSDP's own mixed precision would round the routing weights too, which are computed in float32 (section 4).
        """
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None:
            plugin.mixed_precision_policy = MixedPrecisionPolicy()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save whole weights; a checkpoint of a sharded model has them in parts already."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
        elif not _internal_call:
            whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
            self._save(output_dir, get_model_state_dict(self.model, options=whole))

    def restore(self, checkpoint: Path) -> None:
        """Give the data and everything in ``stateful`` their state back; before training goes on from a checkpoint."""
        self._whole = [s for s in checkpoints(Path(self.args.output_dir)) if s <= step_of(checkpoint)]
        if self.stream is not None:
            self.stream.load_state_dict(read_json(checkpoint / DATA_STATE))
        wrote = read_json(checkpoint / MANIFEST)["world_size"]
        if wrote != world_size() and rank() == 0:
            print(f"vwn: {checkpoint} was written by {wrote} processes, {world_size()} go on with it", file=sys.stderr)
        states = read_json(checkpoint / RUN_STATE)
        for name in self.stateful.keys() & states:  # other versions may have had other parts
            self.stateful[name].load_state_dict(states[name])

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir, step = Path(self.args.output_dir), self.state.global_step
        checkpoint = run_dir / STAGING / f"checkpoint-{step}"
        with self._aside(f"the checkpoint of step {step}", optimiser=True) as staging:
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            data = None if self.stream is None else self.stream.state_dict()
            states = {name: all_gather_object(part.state_dict()) for name, part in self.stateful.items()}
            if self.args.should_save:
                write_json(checkpoint / RUN_STATE, states)
                if data is not None:
                    write_json(checkpoint / DATA_STATE, data)
            self.accelerator.wait_for_everyone()
            seal(checkpoint, step)
        if self.args.should_save:
            publish(checkpoint, run_dir)
            checkpoint.parent.rmdir()
            self._whole.append(step)
            rotate(run_dir, self.keep_last, self._whole, last_step=step)
        self.accelerator.wait_for_everyone()

    def save_final(self) -> None:
        """Write weights, config and tokenizer to the run directory; ``config.json`` comes last and makes it whole."""
        run_dir = Path(self.args.output_dir)
        with self._aside("the trained model", optimiser=False) as staging:
            self.save_model(str(staging))
            if self.args.should_save:
                (staging / "training_args.bin").unlink(missing_ok=True)  # a pickle; run.json says it all
                for path in sorted(staging.iterdir(), key=lambda p: p.name == "config.json"):
                    sync(path)
                    path.replace(run_dir / path.name)
                sync_directory(run_dir)
        if self.args.should_save:
            staging.rmdir()

    @contextmanager
    def _aside(self, what: str, optimiser: bool) -> Iterator[Path]:
        """Yield a folder to write in; where that fails in any process, it goes, and all raise `CannotWrite`."""
        run_dir = Path(self.args.output_dir)
        staging, need, failure = run_dir / STAGING, self._bytes_to_save(optimiser), None
        free = broadcast(shutil.disk_usage(run_dir).free)
        if free < need:
            raise CannotWrite(self._no_room(what, "the disk is too full", need, free))
        try:
            yield staging
        except BaseException as error:
            if not _is_write_error(error):
                raise
            failure = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
            free = shutil.disk_usage(run_dir).free
        failure = next((f for f in all_gather_object(failure) if f), None)
        if failure is not None:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
            raise CannotWrite(self._no_room(what, failure, need, free))

    def _no_room(self, what: str, why: str, need: int, free: int) -> str:
        last = next(iter(checkpoints(Path(self.args.output_dir)).values()), None)
        kept = f"the last checkpoint, {last}, is untouched" if last else "there is no checkpoint yet"
        return (
            f"{what} cannot be written to {self.args.output_dir} ({why}): it takes about {need / 1e6:,.1f} MB, and "
            f"{free / 1e6:,.1f} MB are free; {kept}; make room, and go on with --resume"
        )

    def _bytes_to_save(self, optimiser: bool) -> int:
        """Count the bytes of the weights and the optimiser's state; little else is written."""
        tensors: list[Any] = list(self.model.state_dict().values())
        if optimiser:
            tensors += [t for state in self.optimizer.state.values() for t in state.values()]
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Load a sharded run's weights into a model that is whole in each process."""
    state = {"model": get_model_state_dict(model)}
    dcp.load(state, storage_reader=dcp.FileSystemReader(checkpoint / MODEL))
    set_model_state_dict(model, state["model"])


def not_finite(model: nn.Module) -> str | None:
    """Return the name of a parameter that is not finite in any of the processes, which ask together."""
    bad = None
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        value = value.to_local() if isinstance(value, DTensor) else value
        if not torch.isfinite(value).all():
            bad = name
            break
    return next((name for name in all_gather_object(bad) if name), None)


def _is_write_error(error: BaseException) -> bool:
    """Return whether an error is the disk's: torch hides the system's in its own, and sharded saving in another."""
    if isinstance(error, OSError | SafetensorError | CannotWrite):
        return True
    signs = ("PytorchStreamWriter", "unexpected pos", "iostream error")
    hidden = isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    return hidden or type(error).__name__ == "CheckpointException"
