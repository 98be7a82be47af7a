"""Layers on a residual stream that is an object: they compute what they do without, whatever their habits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import toy_layers as toys
from conftest import perturb
from vwn import widen
from zoo import tiny_causal_lm

WITH_MASK = [toys.PreNorm, toys.Arguments]


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


@pytest.mark.parametrize(
    ("layer_class", "names"),
    [
        (toys.PreNorm, ("attn", "mlp")),
        (toys.PostNormInside, ("attn", "mlp")),
        (toys.Helpers, ("adding_attention", "mlp", "adding")),
        (toys.Casts, ("attn", "mlp")),
    ],
)
def test_sublayers_have_names(layer_class: Any, names: tuple[str, ...]) -> None:
    assert toys.found(layer_class()).names == names


def test_the_state_is_the_first_argument() -> None:
    """Not the first tensor that comes along, and by name as well."""
    wide, h = toys.widened(perturb(toys.PreNorm()).double()), torch.randn(1, 3, toys.D).double()
    state, mask = torch.randn(1, 3, toys.N * toys.D).double(), torch.rand(1, 3, 1).double()
    assert torch.equal(wide(mask=mask, hidden_states=state), wide(state, mask))
    with pytest.raises(KeyError, match="hidden_states"):
        wide(mask=h)


def test_a_module_put_in_later_reads_too() -> None:
    layer = perturb(toys.PostNormInside()).double()
    wide, h = toys.widened(layer), torch.randn(1, 3, toys.D).double()
    layer.attn = wide.attn = perturb(toys.Core(), seed=5).double()
    torch.testing.assert_close(toys.run_wide(wide, h)[0], toys.run_plain(layer, h)[0])


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt2", "cohere"])
def test_compiles_in_one_graph(model_type: str) -> None:
    wide = perturb(widen(tiny_causal_lm(model_type), m=2, n=3), scale=0.05).eval()
    ids = torch.randint(1, 90, (2, 9))
    with torch.no_grad():
        expected = wide(ids, use_cache=False).logits
        torch._dynamo.reset()
        compiled = torch.compile(wide, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
