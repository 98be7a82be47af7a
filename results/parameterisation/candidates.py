"""The candidates of this page that have no option: trains with one of them.

python results/parameterisation/candidates.py CANDIDATE compare ...   # behind the candidate, what `vwn` takes
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import optimizer

from vwn.nn.embedding import OverWidthReduce
from vwn.nn.generalized import GeneralizedHyperConnection
from vwn.training import run

Change = Callable[[Any], None]


def reads(first_row: Callable[[int, int, int], int]) -> Change:
    """Start the read of sublayer `k` at `m` rows from `first_row(k, m, n)` on."""

    def change(model: nn.Module) -> None:
        connections = [c for c in model.modules() if isinstance(c, GeneralizedHyperConnection)]
        for k, connection in enumerate(connections):
            m, n = connection.geometry.m, connection.geometry.n
            read = connection.bias_alpha[:, :m]
            read.zero_()
            read[(first_row(k, m, n) + torch.arange(m)) % n, torch.arange(m)] = 1

    return change


def carry(share: float) -> Change:
    """Move the columns of the carry by `share` of each step of the optimiser."""

    def change(model: nn.Module) -> None:
        columns = []
        for connection in model.modules():
            if isinstance(connection, GeneralizedHyperConnection):
                m = connection.geometry.m
                columns += [p[:, m:] for p in (connection.bias_alpha, connection.dynamic_alpha, connection.scale_alpha)]
        before: list[Tensor] = []

        def keep(*_: Any) -> None:
            before[:] = [c.detach().clone() for c in columns]

        @torch.no_grad()
        def shorten(*_: Any) -> None:
            for c, old in zip(columns, before, strict=True):
                c.copy_(old + share * (c - old))

        optimizer.register_optimizer_step_pre_hook(keep)
        optimizer.register_optimizer_step_post_hook(shorten)

    return change


def table_start(scale: float) -> Change:
    """Start the table's columns of the slots behind the first `m` at `scale` times their values."""

    def change(model: Any) -> None:
        model.get_input_embeddings().weight[:, model.config.geometry.hidden_size :] *= scale

    return change


def tiled_reduce(model: nn.Module) -> None:
    """Start `W_reduce` as `[I I .. I] r^-½`."""
    for reduce in model.modules():
        if isinstance(reduce, OverWidthReduce):
            d, repeats = reduce.geometry.hidden_size, reduce.geometry.n // reduce.geometry.m
            reduce.weight.copy_(torch.eye(d).repeat(1, repeats) * repeats**-0.5)


class SigmoidReduce(nn.Module):
    """A sum of slots, each times `2 σ(w · x + b)` of the normed state `x`."""

    def __init__(self, n: int, over_width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(n, over_width)), nn.Parameter(torch.zeros(n))

    def forward(self, state: Tensor) -> Tensor:
        normed = state * torch.rsqrt(state.square().mean(-1, keepdim=True) + 1e-5)
        share = 2 * torch.sigmoid(normed @ self.weight.mT + self.bias)
        return (state.unflatten(-1, (len(self.bias), -1)) * share.unsqueeze(-1)).flatten(-2)


class NormedSlots(nn.Module):
    """Slots divided by their RMS, times a learned gain."""

    def __init__(self, n: int, over_width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n, over_width // n))

    def forward(self, state: Tensor) -> Tensor:
        slots = state.unflatten(-1, self.weight.shape)
        return (slots * torch.rsqrt(slots.square().mean(-1, keepdim=True) + 1e-5) * self.weight).flatten(-2)


class SlotScale(nn.Module):
    """Slots times a learned number each, which starts at 1."""

    def __init__(self, n: int, over_width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, state: Tensor) -> Tensor:
        return (state.unflatten(-1, (len(self.weight), -1)) * self.weight.unsqueeze(-1)).flatten(-2)


def before_reduce(kind: type[nn.Module]) -> Change:
    """Put a module in front of every reduce; its parameters are the reduce's."""

    def change(model: nn.Module) -> None:
        for reduce in [r for r in model.modules() if isinstance(r, OverWidthReduce)]:
            reduce.candidate = kind(reduce.geometry.n, reduce.geometry.over_width)
            reduce.register_forward_pre_hook(lambda module, args: (module.candidate(args[0]),))

    return change


def scale_in(model: Any) -> None:
    """Put `SlotScale` behind the embedding; its parameters are the expansion's."""
    embedding, g = model.model.embed_tokens, model.config.geometry
    embedding.candidate = SlotScale(g.n, g.over_width)
    embedding.register_forward_hook(lambda module, args, output: module.candidate(output))


CANDIDATES: dict[str, Change] = {
    "reads-two-groups": reads(lambda k, m, n: m * (k % 2)),
    "reads-cyclic-groups": reads(lambda k, m, n: m * k % n),
    "reads-cyclic-slots": reads(lambda k, m, n: k % n),
    "carry-frozen": carry(0.0),
    "carry-hundredth": carry(0.01),
    "table-start-0.1": table_start(0.1),
    "table-start-0.3": table_start(0.3),
    "reduce-tiled": tiled_reduce,
    "reduce-sigmoid": before_reduce(SigmoidReduce),  # with --reduce sum
    "reduce-normed": before_reduce(NormedSlots),  # with --reduce sum
    "scale-in": scale_in,
    "scale-out": before_reduce(SlotScale),
    "none": lambda model: None,
}


def main() -> None:
    """Change every model that is built, then run `vwn` with the rest of the command."""
    name, build = sys.argv.pop(1), run.build_model
    change = CANDIDATES[name]

    def changed(*args: Any, **kwargs: Any) -> Any:
        model = build(*args, **kwargs)
        if any(isinstance(module, GeneralizedHyperConnection) for module in model.modules()):
            with torch.no_grad():
                change(model)
        return model

    run.build_model = changed
    from vwn.cli import main as vwn

    vwn()


if __name__ == "__main__":
    main()
