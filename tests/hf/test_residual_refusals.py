"""What the residual stream cannot follow is refused with the reason, and never silently computed wrongly."""

from __future__ import annotations

import textwrap
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import toy_layers
from conftest import perturb
from toy_layers import D, run_plain, run_wide, widened
from vwn import UserError

HELPERS: dict[str, Any] = {
    "scaling": lambda x, residual: (x + residual) * 0.5,
    "scaling_first": lambda x, residual: x + residual * 0.5,
    "norming": lambda x, residual: F.layer_norm(x + residual, (D,)),
    "reading": lambda x, residual: x * residual.mean() + residual,
    "twice": lambda x, residual: x + residual + residual,
    "second": lambda x, residual: (x, x + residual),
}


class AddsItself(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(x)


def toy(body: str) -> Any:
    """A layer whose forward is ``body``: ``h`` is the stream, ``z`` a sublayer's output and ``q`` something plain."""
    source = "class Toy(Layer):\n    def forward(self, h, mask=None, items=(1, 2)):\n" + textwrap.indent(
        f"q = torch.ones(())\nz = self.attn(self.norm1(h))[0]\n{textwrap.dedent(body).strip()}\n", " " * 8
    )
    names = {**vars(toy_layers), **globals(), **HELPERS, "__name__": __name__}
    exec(source, names)
    layer = names["Toy"]()
    layer.adds_itself = AddsItself()
    return perturb(layer).double().eval()


IN_PLACE = "its residual stream is changed in place"
HANDED_ON = "what it hands on is not its residual stream"
NO_SUM = "no sum with its residual stream"
NUMBER = "adds 1, which is no tensor"
REFUSED = {
    "return self.norm2(h + z)": HANDED_ON,
    "return h - z": HANDED_ON,
    "return torch.stack([h, z]).sum(0)": HANDED_ON,
    "h = h + z\nreturn self.adds_itself(h)": HANDED_ON,
    "h = h + z\nreturn h.transpose(0, 1)": HANDED_ON,
    "h = h + z\nreturn {'h': h}": HANDED_ON,
    "h = h + z\nreturn ()": HANDED_ON,
    "h /= 2\nreturn h + z": HANDED_ON,
    "return norming(z, h)": HANDED_ON,
    "h, y = second(z, h)\nreturn h": HANDED_ON,
    "return torch.add(h, z, alpha=2)": HANDED_ON,
    "return torch.where(z > 0, h + z, z)": HANDED_ON,
    "return z.add_(h)": HANDED_ON,
    "z += h\nreturn z": HANDED_ON,
    "return h": NO_SUM,
    "r = h\nh = h + z\nreturn r": NO_SUM,
    "return h + h": "to itself",
    "return h + z + h": "to itself",
    "return h * 0.5 + z + h": "to itself",
    "return twice(z, h)": "to itself",
    "y = self.norm2(h + z)\nreturn h + y": "older state",
    "r = h\nh = (h + z).to(z.dtype)\nreturn r": "hands on an older state",
    "return h + scaling(z, h)": "older state",
    "h = h + z\nw = self.mlp(h)\nreturn h, w": "behind the last sum",
    "h = h + z\nreturn h * h.abs().max()": "behind the last sum",
    "h.mul_(2)\nreturn h + z": IN_PLACE,
    "h[:, 0] = 0\nreturn h + z": IN_PLACE,
    "h.data = z\nreturn h + z": IN_PLACE,
    "h.data.copy_(z)\nreturn h + z": "changed in place through its attribute 'data'",
    "torch.add(h, z, out=h)\nreturn h + z": IN_PLACE,
    "torch.relu_(h)\nreturn h + z": IN_PLACE,
    "F.relu(h, inplace=True)\nreturn h + z": IN_PLACE,
    "nn.init.uniform_(h)\nreturn h + z": IN_PLACE,
    "z = self.relu_in_place(h)\nreturn h + z": IN_PLACE,
    "y = h[:, :1]\ny += 1\nreturn h + z": IN_PLACE,
    "y = h.transpose(0, 1)\ny.zero_()\nreturn h + z": IN_PLACE,
    "y = torch.chunk(h, 2, -1)[0]\ny.add_(1)\nreturn h + z": IN_PLACE,
    "h.detach().mul_(2)\nreturn h + z": IN_PLACE,
    "a, b = h, z\na += b\nreturn h + z": IN_PLACE,
    "r = h\nr *= 0.5\ny = self.mlp(h)\nreturn r + y": IN_PLACE,
    "r = h.contiguous()\nh += z\nreturn h + self.mlp(r)": IN_PLACE,
    "r = h[:, :1]\nh *= 2.0\nreturn h + z + r": IN_PLACE,
    "h = h + z\nh += self.mlp(h)\nreturn h": IN_PLACE,
    "a = h + z\nh *= self.scale\nreturn a + self.mlp(h)": IN_PLACE,
    "return h + z + 1": NUMBER,
    "h += 1\nreturn h + z": NUMBER,
    "a = [h]\na[0] += 1\nreturn h + z": NUMBER,
    "return h.view(-1, D) + z": "viewed as (8, 6)",
    "return h.view(-1, D) + z.view(-1, D)": "in the shape (8, 6)",
    "return h + z[:, :1, :1]": "adds a tensor [2, 1, 1]",
}


@pytest.mark.parametrize("body", REFUSED)
def test_is_refused(body: str) -> None:
    with pytest.raises(UserError, match="Toy cannot be widened by itself: ") as caught:
        toy_layers.found(toy(body))
    assert REFUSED[body] in str(caught.value)
    assert "register_layout" in str(caught.value)


RIGHT = [
    "return z + self.mlp(h) + h",
    "return (h + z) + self.mlp(self.norm2(h))",
    "r = h\nh = r + z\nreturn h + self.mlp(self.norm2(r))",
    "return self.mlp(self.norm2(h := h + z)) + h",
    "h = self.gain * h + z\nr = h\nh = r * self.scale + self.mlp(self.norm2(h))\nh *= self.gain\nreturn h",
    "r = h\nh = r + z.view(r.shape)\nz = self.mlp(self.norm2(h).view(-1, D))\nreturn h + z.reshape(h.size())",
    "h = add(z, h, self.scale, training=False)\nreturn add(self.mlp(self.norm2(h)), h)",
    "return h + self.adds_itself(h)",
    "h = z * 2 + h\nreturn (h,)",
    "h = h.clone()\nreturn h.view(h.shape) + z.expand_as(h)",
    "return torch.add(h, z)",
    "return torch.add(z, h)",
    "h = h + z\nh = h * 2\nreturn h",
    "for i in items:\n    h = h + z\nreturn h",
    "return scaling(z, h)",
    "return scaling_first(z, h)",
    "return reading(z, residual=h)",
    "h = h + z\nh *= q\nreturn h",
    "b, s, d = h.shape\nreturn h + z.view(b, s, d) * h.ndim",
    "h = h.to(h.dtype)\nreturn (h + z).to(z.dtype)",
    "return h * z.mean(-1, keepdim=True) + z",
    "return h.view(-1, D).view(h.shape) + z",
    "y = torch.stack([h, z]).sum(0)\nreturn h + y",
    "h = h + z\nreturn h + h * z",
]


@pytest.mark.parametrize("body", RIGHT)
def test_is_right(body: str) -> None:
    """Values, and gradients of the input and of every weight."""
    layer = toy(body)
    wide, weight = widened(layer), torch.randn(2, 4, D).double()
    results = []
    for run, module in ((run_plain, layer), (run_wide, wide)):
        h = torch.randn(2, 4, D, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
        out = run(module, h)[0]
        leaves = [h, *(module.get_parameter(name) for name, _ in layer.named_parameters())]
        gradients = torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True, materialize_grads=True)
        results.append((out.detach(), *gradients))
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)


class OfItsOwn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Tensor:
        return torch.tanh(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@pytest.mark.parametrize(
    "body",
    [
        "with torch.no_grad():\n    h = h + z\nreturn h",
        "with torch.no_grad():\n    y = self.mlp(h)\nreturn h + y",
        "return h + OfItsOwn.apply(h)",
    ],
)
def test_a_part_without_gradients_is_refused_where_there_are_some(body: str) -> None:
    wide, h = widened(toy(body)), torch.randn(2, 4, D).double()
    with torch.no_grad():
        run_wide(wide, h)
    with pytest.raises(UserError, match="switches gradients off or on"):
        run_wide(wide, h)


def test_branches_are_followed_at_run_time() -> None:
    """Attributes changed after widening, and the mode: right as long as the number of sums is the same."""
    layer = toy(
        "if self.parallel:\n    return h + z\ny = self.mlp(h) if self.training else z\nreturn h + y * self.scale"
    )
    wide, h = widened(layer), torch.randn(2, 4, D).double()
    for change in ({}, {"parallel": False}, {"training": True}, {"scale": 3.0}, {"mlp": nn.Linear(D, D).double()}):
        for module in (layer, wide):
            for name, value in change.items():
                setattr(module, name, value)
        with torch.no_grad():
            torch.testing.assert_close(run_wide(wide, h)[0], run_plain(layer, h)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("body", "times"),
    [
        ("h = h + z\nif self.training:\n    h = h + self.mlp(h)\nreturn h", "behind the last sum"),
        ("h = h + z\nif not self.training:\n    h = h + self.mlp(h)\nreturn h", "1 times in this pass, and 2 times"),
    ],
)
def test_another_number_of_sums_is_refused(body: str, times: str) -> None:
    wide = widened(toy(body)).train()
    with pytest.raises(UserError, match=times):
        run_wide(wide, torch.randn(2, 4, D).double())
