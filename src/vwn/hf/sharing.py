"""Which variables of a function may share memory with the residual stream, so that changing one changes the other."""

from __future__ import annotations

import ast
import operator
from collections.abc import Iterable
from typing import Any

from torch import nn

STREAM, ARGUMENT = "the stream", "argument "

_FRESH = ("shape", "dtype", "device", "ndim", "size", "dim")
_PASS_ON = ("Identity", "Dropout", "DropPath")  # modules that may return what they are given
_KEEPERS = ("setattr", "__setattr__", "__setitem__", "setitem", "setdefault", "append", "extend", "insert")
_OPERATORS = {name for name in dir(operator) if name[0] == "i" and name[1:] in {*dir(operator), "concat"}}  # iadd, imul
_COMPOUND = ast.If | ast.For | ast.While | ast.With | ast.Try | ast.Match
_EXPRESSIONS = ast.NamedExpr | ast.comprehension
_ASSIGNMENTS = ast.Assign | ast.AnnAssign | ast.For


class Sharing:
    """For each variable the tensors whose memory it may have, as far as names, views and containers go.

    Args:
        owner: what ``self`` is.
    """

    def __init__(self, owner: Any) -> None:
        self._owner, self._tensors, self._count = owner, dict[str, frozenset[str]](), 0

    def note(self, name: str, tensors: Iterable[str]) -> None:
        """A variable was given a value that shares memory with ``tensors``, or one of its own."""
        self._count += 1
        self._tensors[name] = frozenset(tensors) or frozenset([f"{name} {self._count}"])

    def names_with(self, tensors: Iterable[str]) -> set[str]:
        """The variables that may share memory with any of ``tensors``."""
        return {name for name, own in self._tensors.items() if not own.isdisjoint(tensors)}

    def of(self, node: Any, holders: set[str]) -> set[str]:
        """The tensors that the value of an expression may share memory with.

        Args:
            node: the expression.
            holders: variables that hold the stream.
        """
        if isinstance(node, ast.Name):
            return {STREAM} if node.id in holders else set(self._tensors.get(node.id, {ARGUMENT + node.id}))
        if isinstance(node, ast.Attribute):
            return set() if node.attr in _FRESH or _root(node) == "self" else self.of(node.value, holders)
        if isinstance(node, ast.Subscript | ast.Starred | ast.NamedExpr):
            return self.of(node.value, holders)
        if isinstance(node, ast.Tuple | ast.List):
            return self._all(node.elts, holders)
        if isinstance(node, ast.ListComp | ast.SetComp):
            return self._all([node.elt, *(g.iter for g in node.generators)], holders)
        if isinstance(node, ast.Dict | ast.BoolOp):
            return self._all(node.values, holders)
        if isinstance(node, ast.IfExp):
            return self._all([node.body, node.orelse], holders)
        if isinstance(node, ast.Call):
            given = [*node.args, *(k.value for k in node.keywords)]
            if isinstance(node.func, ast.Attribute):
                if _root(node.func) == "self":
                    module = getattr(self._owner, node.func.attr, None) if _is_of_self(node.func) else None
                    passes_on = not isinstance(module, nn.Module) or type(module).__name__.startswith(_PASS_ON)
                    return self._all(given, holders) if passes_on and _is_of_self(node.func) else set()
                if _root(node.func) in holders | self._tensors.keys() or _root(node.func) is None:
                    return set() if node.func.attr in _FRESH else self.of(node.func.value, holders)
            return self._all(given, holders)
        return set()

    def changed(self, statement: ast.stmt, holders: set[str]) -> ast.AST | None:
        """What in a statement may change the stream in place, if anything does."""
        self.add_all(statement, holders)
        for node in ast.walk(statement):
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute) and _changes_in_place(node.value):
                return node  # a function under another name, which is not followed
            if isinstance(node, ast.stmt):
                in_place = isinstance(node, ast.AugAssign)
                changes = [t for t in _flat(targets) if in_place or isinstance(t, ast.Subscript | ast.Attribute)]
                kept = [t for t in changes if isinstance(node, ast.Assign) and STREAM in self.of(node.value, holders)]
                if kept or any(STREAM in self.of(t.value if hasattr(t, "value") else t, holders) for t in changes):
                    return node
            elif isinstance(node, ast.Call) and STREAM in self._changed_by(node, holders):
                return node
        return None

    def add_all(self, statement: ast.stmt, holders: set[str]) -> None:
        """Note what the assignments inside a statement may share, in whatever order they run."""
        kinds: Any = _ASSIGNMENTS | _EXPRESSIONS if isinstance(statement, _COMPOUND) else _EXPRESSIONS
        for _ in range(3):  # an alias of an alias of an alias
            for node in ast.walk(statement):
                value = getattr(node, "iter", getattr(node, "value", None))
                if isinstance(node, kinds) and value is not None:
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    for target in _flat(targets):
                        if isinstance(target, ast.Name) and (shared := self.of(value, holders)):
                            self._tensors[target.id] = self._tensors.get(target.id, frozenset()) | shared

    def _changed_by(self, call: ast.Call, holders: set[str]) -> set[str]:
        """What a call changes by its name or arguments: ``x.add_``, ``torch.relu_``, ``out=``, ``inplace=``."""
        keywords = {k.arg: k.value for k in call.keywords}
        found = self.of(keywords["out"], holders) if "out" in keywords else set()
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        in_place = name.endswith("_")  # and what ends with "__" may be "__iadd__"
        flag = keywords.get("inplace")
        flagged = flag is not None and not (isinstance(flag, ast.Constant) and not flag.value)
        if isinstance(call.func, ast.Attribute) and _is_of_self(call.func):
            flagged = flagged or bool(getattr(getattr(self._owner, name, None), "inplace", False))
        if in_place and isinstance(call.func, ast.Attribute):
            found = found | self.of(call.func.value, holders)
        if (in_place or flagged) and call.args and _root(call.func) not in holders | self._tensors.keys():
            found = found | self.of(call.args[0], holders)
        if flagged or (in_place and not call.args):
            found = found | self._all([*call.args, *keywords.values()], holders)
        # changed by another name, kept where it is not followed, or given to what calls a changing function
        handed_over = any(_changes_in_place(a) for a in (*call.args, *keywords.values()))
        if name in _KEEPERS or handed_over or _changes_in_place(call.func):
            found = found | self._all([*call.args, *keywords.values()], holders)
        return found

    def _all(self, nodes: Iterable[Any], holders: set[str]) -> set[str]:
        return set().union(*(self.of(node, holders) for node in nodes))


def names_in_other_scopes(function: ast.FunctionDef) -> set[str]:
    """Names that a function binds or uses where following its statements does not show it.

    That is in lambdas, generators and inner functions, which run later, as variables of comprehensions, and by ``:=``,
    ``import``, ``except``, ``match`` and ``global``.
    """
    found: set[str] = set()
    for node in ast.walk(function):
        if node is function:
            continue
        if isinstance(node, ast.Lambda | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.GeneratorExp):
            found |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            found |= {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)} | {getattr(node, "name", "")}
        elif isinstance(node, ast.comprehension | ast.NamedExpr):
            found |= {n.id for n in ast.walk(node.target) if isinstance(n, ast.Name)}
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar):
            found.add(node.name or "")
        elif isinstance(node, ast.MatchMapping):
            found.add(node.rest or "")
        elif isinstance(node, ast.alias):
            found.add(node.asname or node.name.partition(".")[0])
        elif isinstance(node, ast.Global | ast.Nonlocal):
            found |= set(node.names)
    return found


def _flat(targets: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for target in targets:
        found += _flat(target.elts) if isinstance(target, ast.Tuple | ast.List) else [target]
    return [t.value if isinstance(t, ast.Starred) else t for t in found if t is not None]


def _changes_in_place(node: Any) -> bool:
    """Whether an expression names a function that changes what it is given: ``torch.relu_``, ``operator.iadd``."""
    if isinstance(node, ast.Call):  # functools.partial(torch.relu_)
        return any(_changes_in_place(a) for a in node.args)
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    return name.strip("_") in _OPERATORS or (name.endswith("_") and not name.endswith("__"))


def _root(node: Any) -> str | None:
    """The variable at the left end of ``a.b[c].d``."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def _is_of_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id == "self"
