"""The peak memory of one GPU during a step.

Parameters, gradients and optimiser state stay. The peak is the largest of three moments: the loss (all activations, the
logits, the unembedding gathered), the backward of a layer (all activations, the layer gathered and its gradients
whole), and the table's gradient (no activations of this micro-batch any more).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vwn.cost.cluster.layout import Layout
from vwn.cost.cluster.options import PlanOptions
from vwn.cost.cluster.shape import LayerShape, ModelShape, Weights


@dataclass(frozen=True)
class Memory:
    """Bytes on a GPU of the fullest stage."""

    parameters: float
    gradients: float
    optimizer: float
    buffers: float
    """Parameters gathered by FSDP, in the type of the arithmetic, and gradients before they are reduced."""
    activations: float
    """Saved for the backward, of all micro-batches in flight, and of the layer that is run again."""
    logits: float
    moment: str
    """When the peak is: ``"loss"``, ``"layer"`` or ``"table"``."""
    stage: int

    @property
    def state(self) -> float:
        """Bytes that stay between steps: parameters, gradients and optimiser state."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """Bytes at the peak."""
        return self.state + self.buffers + self.activations + self.logits


def memory(shape: ModelShape, layout: Layout, options: PlanOptions) -> Memory:
    """Return the memory of the stage that needs the most."""
    stages = (_stage(shape, layout, options, stage) for stage in range(layout.pp))
    return max(stages, key=lambda m: m.total)


def stage_weights(shape: ModelShape, layout: Layout, stage: int) -> list[Weights]:
    """Groups of parameters that FSDP gathers together: the table, each layer, each MTP module, the tail."""
    groups = [shape.layers[i].weights for i in layout.stage_layers(len(shape.layers))[stage]]
    if stage == 0:
        groups.insert(0, shape.table)
    if stage == layout.pp - 1:
        groups += [x.weights for x in shape.mtp]
        groups.append(shape.tail + shape.table if shape.tied and layout.pp > 1 else shape.tail)
    return groups


def saved_per_token(shape: ModelShape, layer: LayerShape, options: PlanOptions, tp: int) -> float:
    """Bytes that one layer saves for the backward per token, on one of ``tp`` ranks.

    Norms, softmax and attention are fused ones, which save their inputs, and ``D``-wide inputs of matrices are kept
    gathered, as DTensor does.
    """
    width, keep = shape.geometry.hidden_size, options.keep_states_every
    state = shape.ratio * width  # the plain stream is as wide as the backbone
    if options.checkpointing == "full":
        return state / tp * options.bytes.compute
    # Of each sublayer the state and what it put out; without connections the stream, which is the norm's input.
    stream = 2 * (state / keep + width) if shape.widened else 2 * width
    elements = stream / tp + (layer.attention + layer.hidden) / tp
    if options.checkpointing == "none":
        norm_inputs = 2 * width if shape.widened else 0  # what was read
        elements += norm_inputs / tp + 2 * width + (layer.hidden + layer.routed) / tp
    return elements * options.bytes.compute


def _run_again(shape: ModelShape, layer: LayerShape, options: PlanOptions, tp: int) -> float:
    """Bytes per token while the backward runs a layer again, beyond what was saved of it."""
    if options.checkpointing == "none":
        return 0.0
    every = saved_per_token(shape, layer, replace(options, checkpointing="none"), tp)
    return every - saved_per_token(shape, layer, options, tp)


def _stage(shape: ModelShape, layout: Layout, options: PlanOptions, stage: int) -> Memory:
    e, tp, tokens = options.bytes, layout.tp, options.micro_batch * shape.window
    held = sum(w.on_rank(tp) for w in stage_weights(shape, layout, stage))
    layers = [shape.layers[i] for i in layout.stage_layers(len(shape.layers))[stage]]
    last = stage == layout.pp - 1
    in_flight = min(layout.micro_batches, layout.pp - stage)
    activations = in_flight * tokens * sum(saved_per_token(shape, x, options, tp) for x in layers)
    again = tokens * max(_run_again(shape, x, options, tp) for x in [*layers, *shape.mtp])
    logits = 0.0
    if last:
        width, heads = shape.geometry.hidden_size, 1 + len(shape.mtp)
        of_reduce = (2 * shape.ratio if shape.widened else 0) + 2  # the state, normalised; the final norm's two sides
        of_fuse = 5 * shape.ratio  # two states, each normalised, joined
        activations += tokens * e.compute * width / tp * (of_reduce * heads + of_fuse * len(shape.mtp))
        activations += tokens * sum(saved_per_token(shape, x, options, tp) for x in shape.mtp)
        logits = tokens * shape.vocab_size / tp * ((e.compute + 4) * heads + 4)  # as they come, log-softmax, gradient
        if options.fused_loss:
            logits = tokens * width * heads * e.compute  # gradients of the heads' inputs

    def at(moment: str, buffers: float, activations: float, logits: float = 0.0) -> Memory:
        kept = held * e.store / layout.fsdp
        optimizer = held * options.optimizer_bytes / layout.fsdp
        return Memory(kept, kept, optimizer, buffers, activations, logits, moment, stage)

    if layout.pp > 1:  # gathered once for all micro-batches, gradients reduced after the last
        buffers = held * (_gathered(layout, options) + e.reduce)
        return at("loss" if last else "layer", buffers, activations + again, logits)
    moments = [
        at("layer", _buffers(layout, options, [x.weights for x in layers], 2), activations + again),
        at("loss", _buffers(layout, options, [shape.tail]), activations, logits),
        at("table", _buffers(layout, options, [shape.table]), 0.0),
    ]
    return max(moments, key=lambda m: m.total)


def _gathered(layout: Layout, options: PlanOptions) -> int:
    """Bytes per gathered parameter; none where what is stored can be used as it is."""
    same = layout.fsdp == 1 and options.bytes.store == options.bytes.compute
    return 0 if same else options.bytes.compute


def _buffers(layout: Layout, options: PlanOptions, groups: list[Weights], gathered_at_once: int = 1) -> float:
    """Bytes of the largest group: gathered (of layers, the next one too), and its gradients, twice while reduced."""
    data_parallel, gathered = layout.fsdp * layout.replicas, _gathered(layout, options)
    if data_parallel == 1 and not gathered:
        return 0.0
    reduced = options.bytes.compute + (options.bytes.reduce if data_parallel > 1 else 0)
    return max(w.on_rank(layout.tp) for w in groups) * (gathered_at_once * gathered + reduced)
