"""Where a decoder layer reads and writes its residual stream, found in the source of its ``forward``.

Whatever a layer computes, it saves its input, and adds to it: ``residual + sublayer(norm(residual))``. Following which
variables hold the stream, each use of it becomes a read and each sum with it a write; everything between stays the
layer's own code, with its masks, caches, branches and scales. Nothing is copied: the rewritten function lives in the
namespace of the layer's module and is made anew from the installed source.
"""

from __future__ import annotations

import ast
import inspect
import linecache
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache
from typing import Any

from torch import nn

from vwn.common.errors import UserError
from vwn.hf.rewriting import SHAPES, Rewriter


class Structure:
    """A layer's ``forward`` with reads and writes in place of its residual adds.

    Args:
        layer_class: the decoder layer class that the forward is taken from.
        source: the rewritten function.
        norms: for each sublayer the attribute of the norm that its read goes through and nothing else, or ``None``.
        names: for each sublayer the attribute of the module that is at its core.
    """

    def __init__(self, layer_class: type, source: str, norms: Sequence[str | None], names: Sequence[str]) -> None:
        self.layer_class, self.source, self.norms, self.names = layer_class, source, tuple(norms), tuple(names)
        self._function = _compiled(layer_class, source)

    def __reduce__(self) -> tuple:
        return Structure, (self.layer_class, self.source, self.norms, self.names)

    def norm(self, layer: Any, i: int) -> Any:
        """The pre-norm of sublayer ``i``, if it is all that the read goes through."""
        name = self.norms[i]
        return getattr(layer, name) if name else None

    def run(self, layer: Any, seam: Any, *args: Any, **context: Any) -> Any:
        """The layer, called as its class is, on an over-width state ``[B, S, D']``.

        Args:
            layer: an instance of ``layer_class``.
            seam: has ``read(i, state)``, ``write(i, state, z)``, ``scale(state, factor)`` and ``zeros(x)``.
            args, context: what the backbone hands its layers, the state first.
        """
        return self._function(layer, seam, *args, **context)


def find_structure(layer: nn.Module) -> Structure:
    """The structure of a decoder layer.

    Args:
        layer: its attributes decide the branches of its forward.

    Raises:
        UserError: a layer that does not just add to its residual stream, with the reason.
    """
    layer_class = type(layer)
    name = layer_class.__name__
    if "forward" in vars(layer):
        raise UserError(
            f"{name} cannot be widened: something has replaced the forward of this instance, as accelerate's hooks "
            "do; widen the model before that"
        )
    try:
        rewriter = Rewriter(layer, inspect.unwrap(layer_class.forward))
    except (OSError, TypeError, SyntaxError) as error:
        raise UserError(
            f"the source of {name}.forward cannot be read ({error}), so its residual adds cannot be found; describe "
            "its sublayers with vwn.hf.register_layout (docs/layouts.md)"
        ) from error
    body, depth = rewriter.rewrite()
    norms = [_take_norm(layer, body, rewriter.read_of(i)) for i in range(depth)]
    guards = [_guard(name, argument) for argument in sorted(rewriter.absent)]
    source = _function(rewriter.tree, [*guards, *body])
    return Structure(layer_class, source, norms, _names(layer, body))


def _function(tree: ast.FunctionDef, body: list[ast.stmt]) -> str:
    arguments = deepcopy(tree.args)
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    arguments.args.insert(1, ast.arg("_seam"))
    # their values are taken from the layer's own function
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [d and ast.Constant(None) for d in arguments.kw_defaults]
    function = ast.FunctionDef("forward", arguments, body, [])
    if "type_params" in ast.FunctionDef._fields:
        function.type_params = []  # type: ignore[attr-defined]
    return ast.unparse(ast.fix_missing_locations(ast.Module([function], []))) + "\n"


@cache
def _compiled(layer_class: type, source: str) -> Callable:
    """One function for all layers of the same structure, so that what is compiled for one serves the others."""
    forward = inspect.unwrap(layer_class.forward)  # type: ignore[attr-defined]
    name = f"<{layer_class.__module__}.{layer_class.__name__}.forward on an over-width state, {hash(source):x}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    made: dict[str, Any] = {}
    exec(compile(source, name, "exec"), forward.__globals__, made)
    made["forward"].__defaults__, made["forward"].__kwdefaults__ = forward.__defaults__, forward.__kwdefaults__
    return made["forward"]


def _guard(name: str, argument: str) -> ast.stmt:
    message = f"{name} was widened as a decoder without an encoder and takes no {argument}"
    return ast.parse(f"if {argument} is not None:\n    raise ValueError({message!r})").body[0]


def _take_norm(layer: Any, body: list[ast.stmt], x: str | None) -> str | None:
    """The norm that is all that a read value goes to; the call is left out and the read does it."""
    nodes = list(ast.walk(ast.Module(body, [])))
    shapes = [n.value for n in nodes if isinstance(n, ast.Attribute) and n.attr in SHAPES]  # the norm keeps them
    uses = [n for n in nodes if isinstance(n, ast.Name) and n.id == x and isinstance(n.ctx, ast.Load)]
    uses = [n for n in uses if n not in shapes]
    for node in nodes if len(uses) == 1 else ():
        if isinstance(node, ast.Call) and node.args == uses and not node.keywords and _is_norm(layer, node.func):
            assert isinstance(node.func, ast.Attribute)
            _Replace(node, uses[0]).visit(ast.Module(body, []))
            return node.func.attr
    return None


def _names(layer: Any, body: list[ast.stmt]) -> list[str]:
    """For each sublayer the first module called in it that is no norm."""
    names: list[str] = []
    found: str | None = None
    for statement in body:
        calls = [n.func for n in ast.walk(statement) if isinstance(n, ast.Call)]
        for f in sorted(calls, key=lambda f: ast.unparse(f).startswith("_seam.")):  # arguments before the call
            if ast.unparse(f) == "_seam.write":
                names.append(found or f"sublayer_{len(names)}")
                found = None
            elif isinstance(f, ast.Attribute) and ast.unparse(f.value) == "self" and not _is_norm(layer, f):
                found = found or f.attr
    return names


def _is_norm(layer: Any, f: ast.expr) -> bool:
    of_self = isinstance(f, ast.Attribute) and ast.unparse(f.value) == "self"
    return of_self and "norm" in type(getattr(layer, f.attr, None)).__name__.lower()  # type: ignore[attr-defined]


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self._old, self._new = old, new

    def visit(self, node: ast.AST) -> Any:
        return self._new if node is self._old else self.generic_visit(node)
