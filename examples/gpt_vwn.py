"""The same with virtual width, n / m = 4 times as wide: python examples/gpt_vwn.py TEXT --steps 1000."""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vwn import GeneralizedHyperConnection, Geometry, OverWidthEmbedding, OverWidthReduce, parameter_groups

VOCABULARY = 256  # bytes


@dataclass
class Config:
    """Sizes of the model."""

    width: int = 128
    depth: int = 4
    heads: int = 4
    window: int = 128
    m: int = 4
    n: int = 16


class Attention(nn.Module):
    """Causal self-attention with rotary positions, behind its norm."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.heads = c.heads
        self.norm = nn.LayerNorm(c.width)
        self.qkv = nn.Linear(c.width, 3 * c.width, bias=False)
        self.out = nn.Linear(c.width, c.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, tokens, width]`` to the same shape."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding of ``[..., tokens, head width]``."""
    half = x.shape[-1] // 2
    speed = 10_000.0 ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(x.shape[-2], device=x.device)[:, None] * speed
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)


class MLP(nn.Module):
    """Two linears with a GELU between them, behind their norm."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(c.width)
        self.up = nn.Linear(c.width, 4 * c.width, bias=False)
        self.down = nn.Linear(4 * c.width, c.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, tokens, width]`` to the same shape."""
        return self.down(F.gelu(self.up(self.norm(x))))


class Block(nn.Module):
    """One layer: attention and MLP, each added to the residual stream."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.attention = Attention(c)
        self.mlp = MLP(c)
        self.connections = nn.ModuleList(GeneralizedHyperConnection(c.width, c.m, c.n) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """The stream before the layer to the stream after it."""
        x = self.connections[0](x, self.attention)
        x = self.connections[1](x, self.mlp)
        return x


class GPT(nn.Module):
    """Byte ids to the logits of the next byte."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.window = c.window
        self.embedding = OverWidthEmbedding(Geometry(c.width, c.m, c.n), VOCABULARY)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.norm = nn.Sequential(OverWidthReduce(Geometry(c.width, c.m, c.n)), nn.LayerNorm(c.width))
        self.head = nn.Linear(c.width, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """``[batch, tokens]`` to ``[batch, tokens, 256]``."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    @torch.no_grad()
    def continued(self, ids: Tensor, count: int, temperature: float = 0.8) -> Tensor:
        """``[batch, tokens]`` and ``count`` sampled ids behind them."""
        for _ in range(count):
            logits = self(ids[:, -self.window :])[:, -1] / temperature
            ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)], dim=1)
        return ids


def optimiser(model: nn.Module, rate: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    return torch.optim.AdamW(parameter_groups(model, rate), betas=(0.9, 0.95))


def train(model: GPT, data: Tensor, steps: int, batch_size: int, rate: float) -> list[float]:
    """Train on random windows of ``data``; the loss of each step, in nats per byte."""
    adam = optimiser(model, rate)
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: min((step + 1) / warm_up, 0.55 + 0.45 * math.cos(math.pi * step / steps))
    )
    losses = []
    for step in range(steps):
        starts = torch.randint(len(data) - model.window, (batch_size,))
        windows = torch.stack([data[i : i + model.window + 1] for i in starts.tolist()])
        loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        schedule.step()
        losses.append(loss.item())
        if step % max(1, steps // 20) == 0 or step == steps - 1:
            print(f"step {step + 1:5d}  loss {losses[-1]:.3f}")
    return losses


def main() -> None:
    """Train on a text file and continue its beginning."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    for name, default in {**vars(Config()), "steps": 1000, "batch_size": 16, "seed": 0, "sample": 200}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--rate", type=float, default=3e-3)
    given = vars(parser.parse_args())
    torch.manual_seed(given["seed"])
    data = torch.tensor(list(given["text"].read_bytes()))
    if len(data) <= given["window"]:
        parser.error(f"{given['text']} has {len(data)} bytes; a window takes {given['window'] + 1}")
    model = GPT(Config(**{name: given[name] for name in vars(Config())}))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    train(model, data, given["steps"], given["batch_size"], given["rate"])
    sample = model.continued(data[None, :16], given["sample"])
    print(bytes(sample[0].tolist()).decode(errors="replace"))


if __name__ == "__main__":
    main()
