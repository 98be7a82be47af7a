"""The parts of a base model: found where they are, refused where they are not what virtual width needs."""

from __future__ import annotations

import itertools
import linecache
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vwn import UserError
from vwn.hf.anatomy import Anatomy, find_anatomy

_count = itertools.count()


class NormBlock(nn.Module):
    """A norm in name only."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)


class Stack(nn.Module):
    """What the toy base models are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(5, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.layers_too = nn.ModuleList([nn.Linear(4, 4)])
        self.drop, self.norm, self.norm2 = nn.Dropout(0.0), nn.LayerNorm(4), nn.LayerNorm(4)
        self.project, self.norm_block = nn.Linear(4, 4), NormBlock()

    def get_input_embeddings(self) -> Any:
        return self.tokens


def toy(body: str, arguments: str = "inputs_embeds") -> Any:
    """A base model whose forward is ``body``; ``h`` is the stream."""
    name = f"<toy {next(_count)}>"
    source = f"class Toy(Stack):\n    def forward(self, {arguments}):\n        h = {arguments}\n"
    source += textwrap.indent(body, " " * 8)
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    names = {"Stack": Stack, "__name__": __name__}
    exec(compile(source, name, "exec"), names)
    return names["Toy"]()


LOOP = "for layer in self.layers:\n    h = layer(h)\n"
LOOP_TOO = "for layer in self.layers_too:\n    h = layer(h)\n"
USUAL = "h = self.drop(h)\nfor i, layer in enumerate(self.layers[:2]):\n    h = layer(h) + i\nreturn self.norm(h)"


class Inside(Stack):
    """The loop is in a module inside, and the embedding elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.front = toy(USUAL), nn.ModuleDict({"words": nn.Embedding(5, 4)})

    def get_input_embeddings(self) -> Any:
        return self.front["words"]

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        return self.decoder(inputs_embeds=inputs_embeds)


def with_experts() -> Any:
    """A layer has a loop over a list of its own."""
    model = toy(USUAL)
    model.layers = nn.ModuleList([toy(LOOP_TOO + "return h"), toy(LOOP_TOO + "return h")])
    return model


@pytest.mark.parametrize(
    ("make", "anatomy"),
    [
        (lambda: toy(USUAL), Anatomy("", "layers", "norm", "tokens")),
        (lambda: toy(LOOP + "return h"), Anatomy("", "layers", "", "tokens")),
        (lambda: toy(LOOP + "return self.norm(self.drop(h))"), Anatomy("", "layers", "norm", "tokens")),
        (lambda: toy(LOOP_TOO + "return self.norm2(h)"), Anatomy("", "layers_too", "norm2", "tokens")),
        (Inside, Anatomy("decoder", "layers", "norm", "front.words")),
        (with_experts, Anatomy("", "layers", "norm", "tokens")),
    ],
)
def test_the_parts_are_found(make: Any, anatomy: Anatomy) -> None:
    assert find_anatomy(make()) == anatomy


BEHIND = "should run a norm and nothing else, not "
REFUSED = {
    "h = self.norm(h)\n" + LOOP + "return self.norm(h)": "uses its final norm 'norm' elsewhere as well",
    "return self.norm(self.layers[1](self.layers[0](h)))": "one list of decoder layers, found none",
    f"for _ in range(2):\n{textwrap.indent(LOOP, '    ')}return self.norm(h)": "one list of decoder layers, found none",
    LOOP + "h = self.norm2(h)\n" + LOOP + "return self.norm(h)": "one list of decoder layers, found none",
    LOOP + LOOP_TOO + "return self.norm(h)": "one list of decoder layers, found layers, layers_too",
    LOOP + "return self.norm(self.project(h))": BEHIND + r"project \(Linear\), norm \(LayerNorm\)",
    LOOP + "return self.project(self.norm(h))": BEHIND + r"norm \(LayerNorm\), project \(Linear\)",
    LOOP + "return self.norm_block(h)": BEHIND + r"norm_block \(NormBlock\)",
}


@pytest.mark.parametrize("body", REFUSED)
def test_what_is_not_there_once_is_refused(body: str) -> None:
    with pytest.raises(UserError, match=f"^Toy cannot be widened: .*{REFUSED[body]}"):
        find_anatomy(toy(body))


def test_an_embedding_and_a_way_to_give_its_rows_are_needed() -> None:
    with pytest.raises(UserError, match="takes no inputs_embeds"):
        find_anatomy(toy("return h", "input_ids"))
    model = toy(USUAL)
    model.tokens = model.project
    with pytest.raises(UserError, match="no token embedding"):
        find_anatomy(model)


def test_the_norm_and_the_embedding_are_taken() -> None:
    model, h = Inside(), torch.randn(2, 4)
    norm, table, wanted = model.decoder.norm, model.front["words"], model(h)
    anatomy = find_anatomy(model)
    assert anatomy.take_norm(model) is norm
    assert anatomy.take_embedding(model) is table
    assert model.front["words"] is None
    torch.testing.assert_close(norm(model(h)), wanted)
    assert anatomy.layers(model) is model.decoder.layers
    assert isinstance(Anatomy("", "layers", "", "tokens").take_norm(toy(LOOP + "return h")), nn.Identity)
