"""What the structure of a layer cannot be found in is refused with the reason, and never silently computed wrongly."""

from __future__ import annotations

import functools  # noqa: F401 - for the toys
import itertools
import linecache
import operator  # noqa: F401
import textwrap
from operator import iadd  # noqa: F401
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toy_layers
from conftest import perturb
from torch import Tensor, nn
from toy_layers import D, run_plain, run_wide, widened

from vwn import UserError
from vwn.hf.structure import find_structure

_count = itertools.count()


def scaling(x: Tensor, residual: Tensor) -> Tensor:
    return (x + residual) * 0.5


def scaling_first(x: Tensor, residual: Tensor) -> Tensor:
    return x + residual * 0.5


def norming(x: Tensor, residual: Tensor) -> Tensor:
    x = x + residual
    return F.layer_norm(x, (D,))


def reading(x: Tensor, residual: Tensor) -> Tensor:
    return x * residual.mean() + residual


def twice(x: Tensor, residual: Tensor) -> Tensor:
    return x + residual + residual


def changing_x(x: Tensor, residual: Tensor) -> Tensor:
    x += residual
    return x


def second(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    return x, x + residual


def recursive(x: Tensor, residual: Tensor) -> Tensor:
    return recursive(x, residual) + residual


class AddsItself(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(x)


def toy(body: str) -> Any:
    """A layer whose forward is ``body``: ``h`` is the stream, ``z`` a sublayer's output and ``q`` something plain."""
    name = f"<toy {next(_count)}>"
    source = "class Toy(Layer):\n    def forward(self, h, mask=None, items=(1, 2)):\n" + textwrap.indent(
        f"q = torch.ones(())\nz = self.attn(self.norm1(h))[0]\n{textwrap.dedent(body).strip()}\n", " " * 8
    )
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    names = {**vars(toy_layers), **globals(), "__name__": __name__}
    exec(compile(source, name, "exec"), names)
    layer = names["Toy"]()
    layer.adds_itself = AddsItself()
    return perturb(layer).double().eval()


IN_PLACE = "changed in place"
BRANCH = "in a branch that is decided at run time"
HANDED_ON = "what it hands on is not its residual stream"
SCOPE = "inner scope"
REFUSED = {
    # the stream is something else afterwards
    "return self.norm2(h + z)": HANDED_ON,
    "h = self.norm2(h + z)\nreturn h": HANDED_ON,
    "return h - z": HANDED_ON,
    "return torch.add(h, z)": HANDED_ON,
    "return torch.stack([h, z]).sum(0)": HANDED_ON,
    "return self.adds_itself(h)": HANDED_ON,
    "h = h + z\nh = self.adds_itself(h)\nreturn h": HANDED_ON,
    "h = h + z\nh = h.transpose(0, 1)\nreturn h": HANDED_ON,
    "a, b = h, h\nreturn a + z": HANDED_ON,
    "h, b = h + z, q\nreturn h": HANDED_ON,
    "h = h + z\nh = h * 2\nreturn h": HANDED_ON,
    "h = h + z\nh = torch.clamp(h, -1, 1)\nreturn h": HANDED_ON,
    "h = h + z\nreturn {'h': h}": HANDED_ON,
    "h = h + z\nreturn": HANDED_ON,
    "h = h + z\nreturn ()": HANDED_ON,
    "h = h + z": "does not return",
    "return h": "no sum with its residual stream",
    "h -= z\nreturn h": "changed by 'h -= z'",
    "h /= 2\nreturn h + z": "changed by 'h /= 2'",
    # more than once, or an older one
    "return h + h": "to itself",
    "return h + z + h": "to itself",
    "return h * 0.5 + z + h": "to itself",
    "r = h\nh = h + z\nreturn r": "older state",
    "r = h\nh = h + z\nreturn r + z": "older state",
    "y = self.norm2(h + z)\nreturn h + y": "older state",
    "r = h\nh = h + z\nreturn h + z + r": "to itself",
    "h = h + z\nw = self.mlp(h)\nreturn h, w": "behind the last sum",
    # not every time
    "if mask is not None:\n    h = h + z\nreturn h": BRANCH,
    "if mask is not None:\n    return h\nreturn h + z": "returns from within a branch",
    "for i in items:\n    h = h + z\nreturn h": BRANCH,
    "while mask:\n    h = h + z\nreturn h": BRANCH,
    "with torch.no_grad():\n    h = h + z\nreturn h": BRANCH,
    "try:\n    h = h + z\nfinally:\n    pass\nreturn h": BRANCH,
    "h = h + z if mask is None else h\nreturn h": BRANCH,
    "y = [self.mlp(h + z * i) for i in items][0]\nreturn h + y": BRANCH,
    "y = mask is None and self.mlp(h + z)\nreturn h + y": BRANCH,
    "y = self.mlp(h + z if mask is None else h)\nreturn h + y": BRANCH,
    "y = h.float() if mask is None else h\nreturn y + z": HANDED_ON,
    "if mask is None:\n    pass\nelif self.training:\n    h = h + z\nreturn h + z": BRANCH,
    "if self.training:\n    h = h + z\nreturn h + z": BRANCH,
    "self.scale = mask\nif self.scale is None:\n    h = h + z\nreturn h + z": BRANCH,
    # changed in place
    "h.mul_(2)\nreturn h + z": IN_PLACE,
    "h.add_(z)\nreturn h + z": IN_PLACE,
    "y = h.add_(z)\nreturn h + y": IN_PLACE,
    "h[:, 0] = 0\nreturn h + z": IN_PLACE,
    "h[:, 0] += 1\nreturn h + z": IN_PLACE,
    "h.data = z\nreturn h + z": IN_PLACE,
    "h.data.copy_(z)\nreturn h + z": IN_PLACE,
    "torch.add(h, z, out=h)\nreturn h + z": IN_PLACE,
    "torch.relu_(h)\nreturn h + z": IN_PLACE,
    "F.relu(h, inplace=True)\nreturn h + z": IN_PLACE,
    "z = self.relu_in_place(h)\nreturn h + z": IN_PLACE,
    "y = h[:, :1]\ny += 1\nreturn h + z": IN_PLACE,
    "y = h.transpose(0, 1)\ny.zero_()\nreturn h + z": IN_PLACE,
    "a, b = h, z\na += b\nreturn h + z": IN_PLACE,
    "a = [h, z]\na[0][:] = 0\nreturn h + z": IN_PLACE,
    "y = self.drop(h)\ny += 1\nreturn h + z": IN_PLACE,
    "self.kept = h\nself.kept += 1\nreturn h + z": IN_PLACE,
    "h.__iadd__(z)\nreturn h + z": IN_PLACE,
    "setattr(self, 'kept', h)\nself.kept += 1\nreturn h + z": IN_PLACE,
    "operator.iadd(h, z)\nreturn h + z": IN_PLACE,
    "iadd(h, z)\nreturn h + z": IN_PLACE,
    "y = list(map(torch.relu_, [h]))\nreturn h + z": IN_PLACE,
    "y = list(map(functools.partial(torch.relu_), [h]))\nreturn h + z": IN_PLACE,
    "f = torch.relu_\ny = f(h)\nreturn h + z": IN_PLACE,
    "a = []\na.append(h)\na[0] += 1\nreturn h + z": IN_PLACE,
    "y = [x.mul_(2) for x in (h,)]\nreturn h + z": IN_PLACE,
    "y = [x for x in (h,)][0]\ny += 1\nreturn h + z": IN_PLACE,
    "nn.init.ones_(tensor=h)\nreturn h + z": IN_PLACE,
    "y = torch.chunk(h, 2, -1)[0]\ny.add_(1)\nreturn h + z": IN_PLACE,
    "if mask is None:\n    h += 1\nreturn h + z": IN_PLACE,
    "if mask is None:\n    y = h\n    y *= 2\nreturn h + z": IN_PLACE,
    "for y in (h, z):\n    y.mul_(2)\nreturn h + z": IN_PLACE,
    "r = h.contiguous()\nh += z\nreturn h + self.mlp(r)": "after its residual stream was changed in place",
    "r = h[:, :1]\nh *= 2.0\nreturn h + z + r": "after its residual stream was changed in place",
    "y = z\nz += h\nreturn z + self.mlp(y)": "after its residual stream was changed in place",
    # under names that are not followed
    "f = lambda: h\nh = h + z\nreturn h + f()": SCOPE,
    "f = lambda h: self.mlp(h)\nreturn h + f(z)": SCOPE,
    "def f(h):\n    return self.mlp(h)\nreturn h + f(z)": SCOPE,
    "y = [self.mlp(h) for h in (z, z)][0]\nreturn h + y": SCOPE,
    "y = sum(self.mlp(h) for i in items)\nreturn h + y": SCOPE,
    "y = self.mlp(h := self.mlp(z))\nreturn h + y": SCOPE,
    "y = self.mlp(h := h + z)\nreturn h + y": SCOPE,
    "match items:\n    case [h, *_]:\n        pass\nreturn h + z": SCOPE,
    "import math as h\nreturn h + z": SCOPE,
    # what helpers do
    "return scaling(z, h)": "scaling does more with the residual stream",
    "return scaling_first(z, h)": "scaling_first does more with the residual stream",
    "return norming(z, h)": "norming does more with the residual stream",
    "return reading(z, residual=h)": "reading does more with the residual stream",
    "return twice(z, h)": "twice does more with the residual stream",
    "return changing_x(z, h)": "changing_x does more with the residual stream",
    "return recursive(z, h)": "recursive does more with the residual stream",
    "h, y = second(z, h)\nreturn h": "second does more with the residual stream",
    "h, y = add(z, h)\nreturn h": HANDED_ON,
    "return add(*[z, h])": HANDED_ON,
    "y = lambda x, residual: x\nadd = y\nreturn add(z, h)": HANDED_ON,
    "return super().forward(h + z)": "calls super()",
}


@pytest.mark.parametrize("body", REFUSED)
def test_is_refused(body: str) -> None:
    with pytest.raises(UserError, match="Toy cannot be widened by itself: ") as caught:
        find_structure(toy(body))
    assert REFUSED[body] in str(caught.value)
    assert "register_layout" in str(caught.value)


RIGHT = [
    "return h + self.mlp(*[h]) + z",
    "return h + scaling(z, h)",  # in a sublayer a helper may do what it likes
    "y, w = second(z, h)\nreturn h + w",
    "return h + self.adds_itself(h)",
    "r = h\ndel h\nreturn r + z",
    "r = h\nz = z + r.mean()\ndel r, q\nreturn h + z",
    "with torch.no_grad():\n    y = self.mlp(h)\nreturn h + y",
    "y = h\nfor i in items:\n    y = self.mlp(y)\nreturn h + y",
    "if mask is None:\n    y = self.mlp(h)\nelse:\n    y = z\nreturn add(y, h)",
    "y = z\nh = h + z\ny = self.mlp(y)\nreturn h + y",
    "r = h.clone()\nh += z\ny = z[:, :1]\ny += 1\nreturn h + z",
    "h = h + z if self.parallel else h\nreturn h",
    "h = z * 2 + h\nreturn (h,)",
    "def f(x):\n    return x * q\nreturn h + f(z)",
    "r = h\nh = h + z\nreturn h + self.mlp(r)",
    "return h + (z + h.mean() if mask is None else z)",
    "y = {'a': h, 'b': [h, z]}['b'][0]\nreturn self.mlp(y) + h",
    "h = h.clone()\nreturn h.view(h.shape) + z.expand_as(h)",
    "r = h\nr *= 0.5\ny = self.mlp(h)\nreturn r + y",
    "z += h\nreturn z",
    "z = map(torch.relu_, [z])\nreturn h + list(z)[0]",
]


@pytest.mark.parametrize("body", RIGHT)
def test_is_right(body: str) -> None:
    layer = toy(body)
    h = torch.randn(2, 4, D).double()
    with torch.no_grad():
        torch.testing.assert_close(run_wide(widened(layer), h)[0], run_plain(layer, h)[0], rtol=1e-10, atol=1e-10)


def test_a_number_is_not_written() -> None:
    layer = toy("h = h + z\nreturn h + 1")
    with pytest.raises(UserError, match="Toy adds 1, no tensor, to its residual stream in sublayer 1"):
        run_wide(widened(layer), torch.randn(2, 4, D).double())
