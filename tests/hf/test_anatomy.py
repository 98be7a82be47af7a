"""The parts of a base model: found where they are, refused where they are not what virtual width needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vwn import UserError
from vwn.hf.anatomy import Anatomy, find_anatomy


class Stack(nn.Module):
    """A base model of two layers; subclasses differ in their forward."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.other_tokens = nn.Embedding(5, 4), nn.Embedding(5, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.layers_too = nn.ModuleList([nn.Linear(4, 4)])
        self.drop, self.norm, self.norm2 = nn.Dropout(0.0), nn.LayerNorm(4), nn.LayerNorm(4)

    def get_input_embeddings(self) -> Any:
        return self.tokens


class Usual(Stack):
    def forward(self, input_ids: Any = None, inputs_embeds: Any = None) -> Tensor:
        h = self.tokens(input_ids) if inputs_embeds is None else inputs_embeds
        h = self.drop(h)
        for i, layer in enumerate(self.layers[:2]):
            h = layer(h) + i
        return self.norm(h)


class NoNorm(Stack):
    def forward(self, inputs_embeds: Tensor) -> Tensor:
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds)
        return inputs_embeds


class NormTwice(Stack):
    def forward(self, inputs_embeds: Tensor) -> Tensor:
        h = self.norm(inputs_embeds)
        for layer in self.layers:
            h = layer(h)
        return self.norm(h)


class NoLoop(Stack):
    def forward(self, inputs_embeds: Tensor) -> Tensor:
        return self.norm(self.layers[1](self.layers[0](inputs_embeds)))


class NestedLoop(Stack):
    def forward(self, inputs_embeds: Tensor) -> Tensor:
        for _ in range(2):
            for layer in self.layers:
                inputs_embeds = layer(inputs_embeds)
        return self.norm(inputs_embeds)


class LoopTwice(Stack):
    def forward(self, inputs_embeds: Tensor) -> Tensor:
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds)
        h = self.norm2(inputs_embeds)
        for layer in self.layers:
            h = layer(h)
        return self.norm(h)


class TwoStacks(Stack):
    def forward(self, inputs_embeds: Tensor) -> Tensor:
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds)
        for layer in self.layers_too:
            inputs_embeds = layer(inputs_embeds)
        return self.norm(inputs_embeds)


class LongerName(Stack):
    def forward(self, inputs_embeds: Tensor) -> Tensor:
        for layer in self.layers_too:
            inputs_embeds = layer(inputs_embeds)
        return self.norm2(inputs_embeds)


class Inside(Stack):
    """The loop is in a module inside, and the embedding elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.front = Usual(), nn.ModuleDict({"words": nn.Embedding(5, 4)})

    def get_input_embeddings(self) -> Any:
        return self.front["words"]

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        return self.decoder(inputs_embeds=inputs_embeds)


class ExpertsInside(Usual):
    """A layer with a loop over a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([LongerName(), LongerName()])


class NoEmbeds(Stack):
    def forward(self, input_ids: Tensor) -> Tensor:
        return self.tokens(input_ids)


class NoTable(Usual):
    def get_input_embeddings(self) -> Any:
        return self.layers[0]


FOUND = {
    Usual: Anatomy("", "layers", "norm", "tokens"),
    NoNorm: Anatomy("", "layers", "", "tokens"),
    LongerName: Anatomy("", "layers_too", "norm2", "tokens"),
    Inside: Anatomy("decoder", "layers", "norm", "front.words"),
    ExpertsInside: Anatomy("", "layers", "norm", "tokens"),
}


@pytest.mark.parametrize("model_class", FOUND)
def test_the_parts_are_found(model_class: type) -> None:
    assert find_anatomy(model_class()) == FOUND[model_class]


@pytest.mark.parametrize(
    ("model_class", "reason"),
    [
        (NormTwice, "uses its final norm 'norm' elsewhere as well"),
        (NoLoop, "one list of decoder layers, found none"),
        (NestedLoop, "one list of decoder layers, found none"),
        (LoopTwice, "one list of decoder layers, found none"),
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


class NoNormBehind(Stack):
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


class NormBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)


class NormInNameOnly(NoNormBehind):
    def __init__(self) -> None:
        super().__init__()
        self.project = NormBlock()


@pytest.mark.parametrize(
    ("model_class", "found"),
    [
        (NoNormBehind, r"project \(Linear\), norm \(LayerNorm\)"),
        (ProjectsBehind, r"norm \(LayerNorm\), project \(Linear\)"),
        (NormInNameOnly, r"project \(NormBlock\), norm"),
    ],
)
def test_what_is_behind_the_layers_is_a_norm(model_class: Any, found: str) -> None:
    with pytest.raises(UserError, match=f"should run a norm and nothing else, not {found}"):
        find_anatomy(model_class())


def test_what_only_drops_is_passed_over() -> None:
    assert find_anatomy(DropsFirst()).norm_name == "norm"
