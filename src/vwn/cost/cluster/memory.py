"""Layouts of a model on a cluster, and the peak memory of one GPU during a step.

Parameters, gradients and AdamW's state stay. The peak is the largest of three moments: the loss (all activations, the
logits, the unembedding gathered), the backward of a layer (all activations, the layer gathered and its gradients
whole), and the table's gradient (no activations of this micro-batch any more).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vwn.common.errors import UserError
from vwn.cost.cluster.options import Cluster, PlanOptions
from vwn.cost.cluster.shape import LayerShape, ModelShape, Weights

ADAMW_BYTES = 8
"""AdamW's state per parameter: two float32 numbers."""


@dataclass(frozen=True)
class ParallelLayout:
    """Degrees of parallelism; tensor parallelism stays inside a node."""

    tp: int
    """Ranks that share every matrix, and the sequence of the over-width state."""
    fsdp: int
    """Ranks that share one copy of the parameters, each with its own data."""
    replicas: int
    """Copies of the parameters (HSDP)."""


def make_layout(shape: ModelShape, cluster: Cluster, options: PlanOptions) -> ParallelLayout:
    """Return the layout with the degrees asked for.

    Raises:
        UserError: they do not fit the cluster or the model.
    """
    tp, (heads, kv_heads) = options.tp, shape.heads
    if kv_heads % tp or heads % tp:
        raise UserError(f"--tp {tp} does not divide the {kv_heads} key-value heads; take a divisor of {kv_heads}")
    if shape.window % tp:
        raise UserError(f"--tp {tp} does not divide the window of {shape.window}; it splits the sequence, so it must")
    if cluster.per_node % tp:
        raise UserError(f"--tp {tp} does not divide the {cluster.per_node} GPUs of a node, whose fast links it needs")
    ranks = cluster.gpus // tp
    fsdp = options.fsdp or ranks
    if ranks % fsdp:
        raise UserError(f"--tp {tp} × --fsdp {fsdp} = {tp * fsdp} does not divide the {cluster.gpus} GPUs")
    return ParallelLayout(tp, fsdp, ranks // fsdp)


@dataclass(frozen=True)
class Memory:
    """Bytes on a GPU at the peak of a step."""

    state: float
    """Parameters, gradients and AdamW's state, which stay between steps."""
    buffers: float
    """Parameters gathered by FSDP, in the type of the arithmetic, and gradients before they are reduced."""
    activations: float
    """Saved for the backward, and those of the layer that is run again."""
    logits: float

    @property
    def total(self) -> float:
        """Bytes at the peak."""
        return self.state + self.buffers + self.activations + self.logits


def memory(shape: ModelShape, layout: ParallelLayout, options: PlanOptions) -> Memory:
    """Return the memory at the peak."""
    e, tp, tokens = options.bytes, layout.tp, options.micro_batch * shape.window
    width, heads, layers = shape.geometry.hidden_size, 1 + len(shape.mtp), [*shape.layers, *shape.mtp]
    state = shape.on_rank(tp) * (2 * e.store + ADAMW_BYTES) / layout.fsdp
    for_reduce = (2 * shape.ratio if shape.widened else 0) + 2  # the state, normalised; the final norm's two sides
    for_fuse = 5 * shape.ratio  # two states, each normalised, joined
    activations = tokens * e.compute * width / tp * (for_reduce * heads + for_fuse * len(shape.mtp))
    activations += tokens * sum(saved_per_token(shape, x, options, tp) for x in layers)
    whole = replace(options, checkpointing="none")
    again = tokens * max(saved_per_token(shape, x, whole, tp) - saved_per_token(shape, x, options, tp) for x in layers)
    logits = tokens * shape.vocab_size / tp * ((e.compute + 4) * heads + 4)  # as they come, log-softmax, gradient
    if options.fused_loss:
        logits = tokens * width * heads * e.compute  # gradients of the heads' inputs
    moments = [
        Memory(state, _buffers(layout, options, [x.weights for x in layers], 2), activations + again, 0.0),
        Memory(state, _buffers(layout, options, [shape.tail]), activations, logits),
        Memory(state, _buffers(layout, options, [shape.table]), 0.0, 0.0),
    ]
    return max(moments, key=lambda m: m.total)


def saved_per_token(shape: ModelShape, layer: LayerShape, options: PlanOptions, tp: int) -> float:
    """Return the bytes that one layer saves for the backward per token, on one of ``tp`` ranks.

    Norms, softmax and attention are fused ones, which save their inputs, and ``D``-wide inputs of matrices are kept
    gathered, as DTensor does.
    """
    width, keep = shape.geometry.hidden_size, options.keep_states_every
    state = shape.ratio * width  # the plain stream is as wide as the backbone
    if options.checkpointing == "full":
        return state / tp * options.bytes.compute
    # The state and the output of each sublayer; without connections the stream, which is the norm's input.
    stream = 2 * (state / keep + width) if shape.widened else 2 * width
    elements = stream / tp + (layer.attention + layer.hidden) / tp
    if options.checkpointing == "none":
        norm_inputs = 2 * width if shape.widened else 0  # what was read
        elements += norm_inputs / tp + 2 * width + (layer.hidden + layer.routed) / tp
    return elements * options.bytes.compute


def _buffers(layout: ParallelLayout, options: PlanOptions, groups: Sequence[Weights], at_once: int = 1) -> float:
    """Return bytes of the largest group: gathered (of layers, the next one too), its gradients twice while reduced."""
    e, data_parallel = options.bytes, layout.fsdp * layout.replicas
    gathered = 0 if layout.fsdp == 1 and e.store == e.compute else e.compute  # else used as they are stored
    if data_parallel == 1 and not gathered:
        return 0.0
    reduced = e.compute + (e.reduce if data_parallel > 1 else 0)
    return max(w.on_rank(layout.tp) for w in groups) * (at_once * gathered + reduced)
