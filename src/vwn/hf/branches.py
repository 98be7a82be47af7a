"""Branches of a layer's forward that its own attributes decide, once and for all."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor

_ABSENT = ("encoder_hidden_states",)  # None in a decoder without an encoder

# attributes that a layer and its config do not keep for life
_CHANGING = {"training", "gradient_checkpointing", "use_cache", "output_attentions", "output_hidden_states"}
_CHANGING |= {"_attn_implementation", "_experts_implementation", "output_router_logits", "use_return_dict"}

_COMPARISONS: dict[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
    ast.Gt: operator.gt,
    ast.Lt: operator.lt,
}


class Branches(ast.NodeTransformer):
    """Says which way a test goes; as a transformer, takes that side of conditional expressions.

    Args:
        owner: what ``self`` is; ``None`` for a function.
        function: where the tests are.
        holds: whether an expression is the residual stream, which is never ``None``.
    """

    def __init__(self, owner: Any, function: ast.FunctionDef, holds: Callable[[ast.expr], bool]) -> None:
        self._owner, self._holds = owner, holds
        stored = [n for n in ast.walk(function) if isinstance(getattr(n, "ctx", None), ast.Store | ast.Del)]
        arguments = {a.arg for a in ast.walk(function.args) if isinstance(a, ast.arg)}
        self._arguments = arguments - {n.id for n in stored if isinstance(n, ast.Name)}
        self._changing = _CHANGING | {n.attr for n in stored if isinstance(n, ast.Attribute)}
        self.absent = set[str]()
        """Arguments that were taken to be ``None``."""

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        """The side that is known to be taken."""
        known = self.known(node.test)
        if known is not None:
            return self.visit(node.body if known[0] else node.orelse)
        self.generic_visit(node)
        return node

    def known(self, test: ast.expr) -> tuple[Any] | None:
        """The value of an expression, in a tuple, or ``None`` where it is decided at run time."""
        if isinstance(test, ast.Constant):
            return (test.value,)
        if isinstance(test, ast.Name):
            return self._variable(test.id)
        if isinstance(test, ast.Attribute):
            base = self.known(test.value)
            if base is None or test.attr in self._changing or not hasattr(base[0], test.attr):
                return None
            value = getattr(base[0], test.attr)
            return None if isinstance(value, Tensor) else (value,)
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            operand = self.known(test.operand)
            return None if operand is None else (not operand[0],)
        if isinstance(test, ast.BoolOp):
            values = [self.known(value) for value in test.values]
            decisive = isinstance(test.op, ast.Or)
            if any(v is not None and bool(v[0]) == decisive for v in values):
                return (decisive,)
            return None if None in values else (not decisive,)
        if isinstance(test, ast.Compare) and len(test.ops) == 1:
            op, right = test.ops[0], self.known(test.comparators[0])
            if isinstance(op, ast.Is | ast.IsNot) and right == (None,) and self._holds(test.left):
                return (isinstance(op, ast.IsNot),)
            left, compare = self.known(test.left), _COMPARISONS.get(type(op))
            return None if left is None or right is None or compare is None else (compare(left[0], right[0]),)
        return None

    def _variable(self, name: str) -> tuple[Any] | None:
        if name == "self" and self._owner is not None:
            return (self._owner,)
        if name in _ABSENT and name in self._arguments and not getattr(self._owner, "is_cross_attention", False):
            self.absent.add(name)
            return (None,)
        return None
