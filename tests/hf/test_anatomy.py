"""The parts of a base model: found where they are, refused where they are not what virtual width needs."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vwn import UserError
from vwn.hf.anatomy import Anatomy, find_anatomy
from vwn.hf.sublayers import run_probe


def through(model: Any, h: Tensor) -> Tensor:
    for layer in model.layers:
        h = layer(h)
    return h


def usual(model: Any, h: Tensor) -> Tensor:
    return model.norm(through(model, model.drop(h)))


class Stack(nn.Module):
    """A base model of two layers.

    Args:
        order: what its forward does.
        parts: further modules, or ``None`` for one that it lacks.
    """

    def __init__(self, order: Callable[[Any, Tensor], Tensor] = usual, **parts: nn.Module | None) -> None:
        super().__init__()
        self.order, self.config = order, SimpleNamespace(model_type="stack")
        self.tokens, self.other_tokens = nn.Embedding(5, 4), nn.Embedding(5, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.rotations = nn.ModuleList([nn.Identity()])
        self.drop, self.norm, self.project = nn.Dropout(0.0), nn.LayerNorm(4), nn.Linear(4, 4)
        for name, part in parts.items():
            if part is None:
                delattr(self, name)
            else:
                setattr(self, name, part)

    def get_input_embeddings(self) -> Any:
        return self.tokens

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        return self.order(self, inputs_embeds)

    def run(self, inputs_embeds: Tensor, **_: Any) -> Tensor:
        return self(inputs_embeds)


class Inside(Stack):
    """The layers are in a module inside, and the embedding elsewhere."""

    def __init__(self) -> None:
        super().__init__(lambda model, h: model.decoder(h), layers=None, decoder=Stack())
        self.front = nn.ModuleDict({"words": nn.Embedding(5, 4)})

    def get_input_embeddings(self) -> Any:
        return self.front["words"]


def probed(model: Any) -> Anatomy:
    model = model.to("meta", torch.bfloat16)
    model.anatomy = find_anatomy(model)
    run_probe(model, 4)
    return model.anatomy


@pytest.mark.parametrize(
    ("model", "anatomy"),
    [
        (Stack(), Anatomy("layers", "norm", "tokens")),
        (Stack(through, norm=None), Anatomy("layers", "", "tokens")),
        (Stack(lambda m, h: m.norm(m.drop(through(m, h)))), Anatomy("layers", "norm", "tokens")),
        (Stack(layers=nn.ModuleList([Stack(), Stack()])), Anatomy("layers", "norm", "tokens")),
        (Inside(), Anatomy("decoder.layers", "decoder.norm", "front.words")),
    ],
    ids=["usual", "no norm", "drops behind", "lists of their own in the layers", "inside"],
)
def test_the_parts_are_found(model: Any, anatomy: Anatomy) -> None:
    assert probed(model) == anatomy


ORDER = "run each of its layers once, in turn, and its norm once, with nothing else behind"


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Stack(norm2=nn.LayerNorm(4)), "one norm behind its layers, found norm, norm2"),
        (Stack(layers_too=nn.ModuleList([nn.Linear(4, 4)])), "one list of decoder layers, found layers, layers_too"),
        (Stack(tokens=nn.Linear(4, 4)), "no token embedding"),
        (Stack(lambda m, h: usual(m, m.norm(h))), ORDER),
        (Stack(lambda m, h: usual(m, through(m, h))), ORDER),
        (Stack(lambda m, h: m.norm(m.layers[0](m.layers[1](h)))), ORDER),
        (Stack(through), ORDER),
        (Stack(lambda m, h: m.norm(m.project(through(m, h)))), ORDER),
        (Stack(lambda m, h: m.project(usual(m, h))), ORDER),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_models_are_refused(model: Any, reason: str) -> None:
    with pytest.raises(UserError, match=f"^{type(model).__name__} cannot be widened: .*{reason}"):
        probed(model)


def test_the_norm_and_the_embedding_are_taken() -> None:
    model, h = Inside(), torch.randn(2, 4)
    norm, table, wanted = model.decoder.norm, model.front["words"], model(h)
    anatomy = find_anatomy(model)
    assert [*map(id, anatomy.take_ends(model))] == [id(norm), id(table)]
    assert model.front["words"] is None
    torch.testing.assert_close(norm(model(h)), wanted)
    assert anatomy.layers(model) is model.decoder.layers
    assert isinstance(Anatomy("layers", "", "tokens").take_ends(Stack(through, norm=None))[0], nn.Identity)
