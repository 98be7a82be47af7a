"""Backbones by name, and their learning rates.

Only the rates of ``micro`` and ``tiny`` come from sweeps (results/quickstart/README.md). The others are starting
points, not tuned values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A small Llama (or, with experts, of which 2 are active, a Mixtral) and its peak learning rates, plain and wide.

    Heads are 32 wide up to width 256, else 64. ``swept`` says whether the rates come from a sweep.
    """

    depth: int
    width: int
    learning_rate: float
    wide_learning_rate: float
    experts: int = 0
    swept: bool = False

    def parameters(self, vocab_size: int = 32_768) -> int:
        """Return the number of parameters of the plain model."""
        attention, ffn = 4 * self.width**2, 3 * self.width * self.fields(vocab_size, 0)["intermediate_size"]
        experts = self.experts * (ffn + self.width) if self.experts else ffn  # with the router's row for each
        return 2 * vocab_size * self.width + self.depth * (attention + experts + 2 * self.width) + self.width

    def fields(self, vocab_size: int, window: int) -> dict[str, Any]:
        """Return keyword arguments of the transformers config."""
        heads = self.width // (32 if self.width <= 256 else 64)
        shared = dict(
            vocab_size=vocab_size,
            hidden_size=self.width,
            num_hidden_layers=self.depth,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=max(window, 2048),
            bos_token_id=None,
            pad_token_id=None,
            tie_word_embeddings=False,
            initializer_range=self.width**-0.5,
        )
        if self.experts:
            return shared | dict(
                model_type="mixtral",
                intermediate_size=self.width * 2,
                num_local_experts=self.experts,
                num_experts_per_tok=2,
                output_router_logits=True,
                router_aux_loss_coef=0.01,
            )
        # SwiGLU with three matrices at 8/3 of the width costs what two at 4 would.
        return shared | dict(model_type="llama", intermediate_size=round(self.width * 8 / 3 / 32) * 32)


PRESETS = {
    "micro": Preset(depth=8, width=32, learning_rate=1.2e-2, wide_learning_rate=1.2e-2, swept=True),
    "nano": Preset(depth=4, width=64, learning_rate=1e-2, wide_learning_rate=1e-2),
    "tiny": Preset(depth=4, width=128, learning_rate=1.2e-2, wide_learning_rate=1.2e-2, swept=True),
    "tiny-moe": Preset(depth=4, width=128, learning_rate=6e-3, wide_learning_rate=6e-3, experts=4),
    "small": Preset(depth=6, width=256, learning_rate=3e-3, wide_learning_rate=3e-3),
    "medium": Preset(depth=12, width=384, learning_rate=2e-3, wide_learning_rate=2e-3),
    "large": Preset(depth=12, width=768, learning_rate=1e-3, wide_learning_rate=1e-3),
    "xl": Preset(depth=24, width=1024, learning_rate=6e-4, wide_learning_rate=6e-4),
}
