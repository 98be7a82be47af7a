"""The parts of a base model: found where they are, refused where they are not what virtual width needs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vwn import UserError
from vwn.hf.anatomy import Anatomy, find_anatomy
from vwn.hf.sublayers import run_probe


class Stack(nn.Module):
    """A base model of two layers; subclasses differ in their forward."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.other_tokens = nn.Embedding(5, 4), nn.Embedding(5, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.rotations = nn.ModuleList([nn.Identity()])
        self.drop, self.norm, self.config = nn.Dropout(0.0), nn.LayerNorm(4), SimpleNamespace(model_type="stack")

    def get_input_embeddings(self) -> Any:
        return self.tokens


class Usual(Stack):
    def forward(self, input_ids: Any = None, inputs_embeds: Any = None) -> Tensor:
        h = self.tokens(input_ids) if inputs_embeds is None else inputs_embeds
        h = self.drop(h)
        for i, layer in enumerate(self.layers[:2]):
            h = layer(h) + i
        return self.norm(h)

    def run(self, inputs_embeds: Tensor, **_: Any) -> Tensor:
        return self(inputs_embeds=inputs_embeds)


class NoNorm(Usual):
    def __init__(self) -> None:
        super().__init__()
        del self.norm

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds)
        return inputs_embeds


class NormTwice(Usual):
    def forward(self, inputs_embeds: Tensor) -> Tensor:
        h = self.norm(inputs_embeds)
        for layer in self.layers:
            h = layer(h)
        return self.norm(h)


class LoopTwice(Usual):
    def forward(self, inputs_embeds: Tensor) -> Tensor:
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds)
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds)
        return self.norm(inputs_embeds)


class Backwards(Usual):
    def forward(self, inputs_embeds: Tensor) -> Tensor:
        return self.norm(self.layers[0](self.layers[1](inputs_embeds)))


class NormUnused(Usual):
    def forward(self, inputs_embeds: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](inputs_embeds))


class TwoStacks(Usual):
    def __init__(self) -> None:
        super().__init__()
        self.layers_too = nn.ModuleList([nn.Linear(4, 4)])


class TwoNorms(Usual):
    def __init__(self) -> None:
        super().__init__()
        self.norm2 = nn.LayerNorm(4)


class Inside(Stack):
    """The loop is in a module inside, and the embedding elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        del self.layers
        self.decoder, self.front = Usual(), nn.ModuleDict({"words": nn.Embedding(5, 4)})

    def get_input_embeddings(self) -> Any:
        return self.front["words"]

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        return self.decoder(inputs_embeds=inputs_embeds)

    run = Usual.run


class ExpertsInside(Usual):
    """A layer with a loop over a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Usual(), Usual()])


class NoEmbeds(Stack):
    def forward(self, input_ids: Tensor) -> Tensor:
        return self.tokens(input_ids)


class NoTable(Usual):
    def get_input_embeddings(self) -> Any:
        return self.layers[0]


FOUND = {
    Usual: Anatomy("", "layers", "norm", "tokens"),
    NoNorm: Anatomy("", "layers", "", "tokens"),
    Inside: Anatomy("decoder", "layers", "norm", "front.words"),
    ExpertsInside: Anatomy("", "layers", "norm", "tokens"),
}


@pytest.mark.parametrize("model_class", FOUND)
def test_the_parts_are_found(model_class: type) -> None:
    assert find_anatomy(model_class()) == FOUND[model_class]


@pytest.mark.parametrize(
    ("model_class", "reason"),
    [
        (TwoNorms, "one norm behind its layers, found norm, norm2"),
        (TwoStacks, "one list of decoder layers, found layers, layers_too"),
        (NoEmbeds, "takes no inputs_embeds"),
        (NoTable, "no token embedding"),
    ],
)
def test_what_is_not_there_once_is_refused(model_class: type, reason: str) -> None:
    with pytest.raises(UserError, match=f"^{model_class.__name__} cannot be widened: .*{reason}"):
        find_anatomy(model_class())


def test_the_norm_and_the_embedding_are_taken() -> None:
    model = Inside()
    norm, table = model.decoder.norm, model.front["words"]
    anatomy = find_anatomy(model)
    assert anatomy.take_norm(model) is norm
    assert anatomy.take_embedding(model) is table
    assert model.front["words"] is None
    h = torch.randn(2, 4)
    torch.testing.assert_close(norm(model(h)), norm(Usual.forward(model.decoder, inputs_embeds=h)))
    assert anatomy.layers(model) is model.decoder.layers
    assert isinstance(Anatomy("", "layers", "", "tokens").take_norm(NoNorm()), nn.Identity)


class NoNormBehind(Usual):
    """A projection is the first module behind the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 4)

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds)
        return self.norm(self.project(inputs_embeds))


class DropsFirst(NoNormBehind):
    def forward(self, inputs_embeds: Tensor) -> Tensor:
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds)
        return self.norm(self.drop(inputs_embeds))


class ProjectsBehind(NoNormBehind):
    def forward(self, inputs_embeds: Tensor) -> Tensor:
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds)
        return self.project(self.norm(inputs_embeds))


def probed(model_class: type) -> None:
    model = model_class().to("meta", torch.bfloat16)
    model.anatomy = find_anatomy(model)
    run_probe(model, 4)


@pytest.mark.parametrize(
    ("model_class", "reason"),
    [
        (NormTwice, "uses its final norm 'norm' elsewhere as well"),
        (LoopTwice, "each of its layers once"),
        (Backwards, "each of its layers once, from the first to the last"),
        (NormUnused, r"its norm and nothing else, not nothing"),
        (NoNormBehind, r"its norm and nothing else, not project \(Linear\), norm \(LayerNorm\)"),
        (ProjectsBehind, r"its norm and nothing else, not norm \(LayerNorm\), project \(Linear\)"),
    ],
)
def test_what_runs_in_another_order_is_refused(model_class: type, reason: str) -> None:
    with pytest.raises(UserError, match=f"^{model_class.__name__} cannot be widened: .*{reason}"):
        probed(model_class)


@pytest.mark.parametrize("model_class", [Usual, NoNorm, Inside, DropsFirst])
def test_the_usual_order_is_taken(model_class: type) -> None:
    probed(model_class)
