"""The health of a run while it trains: gradient norms by layer, size of the state, routing matrices of every sublayer.

Every measurement is a line of ``health.jsonl`` in the run directory; what is worst over the layers goes to the logs.
"""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from vwn.hf import VirtualWidthForCausalLM
from vwn.hf.measures import SublayerStatistics, record, split, static_routing, sublayer_names, tanh_scales
from vwn.nn.connection import Connection
from vwn.nn.groups import group_of_parameters
from vwn.training.watch.lines import StepLines

FILE = "health.jsonl"
PROBE_TOKENS = 256
"""Validation tokens that the state is looked at with, always the same."""
ROUTED_TOKENS = 32
"""Number of these, evenly spread, whose routing matrices are looked at."""
LARGEST_STATE = 1e6
"""RMS above which a state is reported; sound runs stay below 2e5 (results/stability)."""
logger = logging.getLogger(__name__)
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class HealthLog(TrainerCallback):
    """Measures every ``every`` steps, and at the first and the last; training itself is not changed by it."""

    def __init__(self, trainer: Any, every: int) -> None:
        self.trainer, self.every = trainer, every
        self.lines = StepLines(Path(trainer.args.output_dir) / FILE)
        self.warned: set[str] = set()
        self.gradients: dict[str, Any] = {}
        self.unlogged: dict[str, float] = {}
        """The worst numbers of the last measurement, for the next training log."""

    def is_due(self, step: int) -> bool:
        """Return whether the optimiser step ``step``, counted from 1, is measured."""
        return step == 1 or step % self.every == 0 or step == self.trainer.args.max_steps

    def see_gradients(self, model: nn.Module) -> None:
        """Measure the gradients of the step under way, which are complete and not yet clipped."""
        if self.is_due(self.trainer.state.global_step + 1):
            self.gradients = gradient_norms(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.lines.forget_after(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.is_due(state.global_step):
            return
        seen = self.trainer.eval_dataset[0]["input_ids"][None, :PROBE_TOKENS]
        entry = {
            "step": state.global_step,
            "tokens": state.global_step * self.trainer.tokens_per_step,
            "gradient_norm": self.gradients,
            "state": measure_state(self.trainer.model, seen),
        }
        if state.is_world_process_zero:
            self.lines.append(entry)
            for name, sentence in concerns(entry).items():
                if name not in self.warned:
                    logger.warning("step %d: %s", state.global_step, sentence)
                self.warned.add(name)
        self.unlogged = {f"health_{name}": value for name, value in worst(entry).items()}


def gradient_norms(model: nn.Module) -> dict[str, Any]:
    """Return 2-norms of the gradients: of the backbone's layers (``layers``) and of their connections (``routing``), a
    number for each layer; of the other parameter groups (:data:`vwn.nn.groups.GROUPS`), the rest of the backbone, the
    MTP modules (``mtp``), and all (``total``)."""
    squares: dict[str, Any] = {}
    for name, group in group_of_parameters(model).items():
        grad = model.get_parameter(name).grad
        if grad is None:
            continue
        grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
        square = float(grad.detach().float().norm().square())
        layer = _LAYER.search(name)
        if ".mtp." in name:
            squares["mtp"] = squares.get("mtp", 0.0) + square
        elif layer and group in ("backbone", "routing"):
            row = squares.setdefault("layers" if group == "backbone" else "routing", {})
            row[int(layer[1])] = row.get(int(layer[1]), 0.0) + square
        else:
            squares[group] = squares.get(group, 0.0) + square
        squares["total"] = squares.get("total", 0.0) + square
    return {
        key: [math.sqrt(value[i]) for i in sorted(value)] if isinstance(value, dict) else math.sqrt(value)
        for key, value in squares.items()
    }


@torch.no_grad()
def measure_state(model: nn.Module, ids: Tensor) -> dict[str, Any]:
    """Measure the state on the tokens ``ids``, ``[1, S]``, in evaluation mode.

    Returns:
        ``rms`` of the state that each sublayer reads and, last, of the final one (of a plain model, of what each layer
        reads); and for every sublayer its ``name``, ``spectral_radius`` of the carry (mean over tokens), ``saturated``
        (share of the dynamic routing whose tanh is above 0.99 in magnitude, the largest of read, carry and write; None
        without one), ``effective_slots`` (of ``n``: how many directions the slots span) and ``weakest_slot`` (RMS of
        the smallest slot over that of all).
    """
    training = model.training
    model.eval()
    try:
        ids = ids.to(next(model.parameters()).device)
        if not isinstance(model, VirtualWidthForCausalLM) or model.config.connection == "residual":
            hidden = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
            return {"rms": [_rms(h) for h in hidden[:-1]]}  # the last is normed
        return _measure_sublayers(model, ids)
    finally:
        model.train(training)


def _measure_sublayers(model: VirtualWidthForCausalLM, ids: Tensor) -> dict[str, Any]:
    n = model.config.geometry.n
    rows: list[dict[str, Any]] = []
    rms: list[float] = []

    @torch.autocast(ids.device.type, enabled=False)
    def visit(index: int, state: Tensor, z: Tensor, connection: Connection) -> None:
        rms.append(_rms(state))
        tokens = state.flatten(0, -2)
        tokens = tokens[:: max(1, len(tokens) // ROUTED_TOKENS)].float()
        routing, statistics = connection.routing_matrices(tokens), SublayerStatistics()
        slots = tokens.unflatten(-1, (n, -1))
        if not all(part.isfinite().all() for part in (tokens, *split(routing).values())):
            rows.append({})
            return
        statistics.add(slots, routing, static_routing(connection, tokens), tanh_scales(connection))
        seen = statistics.result()
        saturated = [part["saturated"] for part in seen["routing"].values() if part["saturated"] is not None]
        strengths = torch.tensor(seen["slots"]["rms"])
        rows.append(
            {
                "spectral_radius": seen["spectral_radius"]["mean"],
                "saturated": max(saturated, default=None) if connection.dynamic else None,
                "effective_slots": effective_slots(slots),
                "weakest_slot": float(strengths.min() / strengths.square().mean().sqrt()),
            }
        )

    names = sublayer_names(model)
    rms_of_final = _rms(record(model, ids, visit))
    keys = ("spectral_radius", "saturated", "effective_slots", "weakest_slot")
    return {"name": names, "rms": [*rms, rms_of_final], **{key: [row.get(key) for row in rows] for key in keys}}


def effective_slots(slots: Tensor) -> float:
    """Return how many independent slots a state ``[T, n, d]`` amounts to, from 1 to ``min(n, d)``.

    It is ``(tr G)² / ‖G‖²`` with ``G`` the slots' Gram matrix, the participation ratio of its eigenvalues.
    """
    gram = slots @ slots.mT
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    return float((trace.square() / gram.square().sum((-2, -1))).mean())


def worst(entry: dict[str, Any]) -> dict[str, float]:
    """Return the extreme over the layers of each number of a measurement that is known."""
    state, gradients = entry["state"], entry["gradient_norm"]
    chosen = {
        "layer_grad_norm_max": (max, gradients.get("layers")),
        "routing_grad_norm_max": (max, gradients.get("routing")),
        "state_rms_max": (max, state["rms"]),
        "spectral_radius_max": (max, state.get("spectral_radius")),
        "saturated_max": (max, state.get("saturated")),
        "effective_slots_min": (min, state.get("effective_slots")),
        "weakest_slot_min": (min, state.get("weakest_slot")),
    }
    known = {name: (f, [v for v in values or () if v is not None]) for name, (f, values) in chosen.items()}
    return {name: f(values) for name, (f, values) in known.items() if values}


def concerns(entry: dict[str, Any]) -> dict[str, str]:
    """Return what the user should hear about a measurement, a sentence each, by a name of its own."""
    found, seen = {}, worst(entry)
    radius = seen.get("spectral_radius_max")
    if not all(rms < LARGEST_STATE for rms in entry["state"]["rms"]):  # NaN too
        found["state"] = f"the state has grown beyond an RMS of {LARGEST_STATE:g}; lower the learning rate"
        if radius is not None and not radius <= 1:
            found["state"] += (
                f", or that of the routing alone (--rate-factors routing=0.1), or bound the carry, whose spectral "
                f"radius is up to {radius:.2f} (--carry-constraint doubly_stochastic)"
            )
    if seen.get("saturated_max", 0) > 0.5:
        found["saturated"] = (
            f"{seen['saturated_max']:.0%} of a sublayer's dynamic routing is saturated and learns no more; lower the "
            "learning rate of the routing (--rate-factors routing=0.1)"
        )
    if entry["gradient_norm"].get("total") == 0:
        found["gradient"] = "all gradients are zero, so nothing is learnt any more; start again with a lower rate"
    return found


def _rms(values: Tensor) -> float:
    return float(values.float().square().mean().sqrt())
