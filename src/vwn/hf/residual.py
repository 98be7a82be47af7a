"""The residual stream of a decoder layer as an object: adding to it writes, any other use of it reads.

A decoder layer computes ``h = h + sublayer(norm(h))`` for each of its sublayers. Its own ``forward`` runs with a
:class:`ResidualStream` for ``h``. Where the layer adds to the stream, a connection writes to the over-width state;
where it uses the stream in another way, that connection reads from the state (eq. 10). What cannot be followed is
refused with a sentence.

Shapes: ``[B, S, D]`` for what the layer sees, ``[B, S, D']`` for the state.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from vwn.common.errors import UserError
from vwn.hf.on_demand import own_class

_ADDS, _MULTIPLIES = ("add", "__add__", "__radd__"), ("mul", "multiply", "__mul__", "__rmul__")
_CASTS, _COPIES, _VIEWS = ("to", "float", "half", "bfloat16", "type_as"), ("contiguous", "clone"), ("view", "reshape")
_PROPERTIES = ("dtype", "device", "is_cuda", "layout", "requires_grad")
_READS = ["sub", "rsub", "truediv", "rtruediv", "floordiv", "matmul", "rmatmul", "neg", "pow", "lt", "le", "gt", "ge",
          "eq", "ne", "getitem", "len", "iter"]  # fmt: skip


class LayerPass:
    """One forward pass of one layer: what happens to its residual stream.

    Subclasses say how to :meth:`read`, :meth:`write` and :meth:`scale`.

    Args:
        layer: whose pass it is.
        shape: ``[..., D]``, the shape of the stream as the layer sees it.
        sublayers: number of writes that the layer does, or ``None`` if that is to be found out.
    """

    def __init__(self, layer: Any, shape: torch.Size, sublayers: int | None) -> None:
        self.layer, self.shape, self.sublayers = layer, shape, sublayers
        self.version = 0  # writes so far
        self._grad = torch.is_grad_enabled()
        self.seen: list[tuple[Tensor, int]] = []  # what was read, and its count of changes in place

    def stream(self, state: Tensor) -> ResidualStream:
        """The layer's residual stream at its start."""
        return ResidualStream(_Node(self, state, None))

    def read(self, i: int, state: Tensor) -> Tensor:
        """The input of sublayer ``i``: ``[..., D'] -> [..., D]``."""
        raise NotImplementedError

    def read_normed(self, i: int, state: Tensor, norm: nn.Module) -> Tensor | None:
        """The input of sublayer ``i`` behind its RMSNorm, in one operation; ``None`` where there is none."""
        return None

    def write(self, i: int, state: Tensor, z: Tensor) -> Tensor:
        """The state after the output ``z`` ``[..., D]`` of sublayer ``i``."""
        raise NotImplementedError

    def scale(self, state: Tensor, factor: Any) -> Tensor:
        """The state times a number, or times ``D`` numbers in every slot."""
        return state * factor

    def begin_sum(self) -> None:
        """The layer adds to its stream; called before the write, which waits until the sum is used."""

    def finish(self, out: Any) -> Any:
        """Return the layer's output, with the state in place of the stream; refuse anything else in its place."""
        stream = out[0] if type(out) is tuple and out else out
        if not isinstance(stream, ResidualStream):
            self.refuse("what it hands on is not its residual stream but something computed from it")
        state = stream._finish()
        if self.version == 0:
            self.refuse("no sum with its residual stream was found")
        if self.sublayers is not None and self.version != self.sublayers:
            self.refuse(
                f"it adds to its residual stream {self.version} times in this pass, and {self.sublayers} times in the "
                "pass by which it was widened"
            )
        return (state, *_read_all(out[1:])) if type(out) is tuple else state

    def refuse(self, reason: str) -> NoReturn:
        """Raise a ``UserError`` with the reason why the layer cannot be followed."""
        name = own_class(self.layer).__name__
        raise UserError(
            f"{name} cannot be widened by itself: {reason}; if it is a sum of sublayers all the same, describe "
            f"them with vwn.hf.register_layout({name}, (Sublayer(...), ...)), see docs/layouts.md"
        )

    def check(self) -> None:
        """Raise a ``UserError`` if what was read was changed in place, or gradients are switched off for a part."""
        if torch.is_grad_enabled() != self._grad:
            self.refuse("it uses its residual stream in a part of its forward that switches gradients off or on")
        for x, version in self.seen:
            if x._version != version:
                self.refuse("its residual stream is changed in place")


class _Node:
    """A state of the stream: given, or a sum or product that is computed when it is needed.

    A sum waits, so that ``h + a + b`` is one write of ``a + b``.
    """

    def __init__(self, run: LayerPass, state: Tensor | None, before: _Node | None, z: Any = None, factor: Any = None):
        self.run, self.state, self.before, self.z, self.factor = run, state, before, z, factor
        self.version = 0
        self.x: Tensor | None = None  # what was read
        self.used = False  # read, by whatever
        self.changed = False  # in place, by a stream that no longer is this node

    @property
    def waits(self) -> bool:
        return self.z is not None and self.state is None

    @property
    def nearest(self) -> Tensor:
        """The state that this one is to be computed from: of the same dtype, on the same device."""
        node = self
        while node.state is None:
            assert node.before is not None
            node = node.before
        return node.state

    def settle(self) -> Tensor:
        """The state ``[..., D']``, written by now."""
        if self.state is not None:
            return self.state
        before, run = self.before, self.run
        assert before is not None
        if self.factor is not None:
            self.state, self.version = run.scale(before.settle(), self.factor), before.version
            return self.state
        terms = [self.z]
        while before.waits:
            terms.append(before.z)
            before = before.before
            assert before is not None
        z = terms.pop()
        while terms:
            z = z + terms.pop()
        state = before.settle()
        if before.version != run.version:
            run.refuse("it adds to an older state of its residual stream")
        if run.sublayers is not None and run.version == run.sublayers:
            run.refuse(f"it adds to its residual stream more than {run.sublayers} times, as when it was widened")
        run.check()
        self.state = run.write(run.version, state, z)
        run.version = self.version = before.version + 1
        return self.state

    def read(self) -> Tensor:
        """Read it: the layer's view, ``[..., D]``."""
        self.run.check()
        self.used = True
        if self.x is None and self.factor is not None:
            assert self.before is not None
            self.x = self.before.read() * self.factor
        elif self.x is None:
            state = self.settle()
            self.check_sublayer()
            self.x = x = self.run.read(self.version, state)
            if not torch.compiler.is_compiling() and not x.is_inference():  # which do not count changes in place
                self.run.seen.append((x, x._version))
        return self.x

    def check_sublayer(self) -> None:
        if self.version == self.run.sublayers:
            self.run.refuse("it uses its residual stream behind the last sum with it")


class ResidualStream:
    """Stand-in for a decoder layer's residual stream ``[..., D]``.

    ``stream + z`` and ``stream * factor`` are streams again; so is a stream that is cast, copied or viewed in another
    shape. Any other use takes what the next sublayer's connection reads.

    Args:
        node: the state that it stands for.
        view: method and arguments by which the layer viewed it in another shape.
    """

    def __init__(self, node: _Node, view: tuple[str, tuple] | None = None) -> None:
        self._node, self._view = node, view

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data":
            self._node.run.refuse("its residual stream is changed in place by setting its attribute 'data'")
        object.__setattr__(self, name, value)

    def read(self, norm: nn.Module | None = None) -> Tensor:
        """The next sublayer's input, ``[..., D]``; behind ``norm`` if one is given."""
        node = self._current()
        if norm is not None and node.x is None and node.factor is None and self._view is None:
            node.run.check()
            state = node.settle()
            node.check_sublayer()
            normed = node.run.read_normed(node.version, state, norm)
            if normed is not None:
                node.used = True
                return normed
        x = node.read()
        if self._view is not None:
            x = getattr(x, self._view[0])(*self._view[1])
        return x if norm is None else norm.forward(x)

    def _current(self) -> _Node:
        if self._node.changed:
            self._node.run.refuse("it is used after its residual stream was changed in place under another name")
        return self._node

    def _finish(self) -> Tensor:
        node, run = self._current(), self._node.run
        run.check()
        state = node.settle()
        if node.version != run.version:
            run.refuse("it hands on an older state of its residual stream")
        if self._view is not None and self.shape != run.shape:
            run.refuse(f"it hands on its residual stream in the shape {tuple(self.shape)}, not {tuple(run.shape)}")
        return state

    # attributes of a tensor

    @property
    def shape(self) -> torch.Size:
        """``[..., D]``, or as it was viewed."""
        run = self._current().run
        return run.shape if self._view is None else torch.empty(run.shape, device="meta").view(*self._view[1]).shape

    def size(self, dim: int | None = None) -> Any:
        """Shape, or its entry ``dim``."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    ndim = property(dim)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name == "data":
            self._node.run.refuse("its residual stream may be changed in place through its attribute 'data'")
        if name in _PROPERTIES:
            return getattr(self._current().nearest, name)
        if name in _CASTS or name in _COPIES:
            return lambda *args, **kwargs: self._cast(name, args, kwargs)
        if name in _VIEWS:
            return lambda *shape: ResidualStream(self._current(), (name, shape))
        if name.endswith("_"):
            self._node.run.refuse(f"its residual stream is changed in place by {name!r}")
        return getattr(self.read(), name)

    def _cast(self, name: str, args: tuple, kwargs: dict[str, Any]) -> ResidualStream:
        node = self._current()
        if name in _COPIES:
            return ResidualStream(node, self._view)
        args = tuple(a._node.settle() if isinstance(a, ResidualStream) else a for a in args)
        state = getattr(node.settle(), name)(*args, **kwargs)
        if state is not node.state:
            version = node.version
            node = _Node(node.run, state, None)
            node.version = version
        return ResidualStream(node, self._view)

    # sums and products

    def _plus(self, z: Any) -> ResidualStream:
        node, run = self._current(), self._node.run
        if isinstance(z, ResidualStream):  # h + h * gate: the product is what is added
            other = z._current()
            if (node.factor is None) == (other.factor is None):
                run.refuse("it adds its residual stream to itself")
            return self._plus(z.read()) if node.factor is None else z._plus(self.read())
        if not isinstance(z, Tensor):
            run.refuse(f"it adds {z!r}, which is no tensor, to its residual stream; make it a tensor of its shape")
        run.check()
        if self._view is not None:
            if z.shape != self.shape:
                run.refuse(f"it adds {tuple(z.shape)} to its residual stream viewed as {tuple(self.shape)}")
            z = z.reshape(run.shape)
        if not node.waits:
            run.begin_sum()
        return ResidualStream(_Node(run, None, node, z=z), self._view)

    __add__ = __radd__ = _plus

    def _times(self, factor: Any) -> Any:
        node, run = self._current(), self._node.run
        shape = factor.shape if isinstance(factor, Tensor) else torch.Size()
        if isinstance(factor, ResidualStream) or (self._view is not None and len(shape)):
            return self.read() * _read_all(factor)
        if len(shape) and torch.broadcast_shapes(shape, run.shape) != run.shape:
            return self.read() * factor
        return ResidualStream(_Node(run, None, node, factor=factor), self._view)

    __mul__ = __rmul__ = _times

    def __iadd__(self, z: Any) -> ResidualStream:  # type: ignore[misc]
        return self._change(self._plus(z))

    def __imul__(self, factor: Any) -> ResidualStream:  # type: ignore[misc]
        product = self._times(factor)
        if not isinstance(product, ResidualStream):
            self._node.run.refuse("its residual stream is changed in place, to a product with something of its shape")
        return self._change(product)

    def _change(self, new: ResidualStream) -> ResidualStream:
        """Change in place what is not yet read: of what was, the layer may hold views."""
        if self._node.used:
            self._node.run.refuse(
                "its residual stream is changed in place after it was read; write 'h = h + z' for 'h += z'"
            )
        self._node.changed = True
        self._node, self._view = new._node, new._view
        return self

    def __setitem__(self, key: Any, value: Any) -> NoReturn:
        self._node.run.refuse("its residual stream is changed in place by setting items of it")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if len(args) == 2 and not kwargs and name in _ADDS:
            stream, other = args if isinstance(args[0], ResidualStream) else args[::-1]
            return stream._plus(other)
        if len(args) == 2 and not kwargs and name in _MULTIPLIES:
            stream, other = args if isinstance(args[0], ResidualStream) else args[::-1]
            return stream._times(other)
        run = next(v._node.run for v in tree_leaves((args, kwargs)) if isinstance(v, ResidualStream))
        if (name.endswith("_") and not name.endswith("__")) and isinstance((*args, None)[0], ResidualStream):
            run.refuse(f"its residual stream is changed in place by {name!r}")
        if "out" in kwargs:
            run.refuse("its residual stream is changed in place by an operation with 'out='")
        return func(*_read_all(args), **_read_all(kwargs))


def _reading(name: str) -> Any:
    return lambda self, *args: getattr(self.read(), f"__{name}__")(*_read_all(args))


for _name in _READS:
    setattr(ResidualStream, f"__{_name}__", _reading(_name))
ResidualStream.__hash__ = object.__hash__  # type: ignore[method-assign]


def _read_all(values: Any) -> Any:
    """Read every stream in nested lists, tuples and dicts."""
    return tree_map(lambda v: v.read() if isinstance(v, ResidualStream) else v, values)
