"""Options of a plan as a typed dataclass. Needs no torch: the command line is made from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from vwn.common.errors import UserError, require


class Precision(NamedTuple):
    """Bytes per number."""

    store: int
    """For parameters and gradients between steps."""
    compute: int
    """For activations, gathered parameters, and gradients until they are reduced."""
    reduce: int
    """For gradients while they are reduced."""


PRECISIONS = {"mixed": Precision(4, 2, 4), "bfloat16": Precision(2, 2, 2), "float32": Precision(4, 4, 4)}


@dataclass(frozen=True)
class PlanOptions:
    """A training run on a cluster, for `vwn cost --cluster`."""

    cluster: str | None = None
    """KIND:GPUSxNODES, such as h100:8x16, or a JSON file; plans the training on it (docs/scale.md)."""
    fsdp: int | None = None
    """GPUs that share one copy of the parameters (FSDP2); by default all divisors are tried."""
    tp: int | None = None
    """Tensor-parallel degree, with the over-width state split along the sequence; by default all are tried."""
    pp: int | None = None
    """Pipeline stages (1F1B); by default all are tried."""
    batch_tokens: int = 4_194_304
    """Tokens per step, over all GPUs."""
    micro_batch: int = 1
    """Windows that a GPU (or the GPUs of a tensor-parallel group) takes at once."""
    precision: Literal["mixed", "bfloat16", "float32"] = "mixed"
    """mixed: float32 parameters and reductions, bfloat16 arithmetic; the others are one type throughout."""
    optimizer_bytes: int = 8
    """Bytes of optimiser state per parameter; AdamW in float32 has 8."""
    checkpointing: Literal["none", "selective", "full"] = "selective"
    """selective keeps the states and the outputs of matrices and attention, full one state per layer."""
    keep_states_every: int = 1
    """Keep one over-width state in so many sublayers, as in `vwn train`."""
    fused_loss: bool = True
    """Compute the loss without keeping logits (Liger-Kernel)."""
    efficiency: float = 0.5
    """Share of the GPU's peak FLOP/s that matrix products reach; this and the next three are assumptions."""
    bandwidth_share: float = 0.8
    """Share of the nominal bandwidth that memory and links reach."""
    overlap: float = 0.8
    """Share of the computing time that FSDP and pipeline transfers can hide behind."""
    usable_memory: float = 0.92
    """Share of a GPU's memory for the run; the rest is for the driver, communication and fragmentation."""
    show: int = 1
    """Layouts to show of each arm, the fastest first."""

    @property
    def bytes(self) -> Precision:
        """Bytes per number of the precision."""
        return PRECISIONS[self.precision]

    def check(self) -> None:
        """Refuse what has no meaning (``UserError``)."""
        for name in ("fsdp", "tp", "pp"):
            require(getattr(self, name) is None or getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("batch_tokens", "micro_batch", "keep_states_every", "show"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        require(self.optimizer_bytes >= 0, "optimizer_bytes", "at least 0", self.optimizer_bytes)
        for name in ("efficiency", "bandwidth_share", "usable_memory"):
            value = getattr(self, name)
            require(0 < value <= 1, name, "above 0 and at most 1", value)
        require(0 <= self.overlap <= 1, "overlap", "between 0 and 1", self.overlap)
        if self.keep_states_every > 1 and self.checkpointing == "full":
            raise UserError(
                f"--keep-states-every {self.keep_states_every} and --checkpointing full both rebuild the states; "
                "use one of them"
            )
