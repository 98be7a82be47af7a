"""Rewrites a decoder layer's ``forward`` so that it reads from, and writes to, an over-width stream.

What cannot be followed is refused: a statement is either understood, or does nothing with the stream but read it.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from vwn.common.errors import UserError
from vwn.hf.branches import Branches
from vwn.hf.sharing import ARGUMENT, STREAM, Sharing, names_in_other_scopes
from vwn.hf.syntax import load, on_seam, store, stored, terms_of

# of what keeps the stream what it is, only a change of dtype is done, as the state has one shape throughout
_CASTS, _COPIES, _RESHAPES = ("to", "float", "type_as"), ("contiguous", "clone"), ("view", "reshape")
SHAPES = ("shape", "size", "ndim", "dim", "device")  # the same for all that is read


@dataclass(frozen=True)
class _Held:
    """What a variable that holds the stream holds.

    Args:
        version: writes before it.
        state: the variable of the rewritten code that has it.
        shape: how a view of it is made: a method, and the variable with its arguments.
    """

    version: int
    state: str
    shape: tuple[str, str] | None = None


class Rewriter:
    """Follows the residual stream through the statements of one forward.

    ``_state{k}`` is the stream after ``k`` writes and ``_x{k}`` what was read from it; a variable of the layer that
    holds the stream is no variable in the rewritten code, only an entry of ``holders``.

    Args:
        owner: what ``self`` is, whose attributes decide the branches; ``None`` for a function.
        function: what to rewrite.
        stream: the parameter that is the stream; by default the first behind ``self``.
        helpers: functions that take a ``residual``, as far as they were looked at already.

    Raises:
        OSError, TypeError, SyntaxError: there is no source.
    """

    def __init__(
        self,
        owner: Any,
        function: Callable,
        stream: str | None = None,
        helpers: dict[tuple[int, Any], Rewriter | None] | None = None,
    ) -> None:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        self._owner, self._globals = owner, function.__globals__
        self._name = function.__name__ if owner is None else type(owner).__name__
        if not isinstance(tree, ast.FunctionDef) or len(tree.args.args) < 2:
            raise self._refusal("its forward does not take the residual stream as its first argument")
        if function.__code__.co_freevars:
            raise self._refusal("its forward calls super() or uses variables of a function around it")
        self.tree = tree
        self._parameter = tree.args.args[1].arg if stream is None else stream
        self._locals = stored([tree]) | {a.arg for a in ast.walk(tree.args) if isinstance(a, ast.arg)}
        self._branches, self._sharing = Branches(owner, tree, self._holds), Sharing(owner)
        self._elsewhere = names_in_other_scopes(tree)
        self._holders: dict[str, _Held] = {}
        self._read: dict[str, int] = {}  # states that were read, and their versions
        self._stale = set[str]()  # variables of which it cannot be told what they hold
        self._version, self._variables, self._shapes, self._conditional = 0, 0, 0, 0
        self._helpers = {} if helpers is None else helpers
        self._doubt = ""
        self._out: list[ast.stmt] = []
        self.returns_tuple = False
        """Whether the stream is the first of several values that it returns."""

    def rewrite(self) -> tuple[list[ast.stmt], int]:
        """The statements of the rewritten function, and how many sums with the stream it had.

        Raises:
            UserError: it does more to the stream than add to it.
        """
        self._hold(self._parameter, _Held(0, "_state0"))
        self._out.append(ast.Assign([store("_state0")], load(self._parameter)))
        if not self._statements(self.tree.body):
            raise self._refusal("it does not return its residual stream")
        if self._version == 0:
            raise self._refusal("no sum with its residual stream was found")
        if self._version in self._read.values():
            raise self._refusal("it uses its residual stream behind the last sum with it")
        return self._out, self._version

    @property
    def absent(self) -> set[str]:
        """The arguments that must be ``None``, as it was assumed."""
        return self._branches.absent

    def read_of(self, version: int) -> str | None:
        """The variable that was read from a version of the stream, if there is just one."""
        states = [state for state, v in self._read.items() if v == version]
        return states[0].replace("_state", "_x") if len(states) == 1 else None

    def only_adds(self) -> bool:
        """Whether it adds to the stream and hands on the sum, and neither reads, scales nor casts it."""
        try:
            self.rewrite()
        except UserError:
            return False
        free = set()
        for node in ast.walk(ast.Module(self._out, [])):
            if isinstance(node, ast.Attribute) and node.attr in (*SHAPES, "dtype"):
                free.add(id(node.value))
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.zeros_like", "_seam.zeros"):
                free |= {id(argument) for argument in node.args}
        uses = [n for n in ast.walk(ast.Module(self._out, [])) if isinstance(n, ast.Name) and n.id.startswith("_x")]
        read = any(isinstance(n.ctx, ast.Load) and id(n) not in free for n in uses)
        return self._variables == 0 and not read and not self.absent

    # statements

    def _statements(self, body: list[ast.stmt]) -> bool:
        """Rewrite; whether the function returned."""
        for original in body:
            if isinstance(original, ast.If) and (known := self._branches.known(original.test)) is not None:
                if self._statements(original.body if known[0] else original.orelse):
                    return True
                continue
            statement = self._branches.visit(deepcopy(original))
            if isinstance(statement, ast.Return):
                self._return(statement)
                return True
            self._statement(statement)
        return False

    def _statement(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            return
        if isinstance(statement, ast.AnnAssign):
            if statement.value is None:
                return
            statement = ast.Assign([statement.target], statement.value)
        match statement:
            case ast.AugAssign(target=ast.Name(id=name)) if name in self._holders or self._holds(statement.value):
                self._change(statement, name)
                return
        if (changed := self._sharing.changed(statement, set(self._holders))) is not None:
            raise self._refusal(f"its residual stream may be changed in place by '{ast.unparse(changed)}'")
        if isinstance(statement, ast.Assign):
            self._assign(statement)
        elif isinstance(statement, ast.Delete):
            names = {t.id for t in statement.targets if isinstance(t, ast.Name)} & self._holders.keys()
            for name in names:
                del self._holders[name]
            kept = [t for t in statement.targets if not (isinstance(t, ast.Name) and t.id in names)]
            self._out += [ast.Delete([self._plain(t) for t in kept])] if kept else []
        elif isinstance(statement, ast.FunctionDef):
            self._out.append(statement)  # names_in_other_scopes keeps the stream out of it
        elif isinstance(statement, ast.Expr | ast.AugAssign | ast.Assert | ast.Raise | ast.Pass):
            self._out.append(self._plain(statement))
        else:
            self._block(statement)

    def _assign(self, statement: ast.Assign) -> None:
        value, targets = statement.value, statement.targets
        names = [t.id for t in targets if isinstance(t, ast.Name)]
        if len(names) == len(targets) and self._holds(value):
            held = self._state(value)
            for name in names:
                self._hold(name, held)
            return
        first = targets[0].elts[0] if isinstance(targets[0], ast.Tuple) and targets[0].elts else None
        residual = self._residual(value, True) if isinstance(value, ast.Call) and len(targets) == 1 else None
        if residual is not None and isinstance(first, ast.Name):
            assert isinstance(value, ast.Call)
            held, call = self._state(residual), self._without_residual(value, residual)
            self._out.append(ast.Assign([self._target(targets[0])], call))
            self._hold(first.id, self._write(held, load(first.id)))
            return
        shared = self._sharing.of(value, set(self._holders))
        plain = self._plain(value)
        self._out.append(ast.Assign([self._target(t) for t in targets], plain))
        for name in stored(targets):
            self._sharing.note(name, shared)

    def _target(self, target: Any) -> Any:
        """A target that is given something else than the stream."""
        for name in stored([target]):
            self._holders.pop(name, None)
            self._stale.discard(name)
            self._sharing.note(name, set())
        return self._plain(target)

    def _change(self, statement: ast.AugAssign, name: str) -> None:
        """``stream += z``, ``stream *= scale`` or ``z += stream``."""
        before, changed = self._holders.get(name), ast.BinOp(load(name), statement.op, statement.value)
        own = self._sharing.of(load(name), set(self._holders))
        if before is None and any(tensor == STREAM or tensor.startswith(ARGUMENT) for tensor in own):
            raise self._refusal(f"its residual stream or an argument is changed in place by '{ast.unparse(statement)}'")
        if not (self._holds(changed) or self._scaled(changed)):
            raise self._refusal(f"its residual stream is changed by '{ast.unparse(statement)}'")
        held = self._state(changed)
        # it happens in place: other names for the same tensor change too, and of views and copies we cannot tell
        self._stale |= self._sharing.names_with(own)
        for other, value in list(self._holders.items()):
            if before is not None and value == before:
                self._holders[other] = held
            elif before is not None and value.version == before.version:
                self._stale.add(other)
        self._hold(name, held)

    def _block(self, block: ast.stmt) -> None:
        """A branch or loop that is decided at run time: the stream may be read in it, not written."""
        self._sharing.add_all(block, set(self._holders))
        for node in ast.walk(block):
            if isinstance(node, ast.Return):
                raise self._refusal("it returns from within a branch that is decided at run time")
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.BinOp) and self._holds(node.value):
                self._doubt = "it adds to its residual stream in a branch that is decided at run time"
        for name in sorted(stored([block]) & self._holders.keys()):
            value = self._read_value(self._holders.pop(name))
            self._sharing.note(name, {STREAM})
            self._out.append(ast.Assign([store(name)], value))
        self._conditional += 1
        self._out.append(self._plain(block))
        self._conditional -= 1

    def _return(self, statement: ast.Return) -> None:
        value = statement.value
        parts = value.elts if isinstance(value, ast.Tuple) else [value]
        if not parts or parts[0] is None or not self._holds(parts[0]):
            raise self._refusal(
                self._doubt or "what it hands on is not its residual stream but something computed from it"
            )
        held = self._state(parts[0])
        if held.version != self._version:
            raise self._refusal("it hands on an older state of its residual stream")
        self.returns_tuple, last = isinstance(value, ast.Tuple), load(held.state)
        rest = [self._plain(part) for part in parts[1:] if part is not None]
        self._out.append(ast.Return(ast.Tuple([last, *rest], ast.Load()) if self.returns_tuple else last))

    # expressions

    def _hold(self, name: str, held: _Held) -> None:
        if name in self._elsewhere:
            raise self._refusal(f"its residual stream has a name, {name!r}, that is bound or used in an inner scope")
        self._holders[name] = held
        self._stale.discard(name)
        self._sharing.note(name, set())

    def _holds(self, node: ast.expr) -> bool:
        """Whether an expression is the residual stream, or the stream with something added."""
        if isinstance(node, ast.Name):
            return node.id in self._holders
        if isinstance(node, ast.Call):
            return self._method_of_stream(node) or self._residual(node, False) is not None
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return any(self._holds(term) or self._scaled(term) for term in terms_of(node))
        return False

    def _method_of_stream(self, node: ast.Call) -> bool:
        f = node.func
        if not isinstance(f, ast.Attribute) or (f.attr in _RESHAPES and node.keywords):
            return False
        return f.attr in (*_CASTS, *_COPIES, *_RESHAPES) and self._holds(f.value)

    def _scaled(self, node: ast.expr) -> bool:
        """``stream * scale`` or ``scale * stream``."""
        if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)):
            return False
        return [isinstance(x, ast.Name) and self._holds(x) for x in (node.left, node.right)].count(True) == 1

    def _state(self, node: ast.expr) -> _Held:
        """Emit what makes an expression that holds the stream."""
        if isinstance(node, ast.Name):
            self._check_fresh(node.id)
            return self._holders[node.id]
        if isinstance(node, ast.Call) and self._method_of_stream(node):
            assert isinstance(node.func, ast.Attribute)
            return self._method(self._state(node.func.value), node.func.attr, node)
        if isinstance(node, ast.Call):
            residual = self._residual(node, False)
            assert residual is not None
            call = self._without_residual(node, residual)
            return self._write(self._state(residual), call)
        assert isinstance(node, ast.BinOp)
        if self._scaled(node):
            stream, factor = (node.left, node.right) if self._holds(node.left) else (node.right, node.left)
            held, factor = self._state(stream), self._plain(factor)
            return self._changed(held, on_seam("scale", load(held.state), factor))
        terms = terms_of(node)
        streams = [term for term in terms if self._holds(term) or self._scaled(term)]
        if len(streams) > 1:
            raise self._refusal(f"it adds its residual stream to itself in '{ast.unparse(node)}'")
        rest = [self._plain(term) for term in terms if term is not streams[0]]
        z = rest[0]
        for term in rest[1:]:
            z = ast.BinOp(z, ast.Add(), term)
        return self._write(self._state(streams[0]), z)

    def _method(self, held: _Held, method: str, node: ast.Call) -> _Held:
        if method in _RESHAPES:
            self._shapes += 1
            name = f"_shape{self._shapes}"
            self._out.append(ast.Assign([store(name)], ast.Tuple([self._plain(a) for a in node.args], ast.Load())))
            return replace(held, shape=(method, name))
        arguments = [self._plain(a) for a in node.args], [self._plain(k) for k in node.keywords]
        return self._changed(held, ast.Call(ast.Attribute(load(held.state), method, ast.Load()), *arguments))

    def _changed(self, held: _Held, value: ast.expr) -> _Held:
        """The same version in a variable of its own: scaled, cast or copied."""
        if self._conditional:
            raise self._refusal("it changes its residual stream in a branch that is decided at run time")
        self._variables += 1
        name = f"_state{held.version}_{self._variables}"
        self._out.append(ast.Assign([store(name)], value))
        return replace(held, state=name)

    def _write(self, held: _Held, z: ast.expr) -> _Held:
        if self._conditional:
            raise self._refusal("it adds to its residual stream in a branch that is decided at run time")
        if held.version != self._version:
            raise self._refusal("it adds to an older state of its residual stream")
        if held.version not in self._read.values():  # what is written was computed from it, if only from its shape
            self._read_value(held)
        if held.shape is not None:
            shape = ast.Attribute(self._read_value(replace(held, shape=None)), "shape", ast.Load())
            z = ast.Call(ast.Attribute(z, "reshape", ast.Load()), [shape], [])
        self._version = held.version + 1
        write = on_seam("write", ast.Constant(held.version), load(held.state), z)
        self._out.append(ast.Assign([store(f"_state{self._version}")], write))
        return _Held(self._version, f"_state{self._version}", held.shape)

    def _read_value(self, held: _Held) -> ast.expr:
        """What was read from the stream, reading it in front of the statement if that was not done yet."""
        x = held.state.replace("_state", "_x")
        if held.state not in self._read:
            self._read[held.state] = held.version
            self._out.append(ast.Assign([store(x)], on_seam("read", ast.Constant(held.version), load(held.state))))
        if held.shape is None:
            return load(x)
        method, arguments = held.shape
        return ast.Call(ast.Attribute(load(x), method, ast.Load()), [ast.Starred(load(arguments), ast.Load())], [])

    def _shape_source(self, held: _Held) -> ast.expr:
        """What has the shape of the stream, without reading anew."""
        state = next(iter(self._read), held.state)
        return self._read_value(_Held(self._read.get(state, held.version), state, held.shape))

    def _plain(self, node: Any) -> Any:
        """A statement or expression that takes what is read from the stream wherever it names the stream."""
        return _Plain(self).visit(deepcopy(node))

    def _check_fresh(self, name: str) -> None:
        if name in self._stale:
            raise self._refusal(f"{name!r} is used after its residual stream was changed in place")

    def _residual(self, call: ast.Call, unpacked: bool) -> ast.expr | None:
        """The stream handed to a function or module as its ``residual``, which it does nothing with but add to."""
        owner, callee = self._callee(call.func)
        if callee is None or any(isinstance(a, ast.Starred) for a in call.args):
            return None
        try:
            names = list(inspect.signature(callee).parameters)
        except (TypeError, ValueError):
            return None
        given = dict(zip(names, call.args, strict=False)) | {k.arg: k.value for k in call.keywords if k.arg}
        residual = given.get("residual")
        if "residual" not in names or residual is None or not self._holds(residual):
            return None
        adder = self._adder(owner, inspect.unwrap(getattr(callee, "__func__", callee)))
        if adder is None:
            self._doubt = f"{ast.unparse(call.func)} does more with the residual stream than add to it"
            return None
        return residual if adder.returns_tuple == unpacked else None

    def _adder(self, owner: Any, function: Any) -> Rewriter | None:
        """A function that only adds to its argument ``residual``, and hands on the sum."""
        key = id(owner), function
        if key not in self._helpers:
            self._helpers[key] = None  # should it call itself
            try:
                helper = Rewriter(owner, function, "residual", self._helpers)
            except (OSError, TypeError, SyntaxError, UserError):
                return None
            self._helpers[key] = helper if helper.only_adds() else None
        return self._helpers[key]

    def _without_residual(self, call: ast.Call, residual: ast.expr) -> ast.expr:
        """The call with zeros in place of the stream: what it would have added."""
        zeros = on_seam("zeros", self._read_value(self._state(residual)))
        return ast.Call(
            call.func,
            [zeros if a is residual else self._plain(a) for a in call.args],
            [ast.keyword(k.arg, zeros if k.value is residual else self._plain(k.value)) for k in call.keywords],
        )

    def _callee(self, func: ast.expr) -> tuple[Any, Any]:
        """What is called, and its ``self``."""
        if isinstance(func, ast.Name) and func.id not in self._locals:
            return None, self._globals.get(func.id)
        if isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name) and func.value.id == "self":
            found = getattr(self._owner, func.attr, None)
            return (found, found.forward) if isinstance(found, nn.Module) else (self._owner, found)
        return None, None

    def _refusal(self, reason: str) -> UserError:
        return UserError(
            f"{self._name} cannot be widened by itself: {reason}; if it is a sum of sublayers all the same, describe "
            f'them with vwn.hf.register_layout("{self._name}", (Sublayer(...), ...)), see docs/layouts.md'
        )


class _Plain(ast.NodeTransformer):
    """Puts what was read from the stream where the stream is named, and a write where a sum with it is nested."""

    def __init__(self, rewriter: Rewriter) -> None:
        self._r = rewriter

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if not isinstance(node.ctx, ast.Load):
            return node
        self._r._check_fresh(node.id)
        return self._r._read_value(self._r._holders[node.id]) if node.id in self._r._holders else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        if isinstance(node.value, ast.Name) and node.value.id in self._r._holders and node.attr in SHAPES:
            self._r._check_fresh(node.value.id)
            return ast.Attribute(self._r._shape_source(self._r._holders[node.value.id]), node.attr, ast.Load())
        self.generic_visit(node)
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        if self._r._holds(node):
            return self._r._read_value(self._r._state(node))
        self.generic_visit(node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        if self._r._residual(node, False) is not None:
            return self._r._read_value(self._r._state(node))
        self.generic_visit(node)
        return node

    def _conditionally(self, node: ast.AST) -> ast.AST:
        """Reads in it are done in any case, and writes are refused."""
        self._r._conditional += 1
        self.generic_visit(node)
        self._r._conditional -= 1
        return node

    visit_IfExp = visit_BoolOp = visit_Compare = visit_ListComp = visit_SetComp = visit_DictComp = _conditionally
    visit_GeneratorExp = visit_Lambda = visit_Assert = _conditionally
