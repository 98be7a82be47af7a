"""Clusters and the options of `vwn cost`. Needs no torch: the command line is made from it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from vwn.common.errors import UserError, require

GPUS = {"a100": 80, "h100": 80, "h200": 141, "b200": 180, "mi300x": 192}
"""Memory by kind of GPU, in 10^9 bytes, from the vendors' data sheets."""


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal GPUs."""

    name: str
    memory_gb: float
    """Memory of a GPU, in 10^9 bytes."""
    per_node: int
    """GPUs in a node."""
    nodes: int

    @property
    def gpus(self) -> int:
        """Number of GPUs in all nodes."""
        return self.per_node * self.nodes


def parse_cluster(text: str) -> Cluster:
    """Read a cluster from ``KIND:GPUSxNODES``, where the kind is one of :data:`GPUS` or a memory such as ``24gb``.

    Raises:
        UserError: another form, or a kind that is not known.
    """
    found = re.fullmatch(r"(\w+):([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise UserError(f"--cluster is KIND:GPUSxNODES, such as h100:8x16 for 16 nodes of 8; got {text!r}")
    kind, per_node, nodes = found[1], int(found[2]), int(found[3])
    own = re.fullmatch(r"([1-9]\d*)gb", kind)
    if not own and kind not in GPUS:
        raise UserError(f"the GPU {kind!r} is not known ({', '.join(GPUS)}); give its memory, as in 24gb:8x2")
    return Cluster(kind, int(own[1]) if own else GPUS[kind], per_node, nodes)


class Precision(NamedTuple):
    """Bytes per number: of parameters and gradients between steps (``store``), of activations, gathered parameters and
    whole gradients (``compute``), of gradients while they are reduced (``reduce``)."""

    store: int
    compute: int
    reduce: int


PRECISIONS = {"mixed": Precision(4, 2, 4), "bfloat16": Precision(2, 2, 2), "float32": Precision(4, 4, 4)}


@dataclass(frozen=True)
class PlanOptions:
    """A training run on a cluster, for `vwn cost --cluster`."""

    cluster: str | None = None
    """KIND:GPUSxNODES, such as h100:8x16, or 24gb:4x2 for other GPUs; plans the training on it (docs/scale.md)."""
    fsdp: int | None = None
    """GPUs that share one copy of the parameters (FSDP2); by default all that --tp leaves."""
    tp: int = 1
    """Tensor-parallel degree, with the over-width state split along the sequence."""
    micro_batch: int = 1
    """Windows that a GPU (or the GPUs of a tensor-parallel group) takes at once."""
    precision: Literal["mixed", "bfloat16", "float32"] = "mixed"
    """mixed: float32 parameters and reductions, bfloat16 arithmetic; the others are one type throughout."""
    checkpointing: Literal["none", "selective", "full"] = "selective"
    """selective keeps the states and the outputs of matrices and attention, full one state per layer."""
    keep_states_every: int = 1
    """Keep one over-width state in so many sublayers, as in `vwn train`."""
    fused_loss: bool = True
    """Compute the loss without keeping logits (Liger-Kernel)."""

    @property
    def bytes(self) -> Precision:
        """Bytes per number of the precision."""
        return PRECISIONS[self.precision]

    def check(self) -> None:
        """Refuse numbers below 1 and options that exclude each other (``UserError``)."""
        for name in ("fsdp", "tp", "micro_batch", "keep_states_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, "at least 1", value)
        if self.keep_states_every > 1 and self.checkpointing == "full":
            raise UserError(
                f"--keep-states-every {self.keep_states_every} and --checkpointing full both rebuild the states; "
                "use one of them"
            )


@dataclass(frozen=True)
class CostConfig:
    """Count parameters, FLOPs, memory and traffic of models before training, on one device or a cluster."""

    backbone: str = "tiny"
    """A preset, a transformers config (file or folder), or a hub id."""
    arms: tuple[str, ...] = ("plain", "2x3", "4x16", "8x64")
    """Models to compare: plain, MxN, or any other arm of vwn compare."""
    window: int = 2048
    """Tokens per sequence, for the FLOPs of attention."""
    vocab_size: int = 32_768
    """Vocabulary size of a preset; a config has its own."""
    mtp: int = 0
    """Multi-token prediction modules."""
    plan: PlanOptions = field(default_factory=PlanOptions)
    json: bool = False
    """Print JSON instead of a table."""
