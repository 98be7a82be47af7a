"""The models that whole steps are measured on: one backbone, plain or with a virtual width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vwn.hf import VirtualWidthConfig, VirtualWidthForCausalLM
from vwn.nn.generalized import GeneralizedHyperConnection
from vwn.training.arguments import apply_speed
from vwn.training.config import SpeedOptions
from vwn.training.presets import PRESETS, Preset

VOCAB = {"cpu": 2048, "cuda": 32768}
LARGE = {  # what a GPU is measured with
    "dense": Preset(depth=12, width=1024, learning_rate=1e-4, wide_learning_rate=1e-4),
    "moe": Preset(depth=12, width=1024, learning_rate=1e-4, wide_learning_rate=1e-4, experts=8),
}
SMALL = {"dense": PRESETS["tiny"], "moe": PRESETS["tiny-moe"], "narrow": PRESETS["micro"]}
QUICK = {
    "dense": Preset(depth=2, width=32, learning_rate=1e-4, wide_learning_rate=1e-4),
    "moe": Preset(depth=2, width=32, learning_rate=1e-4, wide_learning_rate=1e-4, experts=4),
}


def preset(family: str, device: str, quick: bool) -> Preset:
    """Return the backbone of a family that suits a device; ``"narrow"`` is that of the studies, on a CPU only."""
    sizes = QUICK if quick else LARGE if device == "cuda" else SMALL
    if family not in sizes:
        raise SystemExit(f"--families knows {', '.join(sizes)} here; got {family!r}")
    return sizes[family]


def tokens(device: str, quick: bool) -> tuple[int, int]:
    """Windows and their length."""
    return (2, 16) if quick else (4, 2048) if device == "cuda" else (8, 256)


class Training:
    """A model, its optimiser and a batch.

    Args:
        size: of the backbone.
        connection: ``(m, n)``, or ``None`` for plain residuals.
        device: on a GPU under bfloat16 autocast, as in ``vwn train``; in float32 on a CPU without ``bf16``.
        batch: windows and their length.
        backend: of the connections.
        loss_backend: as in :class:`vwn.VirtualWidthForCausalLM`; by default that of ``vwn train``.
        mtp: multi-token prediction modules.
        keep_states_every: as in :class:`vwn.VirtualWidthModel`.
        checkpointing: gradient checkpointing of every layer.
        compiled: whether the model goes through ``torch.compile``.
        vocab: size of the vocabulary, if not the one that suits the device.
        carry_constraint: as in :class:`vwn.VirtualWidthConfig`.
    """

    def __init__(
        self,
        size: Preset,
        connection: tuple[int, int] | None,
        device: str,
        batch: tuple[int, int],
        backend: str = "auto",
        loss_backend: Any = "auto",
        mtp: int = 1,
        keep_states_every: int = 1,
        checkpointing: bool = False,
        compiled: bool = False,
        vocab: int | None = None,
        bf16: bool = False,
        carry_constraint: str = "none",
    ) -> None:
        vocab, self._bf16 = vocab or VOCAB[device], bf16 or device == "cuda"
        fields = size.fields(vocab, batch[1])
        backbone = CONFIG_MAPPING[fields.pop("model_type")](**fields)
        width: dict[str, Any] = {"connection": "residual"}
        if connection is not None:
            width = {"m": connection[0], "n": connection[1], "carry_constraint": carry_constraint}
        torch.manual_seed(0)
        self.model = VirtualWidthForCausalLM(VirtualWidthConfig(backbone=backbone, num_mtp_modules=mtp, **width))
        self._perturb()
        self.model.train().to(device)
        wide = {"connection_backend": backend, "keep_states_every": keep_states_every} if connection is not None else {}
        speed = SpeedOptions(**wide, loss_backend=loss_backend, gradient_checkpointing=checkpointing, compile=compiled)
        apply_speed(self.model, speed, "bf16" if self._bf16 else "fp32")
        self._run = torch.compile(self.model, dynamic=False) if compiled else self.model
        self._ids = torch.randint(vocab, batch, generator=torch.Generator().manual_seed(0)).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    @torch.no_grad()
    def _perturb(self) -> None:
        """Away from the start, where the dynamic routing is zero and scales nothing."""
        for module in self.model.modules():
            if isinstance(module, GeneralizedHyperConnection):
                for parameter in module.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))

    def loss(self) -> Tensor:
        """Of both heads, with its graph."""
        with torch.autocast(self._ids.device.type, torch.bfloat16, enabled=self._bf16):
            return self._run(input_ids=self._ids, labels=self._ids, use_cache=False).loss

    def step(self) -> None:
        """One whole training step."""
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def held(self) -> int:
        """Bytes of the parameters, and of the optimiser's state once it has stepped."""
        states = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        return sum(t.nbytes for t in [*self.model.parameters(), *self.model.buffers(), *states])
