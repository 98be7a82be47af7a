"""Tiny models and the helpers every test of the model uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedConfig, Qwen3Config, Qwen3MoeConfig

from conftest import perturb
from vwn.hf import VirtualWidthConfig, VirtualWidthForCausalLM

VOCAB = 61
BACKBONES = ("llama", "qwen3", "mixtral", "qwen3_moe")
MOE_BACKBONES = ("mixtral", "qwen3_moe")
NEW = 6  # tokens of `generate`

_DENSE = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "qwen3": (Qwen3Config, {}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True},
    ),
}


def backbone_config(kind: str = "llama", **changes: Any) -> PreTrainedConfig:
    """A transformers config of width 24 and two layers."""
    config_class, fields = _CONFIGS[kind]
    return config_class(**_DENSE | fields | changes)


def vwn_config(
    kind: str = "llama", m: int = 2, n: int = 3, backbone: dict[str, Any] | None = None, **fields: Any
) -> VirtualWidthConfig:
    """A virtual-width config over a tiny backbone; ``backbone`` changes the backbone's own fields."""
    return VirtualWidthConfig(backbone=backbone_config(kind, **backbone or {}), m=m, n=n, **fields)


def build(config: VirtualWidthConfig, seed: int = 0) -> VirtualWidthForCausalLM:
    """A perturbed model in evaluation mode."""
    torch.manual_seed(seed)
    return perturb(VirtualWidthForCausalLM(config), seed).eval()  # pyright: ignore[reportReturnType]


def stock(kind: str = "llama", seed: int = 0, **changes: Any) -> nn.Module:
    """The untouched transformers model, perturbed, in evaluation mode."""
    torch.manual_seed(seed)
    return perturb(AutoModelForCausalLM.from_config(backbone_config(kind, **changes)), seed).eval()


@torch.no_grad()
def copy_stock_weights(source: nn.Module, target: VirtualWidthForCausalLM) -> VirtualWidthForCausalLM:
    """Every weight of a stock model into the widened one, which has all of them; the table must be ``V x D``."""
    renamed = {}
    for name, value in source.state_dict().items():
        name = name.replace("model.layers.", "model.backbone.layers.")
        renamed[name.replace("embed_tokens.weight", "embed_tokens.table.weight")] = value
    missing, unexpected = target.load_state_dict(renamed, strict=False)
    assert not unexpected
    assert all("connections" in name or "reduce" in name or "mtp" in name for name in missing)
    return target


def token_ids(batch: int = 2, length: int = 9, seed: int = 0) -> Tensor:
    """Random ids without the special ones, ``[batch, length]``."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def generate(model, ids: Tensor | None, **options) -> Any:
    """Generate without an end token, so that all rows get the same number of new tokens."""
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    return model.generate(ids, **options)


def greedy_by_hand(model, ids: Tensor) -> Tensor:
    """The same by a loop over full passes."""
    for _ in range(NEW):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


def step(model: nn.Module, **options: Any) -> dict[str, Tensor]:
    """The loss of a batch, and every gradient."""
    model.zero_grad()
    ids = token_ids()
    loss = model(ids, labels=ids, use_cache=False, **options).loss
    loss.backward()
    return {"loss": loss.detach()} | {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(x.dtype == other[name].dtype and torch.equal(x, other[name]) for name, x in one.items())
