"""The parts of a base model of transformers: where its layers, its final norm and its token embedding are."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from vwn.common.errors import UserError


@dataclass(frozen=True)
class Anatomy:
    """Names of the parts of a base model.

    Args:
        stack_name: path from the model to the module that runs the layers; empty for the model itself.
        layers_name: attribute of the stack that holds the list of layers.
        norm_name: attribute of the stack that holds the norm behind the last layer, or empty.
        embedding_name: path from the model to the token embedding.
    """

    stack_name: str
    layers_name: str
    norm_name: str
    embedding_name: str

    def stack(self, model: nn.Module) -> Any:
        """The module that runs the layers."""
        return model.get_submodule(self.stack_name)

    def layers(self, model: nn.Module) -> Any:
        """The ``nn.ModuleList`` of layers."""
        return getattr(self.stack(model), self.layers_name)

    def take_norm(self, model: nn.Module) -> nn.Module:
        """The final norm, replaced by nothing."""
        if not self.norm_name:
            return nn.Identity()
        stack = self.stack(model)
        norm = getattr(stack, self.norm_name)
        setattr(stack, self.norm_name, nn.Identity())
        return norm

    def take_embedding(self, model: nn.Module) -> Any:
        """The token embedding, of which the model keeps nothing."""
        parent, _, name = self.embedding_name.rpartition(".")
        owner = model.get_submodule(parent)
        table = getattr(owner, name)
        setattr(owner, name, None)
        return table


def find_anatomy(model: Any) -> Anatomy:
    """Find the parts in the source of the model's ``forward`` and of the modules inside it.

    Raises:
        UserError: no loop over a list of layers, more than one, no token embedding, no way to give embeddings, or
            something else than a norm behind the layers.
    """
    name = type(model).__name__
    if "inputs_embeds" not in inspect.signature(model.forward).parameters:
        raise UserError(f"{name} cannot be widened: its forward takes no inputs_embeds")
    table = model.get_input_embeddings()
    embedding = next((path for path, module in model.named_modules() if module is table and path), None)
    if embedding is None or not isinstance(table, nn.Embedding):
        raise UserError(f"{name} cannot be widened: it has no token embedding that could be replaced")
    stacks = []
    for path, module in model.named_modules():
        for layers_name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) and (loop := _loop(module, layers_name)) is not None:
                stacks.append((path, layers_name, loop))
    stacks = [s for s in stacks if not any(_inside(s, other) for other in stacks)]
    if len(stacks) != 1:
        found = ", ".join(f"{path}.{layers}".lstrip(".") for path, layers, _ in stacks) or "none"
        raise UserError(f"{name} cannot be widened: it should run one list of decoder layers, found {found}")
    path, layers_name, called = stacks[0]
    norm_name = called[0] if called else ""
    if norm_name and _calls(model.get_submodule(path), norm_name) > 1:
        raise UserError(f"{name} cannot be widened: it uses its final norm {norm_name!r} elsewhere as well")
    behind = dict.fromkeys(called)
    if len(behind) > 1 or not all(_is_norm(getattr(model.get_submodule(path), n)) for n in behind):
        found = ", ".join(f"{n} ({type(getattr(model.get_submodule(path), n)).__name__})" for n in behind)
        raise UserError(
            f"{name} cannot be widened: behind its last layer should run a norm and nothing else, not {found}"
        )
    return Anatomy(path, layers_name, norm_name, embedding)


def _is_norm(module: nn.Module) -> bool:
    """Return whether a module is called a norm, has no modules inside, and no weights but vectors."""
    named = "norm" in type(module).__name__.lower() or isinstance(module, nn.Identity)
    return named and not any(module.children()) and all(p.ndim == 1 for p in module.parameters())


def _inside(stack: tuple[str, str, list[str]], other: tuple[str, str, list[str]]) -> bool:
    """Return whether a list of modules belongs to a layer of another list, like a layer's experts."""
    prefix = f"{other[0]}.{other[1]}.".lstrip(".")
    return stack[0].startswith(prefix)


def _loop(stack: nn.Module, layers_name: str) -> list[str] | None:
    """The modules called behind the loop over the layers, the final norm; ``None`` without one loop."""
    body = _body(stack)
    if sum(_runs_over(node, layers_name) for statement in body for node in ast.walk(statement)) != 1:
        return None
    for i, statement in enumerate(body):
        if _runs_over(statement, layers_name):
            return _modules(stack, body[i + 1 :])
    return None


def _body(stack: nn.Module) -> list[ast.stmt]:
    try:
        tree: Any = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(type(stack).forward))))
    except (OSError, TypeError, SyntaxError):
        return []
    return getattr(tree.body[0], "body", [])


def _runs_over(node: ast.AST, layers_name: str) -> bool:
    """Return whether a node is a loop over ``self.layers``, also over a slice or ``enumerate`` of it."""
    if not isinstance(node, ast.For):
        return False
    named = (n for n in ast.walk(node.iter) if isinstance(n, ast.Attribute) and n.attr == layers_name)
    return any(isinstance(n.value, ast.Name) and n.value.id == "self" for n in named)


def _calls(stack: nn.Module, name: str) -> int:
    """Count the calls of a module in the stack's forward."""
    nodes = (node for statement in _body(stack) for node in ast.walk(statement))
    return sum(isinstance(n, ast.Call) and ast.unparse(n.func) == f"self.{name}" for n in nodes)


def _modules(stack: nn.Module, statements: list[ast.stmt]) -> list[str]:
    """The modules of the stack that some statements call, in the order in which they run; dropout aside."""
    calls = (n.func for statement in statements for n in _in_order(statement) if isinstance(n, ast.Call))
    of_self = [f.attr for f in calls if isinstance(f, ast.Attribute) and ast.unparse(f.value) == "self"]
    found = [name for name in of_self if isinstance(getattr(stack, name, None), nn.Module)]
    return [name for name in found if not isinstance(getattr(stack, name), nn.Dropout)]


def _in_order(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the parts of an expression before the expression."""
    for child in ast.iter_child_nodes(node):
        yield from _in_order(child)
    yield node
