"""The structure found in a layer's source: the widened layer computes what the layer does, whatever its habits."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import toy_layers as toys
from conftest import perturb
from zoo import tiny_causal_lm

from vwn import UserError, widen
from vwn.hf.structure import find_structure

WITH_MASK = [toys.PreNorm, toys.Sandwich, toys.Helpers, toys.Branches, toys.Arguments]
IN_PLACE = [toys.InPlace, toys.ScaledBetween]  # what they change is needed in their own backward


@pytest.mark.parametrize(
    ("layer_class", "with_mask"), [*((c, False) for c in toys.WIDENED), *((c, True) for c in WITH_MASK)]
)
def test_equals_the_plain_layer_in_any_basis(layer_class: Any, with_mask: bool) -> None:
    layer = perturb(layer_class()).double().eval()
    mask = torch.rand(2, 4, 1).double() if with_mask else None
    arguments = {"mask": mask} if with_mask else {}
    wide = toys.widened(layer)
    h, weight = torch.randn(2, 4, toys.D).double().requires_grad_(), torch.randn(2, 4, toys.D).double()
    (plain, w), (out, wide_w) = toys.run_plain(layer, h, **arguments), toys.run_wide(wide, h, **arguments)
    torch.testing.assert_close(out, plain, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(wide_w, w)
    if layer_class in IN_PLACE:
        return
    used = [name for name, p in layer.named_parameters()]
    expected = torch.autograd.grad((plain * weight).sum(), [h, *layer.parameters()], allow_unused=True)
    parameters = dict(wide.named_parameters())
    found = torch.autograd.grad((out * weight).sum(), [h, *(parameters[n] for n in used)], allow_unused=True)
    for name, e, f in zip(["input", *used], expected, found, strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(
            zero if f is None else f, zero if e is None else e, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_keeps_the_arguments_of_the_layer() -> None:
    layer = perturb(toys.Arguments()).double()
    h = torch.randn(1, 3, toys.D).double()
    (plain, _), (out, _) = toys.run_plain(layer, h, factor=2.0), toys.run_wide(toys.widened(layer), h, factor=2.0)
    torch.testing.assert_close(out, plain)
    assert not torch.equal(plain, toys.run_plain(layer, h)[0])
    with pytest.raises(TypeError, match="facto"):
        toys.run_wide(toys.widened(layer), h, facto=2.0)


def test_what_was_assumed_absent_is_refused_when_it_comes() -> None:
    layer = perturb(toys.CrossAttention()).double()
    h = torch.randn(1, 3, toys.D).double()
    with pytest.raises(ValueError, match="without an encoder and takes no encoder_hidden_states"):
        toys.run_wide(toys.widened(layer), h, encoder_hidden_states=h)
    layer.is_cross_attention = True
    with pytest.raises(UserError, match=r"what it hands on|branch"):
        find_structure(layer)


@pytest.mark.parametrize(
    ("layer_class", "norms", "names"),
    [
        (toys.PreNorm, ("norm1", "norm2"), ("attn", "mlp")),
        (toys.Sandwich, ("norm1", "norm3"), ("attn", "mlp")),
        (toys.PostNormInside, (None, None), ("attn", "mlp")),
        (toys.ParallelOneSum, ("norm1",), ("attn",)),
        (toys.ParallelStreamFirst, (None,), ("attn",)),
        (toys.Shapes, ("norm1", "norm2"), ("attn", "mlp")),
        (toys.Helpers, (None, None, None), ("adding_attention", "mlp", "adding")),
        (toys.Casts, (None, None), ("attn", "mlp")),
    ],
)
def test_norms_and_names(layer_class: Any, norms: tuple[str | None, ...], names: tuple[str, ...]) -> None:
    structure = find_structure(layer_class())
    assert (structure.norms, structure.names) == (norms, names)


def test_layers_of_one_structure_share_their_function() -> None:
    first, second, other = toys.PreNorm(), toys.PreNorm(), toys.Branches()
    found = find_structure(first)
    alike = [find_structure(second), copy.deepcopy(found), pickle.loads(pickle.dumps(found))]
    assert all(s._function is found._function and vars(s) == vars(found) for s in alike)
    other.parallel = False
    with pytest.raises(UserError):
        find_structure(other)
    assert find_structure(toys.Branches()).source != found.source


def test_a_copied_and_a_pickled_layer_run_the_same() -> None:
    wide = toys.widened(perturb(toys.Helpers()).double())
    h = torch.randn(1, 3, toys.D).double()
    expected = toys.run_wide(wide, h)[0]
    for again in (copy.deepcopy(wide), pickle.loads(pickle.dumps(wide))):
        assert torch.equal(toys.run_wide(again, h)[0], expected)


def test_a_replaced_forward_is_refused() -> None:
    layer = toys.PreNorm()
    layer.forward = layer.forward  # type: ignore[method-assign] # as accelerate does
    with pytest.raises(UserError, match="replaced the forward of this instance"):
        find_structure(layer)


def test_without_source_or_stream_it_is_refused() -> None:
    names: dict[str, Any] = {"Layer": toys.Layer}
    exec("class Unread(Layer):\n    def forward(self, h):\n        return h + self.mlp(h)", names)
    with pytest.raises(UserError, match=r"source of Unread\.forward cannot be read"):
        find_structure(names["Unread"]())
    with pytest.raises(UserError, match="does not take the residual stream as its first argument"):
        find_structure(toys.NoStream())
    with pytest.raises(UserError, match="calls super"):
        find_structure(toys.Inheriting())


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt2", "gemma3_text"])
def test_compiles_in_one_graph(model_type: str) -> None:
    plain = tiny_causal_lm(model_type)
    wide = perturb(widen(plain, m=2, n=3), scale=0.05).eval()
    ids = torch.randint(1, 90, (2, 9))
    with torch.no_grad():
        expected = wide(ids, use_cache=False).logits
        torch._dynamo.reset()
        compiled = torch.compile(wide, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
