"""`vwn inspect`: run a trained model over some text and measure what its connections do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig

from vwn.commands.evaluation.text import load_text
from vwn.commands.inspection.config import InspectConfig
from vwn.commands.inspection.figures import write_figures
from vwn.commands.inspection.page import render_page
from vwn.common.errors import UserError
from vwn.common.files import write_json
from vwn.data import load_checkpoint_tokenizer
from vwn.hf import VirtualWidthForCausalLM
from vwn.hf.loading import load_model
from vwn.hf.measures import DepthMap, SublayerStatistics, record, split, static_routing, sublayer_names, tanh_scales
from vwn.nn.connection import Connection
from vwn.training.directory import locate, run_record

BATCH_BYTES = 1 << 28
DEFAULT_WINDOW = 512


def inspect_checkpoint(config: InspectConfig) -> dict[str, Any]:
    """Write ``inspect.json``, figures and ``inspect.html`` into ``config.out``; returns what ``inspect.json`` holds.

    Raises:
        UserError: no checkpoint, a plain model, no text, or something in the way at ``config.out``.
    """
    config.check()
    source = locate(config.checkpoint)
    refuse_plain(source)
    model = load_model(source)
    positions = getattr(model.config, "max_position_embeddings", None)
    ids, text = load_tokens(source, config.data, config.tokens, positions, config.tokenizer)
    if (last := int(ids.max())) >= (known := model.config.get_text_config().vocab_size):
        raise UserError(f"the text has token {last}, the model knows {known}; give its own tokenizer with --tokenizer")
    result = {"checkpoint": str(source), "data": text, **measure(model, ids)}
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "inspect.html").write_text(render_page(result, write_figures(result, config.out)), encoding="utf-8")
    write_json(config.out / "inspect.json", result)
    return result


def refuse_plain(source: Path | str) -> None:
    """Refuse a model without an over-width state."""
    config = AutoConfig.from_pretrained(source)
    if getattr(config, "connection", "residual") == "residual":
        raise UserError(
            f"{source} is a plain model ({config.model_type}): its residual connections have no routing to "
            "inspect; give a checkpoint with a virtual width"
        )


def load_tokens(
    source: Path | str, data: str | None, tokens: int, positions: int | None, tokenizer: str | None = None
) -> tuple[Tensor, str]:
    """Return windows ``[windows, window]`` of a text, spread evenly over it, and the text's name.

    ``data`` and ``tokenizer`` are as in :func:`vwn.commands.evaluation.text.load_text`; ``positions`` is the longest
    window that the model knows, ``None`` for any. The window is the run's.

    Raises:
        UserError: no text, or one of fewer than two tokens, or no longer the text of the run.
    """
    record = run_record(source)
    text = load_text(source, data, record, load_checkpoint_tokenizer(source, tokenizer) if data else None)
    window = record.get("config", {}).get("corpus.window", DEFAULT_WINDOW)
    window = min(window, positions or window, tokens, len(text.tokens))
    windows = text.tokens[: len(text.tokens) // window * window].reshape(-1, window)
    count = min(len(windows), max(1, tokens // window))
    return torch.from_numpy(windows[[i * len(windows) // count for i in range(count)]].astype(np.int64)), text.name


def measure(model: VirtualWidthForCausalLM, ids: Tensor, batch_bytes: int = BATCH_BYTES) -> dict[str, Any]:
    """Measure the connections of a model on tokens ``[windows, window]``, in batches of about ``batch_bytes``.

    Returns:
        ``depth``, see :meth:`DepthMap.result`, ``sublayers``, each as :meth:`SublayerStatistics.result` with its
        ``name``, ``final_slot_rms``, and the sizes.
    """
    names, g = sublayer_names(model), model.config.geometry
    depth, statistics = DepthMap(len(names)), [SublayerStatistics() for _ in names]
    # bytes: the paths of all sources, twice while they advance by a sublayer, and the outputs of the sources
    per_token = 4 * (2 * g.n * (g.n + g.m * len(names)) + g.hidden_size * len(names))
    batch = max(1, batch_bytes // (per_token * ids.shape[1]))
    final_square: Any = 0.0
    for part in tqdm(ids.split(batch), desc="inspecting", unit="batch"):
        final = _measure_batch(model, part.to(model.device), depth, statistics)
        final_square = final_square + final.double().square().mean(-1).sum(0).cpu()
    config = model.config
    return {
        "connection": config.connection,
        "carry_constraint": config.carry_constraint,
        "hidden_size": g.hidden_size,
        "m": g.m,
        "n": g.n,
        "window": ids.shape[1],
        "tokens": ids.numel(),
        "depth": depth.result(),
        "sublayers": [{"name": name, **s.result()} for name, s in zip(names, statistics, strict=True)],
        "final_slot_rms": (final_square / ids.numel()).sqrt().tolist(),
    }


def _measure_batch(
    model: VirtualWidthForCausalLM, ids: Tensor, depth: DepthMap, statistics: list[SublayerStatistics]
) -> Tensor:
    """Add one batch to the measurements; return its final states, ``[T, n, d]``."""
    g = model.config.geometry

    def visit(index: int, state: Tensor, z: Tensor, connection: Connection) -> None:
        state = state.flatten(0, -2)
        routing, static = connection.routing_matrices(state), static_routing(connection, state)
        _check_finite(sublayer_names(model)[index], state, z, *routing)
        parts, dtype = split(routing), routing.alpha.dtype
        slots = state.unflatten(-1, (g.n, -1)).to(dtype)
        depth.add(slots, z.flatten(0, -2).unflatten(-1, (g.m, -1)).to(dtype), parts)
        statistics[index].add(slots, routing, static, tanh_scales(connection))

    final = record(model, ids, visit).flatten(0, -2).unflatten(-1, (g.n, -1))
    _check_finite("final state", final)
    final = final.to(torch.promote_types(final.dtype, torch.float32))  # as the routing
    depth.finish(final)
    return final


def _check_finite(where: str, *tensors: Tensor) -> None:
    if not all(bool(t.isfinite().all()) for t in tensors):
        raise UserError(
            f"the model has diverged: at {where!r} a state or a routing matrix is not finite; give an earlier "
            "checkpoint"
        )
