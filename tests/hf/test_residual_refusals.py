"""What the residual stream cannot follow is refused with the reason, and never silently computed wrongly."""

from __future__ import annotations

import functools  # noqa: F401 - for the toys
import operator  # noqa: F401
import textwrap
from operator import iadd  # noqa: F401
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import toy_layers
from conftest import perturb
from toy_layers import D, run_plain, run_wide, widened
from vwn import UserError


def changing_x(x: Tensor, residual: Tensor) -> Tensor:
    x += residual
    return x


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
    "h = self.norm2(h + z)\nreturn h": HANDED_ON,
    "return h - z": HANDED_ON,
    "return torch.stack([h, z]).sum(0)": HANDED_ON,
    "return self.adds_itself(h)": HANDED_ON,
    "h = h + z\nh = self.adds_itself(h)\nreturn h": HANDED_ON,
    "h = h + z\nh = h.transpose(0, 1)\nreturn h": HANDED_ON,
    "h = h + z\nh = torch.clamp(h, -1, 1)\nreturn h": HANDED_ON,
    "h = h + z\nreturn {'h': h}": HANDED_ON,
    "h = h + z\nreturn": HANDED_ON,
    "h = h + z\nreturn ()": HANDED_ON,
    "h = h + z": HANDED_ON,
    "return h": NO_SUM,
    "h -= z\nreturn h": HANDED_ON,
    "h /= 2\nreturn h + z": HANDED_ON,
    "return h + h": "to itself",
    "return h + z + h": "to itself",
    "return h * 0.5 + z + h": "to itself",
    "r = h\nh = h + z\nreturn r": NO_SUM,
    "y = self.norm2(h + z)\nreturn h + y": "older state",
    "r = h\nh = h + z\nreturn h + z + r": "to itself",
    "h = h + z\nw = self.mlp(h)\nreturn h, w": "behind the last sum",
    "if mask is not None:\n    h = h + z\nreturn h": NO_SUM,
    "while mask:\n    h = h + z\nreturn h": NO_SUM,
    "y = [self.mlp(h + z * i) for i in items][0]\nreturn h + y": "older state",
    "y = mask is None and self.mlp(h + z)\nreturn h + y": "older state",
    "y = self.mlp(h + z if mask is None else h)\nreturn h + y": "older state",
    "h.mul_(2)\nreturn h + z": IN_PLACE,
    "h.add_(z)\nreturn h + z": IN_PLACE,
    "y = h.add_(z)\nreturn h + y": IN_PLACE,
    "h[:, 0] = 0\nreturn h + z": IN_PLACE,
    "h[:, 0] += 1\nreturn h + z": IN_PLACE,
    "h.data = z\nreturn h + z": IN_PLACE,
    "h.data.copy_(z)\nreturn h + z": "changed in place through its attribute 'data'",
    "torch.add(h, z, out=h)\nreturn h + z": IN_PLACE,
    "torch.relu_(h)\nreturn h + z": IN_PLACE,
    "F.relu(h, inplace=True)\nreturn h + z": IN_PLACE,
    "z = self.relu_in_place(h)\nreturn h + z": IN_PLACE,
    "y = h[:, :1]\ny += 1\nreturn h + z": IN_PLACE,
    "y = h.transpose(0, 1)\ny.zero_()\nreturn h + z": IN_PLACE,
    "a, b = h, z\na += b\nreturn h + z": IN_PLACE,
    "a = [h, z]\na[0][:] = 0\nreturn h + z": IN_PLACE,
    "y = self.drop(h)\ny += 1\nreturn h + z": IN_PLACE,
    "self.kept = h\nself.kept += 1\nreturn h + z": NUMBER,
    "h.__iadd__(z)\nreturn h + z": IN_PLACE,
    "setattr(self, 'kept', h)\nself.kept += 1\nreturn h + z": NUMBER,
    "operator.iadd(h, z)\nreturn h + z": IN_PLACE,
    "iadd(h, z)\nreturn h + z": IN_PLACE,
    "y = list(map(torch.relu_, [h]))\nreturn h + z": IN_PLACE,
    "y = list(map(functools.partial(torch.relu_), [h]))\nreturn h + z": IN_PLACE,
    "f = torch.relu_\ny = f(h)\nreturn h + z": IN_PLACE,
    "a = []\na.append(h)\na[0] += 1\nreturn h + z": NUMBER,
    "y = [x.mul_(2) for x in (h,)]\nreturn h + z": IN_PLACE,
    "y = [x for x in (h,)][0]\ny += 1\nreturn h + z": NUMBER,
    "nn.init.ones_(tensor=h)\nreturn h + z": IN_PLACE,
    "y = torch.chunk(h, 2, -1)[0]\ny.add_(1)\nreturn h + z": IN_PLACE,
    "if mask is None:\n    h += 1\nreturn h + z": NUMBER,
    "if mask is None:\n    y = h\n    y *= 2\nreturn h + z": IN_PLACE,
    "for y in (h, z):\n    y.mul_(2)\nreturn h + z": IN_PLACE,
    "r = h.contiguous()\nh += z\nreturn h + self.mlp(r)": IN_PLACE,
    "r = h[:, :1]\nh *= 2.0\nreturn h + z + r": IN_PLACE,
    "y = z\nz += h\nreturn z + self.mlp(y)": "write 'z = z + h' for 'z += h'",
    "f = lambda: h\nh = h + z\nreturn h + f()": "to itself",
    "y = self.mlp(h := self.mlp(z))\nreturn h + y": HANDED_ON,
    "match items:\n    case [h, *_]:\n        pass\nreturn h + z": HANDED_ON,
    "return norming(z, h)": HANDED_ON,
    "return twice(z, h)": "to itself",
    "return changing_x(z, h)": HANDED_ON,
    "h, y = second(z, h)\nreturn h": HANDED_ON,
    "h, y = add(z, h)\nreturn h": HANDED_ON,
    "y = lambda x, residual: x\nadd = y\nreturn add(z, h)": HANDED_ON,
    "return h + scaling(z, h)": "older state",
    "y, w = second(z, h)\nreturn h + w": "to itself",
    "r = h.clone()\nh += z\ny = z[:, :1]\ny += 1\nreturn h + z": IN_PLACE,
    "r = h\nr *= 0.5\ny = self.mlp(h)\nreturn r + y": IN_PLACE,
    "z += h\nreturn z": "write 'z = z + h' for 'z += h'",
    "h = h + z\nh += self.mlp(h)\nreturn h": IN_PLACE,
    "h.detach().mul_(2)\nreturn h + z": IN_PLACE,
    "a = h + z\nh *= self.scale\nreturn a + self.mlp(h)": IN_PLACE,
    "r = h\nh += z\nh += self.mlp(self.norm2(r))\nreturn r": IN_PLACE,
    "return h.view(-1, D) + z": "viewed as (8, 6)",
    "return h.view(-1, D) + z.view(-1, D)": "in the shape (8, 6)",
    "return torch.add(h, z, alpha=2)": HANDED_ON,
    "return torch.where(z > 0, h + z, z)": HANDED_ON,
    "return z.add_(h)": HANDED_ON,
    "return h + z[:, :1, :1]": "adds a tensor [2, 1, 1]",
    "h = h + z\nreturn h * h.abs().max()": "behind the last sum",
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
    "r = h * self.scale + z\nreturn r + self.mlp(self.norm2(r))",
    "r = h\nh = r + z.view(r.shape)\nz = self.mlp(self.norm2(h).view(-1, D))\nreturn h + z.reshape(h.size())",
    "h = add(z, h, self.scale, training=False)\nreturn add(self.mlp(self.norm2(h)), h)",
    "return h + self.mlp(*[h]) + z",
    "return h + self.adds_itself(h)",
    "r = h\ndel h\nreturn r + z",
    "r = h\nz = z + r.mean()\ndel r, q\nreturn h + z",
    "y = h\nfor i in items:\n    y = self.mlp(y)\nreturn h + y",
    "if mask is None:\n    y = self.mlp(h)\nelse:\n    y = z\nreturn add(y, h)",
    "y = z\nh = h + z\ny = self.mlp(y)\nreturn h + y",
    "h = h + z if self.parallel else h\nreturn h",
    "h = z * 2 + h\nreturn (h,)",
    "def f(x):\n    return x * q\nreturn h + f(z)",
    "r = h\nh = h + z\nreturn h + self.mlp(r)",
    "return h + (z + h.mean() if mask is None else z)",
    "y = {'a': h, 'b': [h, z]}['b'][0]\nreturn self.mlp(y) + h",
    "h = h.clone()\nreturn h.view(h.shape) + z.expand_as(h)",
    "z = map(torch.relu_, [z])\nreturn h + list(z)[0]",
    "return torch.add(h, z)",
    "a, b = h, h\nreturn a + z",
    "h, b = h + z, q\nreturn h",
    "h = h + z\nh = h * 2\nreturn h",
    "r = h\nh = h + z\nreturn r + z",
    "if mask is not None:\n    return h\nreturn h + z",
    "for i in items:\n    h = h + z\nreturn h",
    "try:\n    h = h + z\nfinally:\n    pass\nreturn h",
    "h = h + z if mask is None else h\nreturn h",
    "if mask is None:\n    pass\nelif self.training:\n    h = h + z\nreturn h + z",
    "if self.training:\n    h = h + z\nreturn h + z",
    "self.scale = mask\nif self.scale is None:\n    h = h + z\nreturn h + z",
    "f = lambda h: self.mlp(h)\nreturn h + f(z)",
    "def f(h):\n    return self.mlp(h)\nreturn h + f(z)",
    "y = [self.mlp(h) for h in (z, z)][0]\nreturn h + y",
    "y = sum(self.mlp(h) for i in items)\nreturn h + y",
    "y = self.mlp(h := h + z)\nreturn h + y",
    "return scaling(z, h)",
    "return scaling_first(z, h)",
    "return reading(z, residual=h)",
    "return add(*[z, h])",
    "h = h + z\nh *= q\nreturn h",
    "return torch.add(z, h)",
    "b, s, d = h.shape\nreturn h + z.view(b, s, d) * h.ndim",
    "h = h.to(h.dtype)\nreturn (h + z).to(z.dtype)",
    "return h * z.mean(-1, keepdim=True) + z",
    "return h.view(-1, D).view(h.shape) + z",
    "y = torch.stack([h, z]).sum(0)\nreturn h + y",
    "h = h + z\nreturn h + h * z",
    "return h + z if self.training else z + h",
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


def test_a_number_is_not_written() -> None:
    with pytest.raises(UserError, match=r"Toy cannot be widened .* adds 1, which is no tensor"):
        toy_layers.found(toy("h = h + z\nreturn h + 1"))
