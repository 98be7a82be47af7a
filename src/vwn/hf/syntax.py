"""Pieces of Python's syntax that the rewriting of a forward is put together from."""

from __future__ import annotations

import ast
from typing import Any


def terms_of(node: ast.expr) -> list[ast.expr]:
    """The terms of a sum, in order."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [*terms_of(node.left), *terms_of(node.right)]
    return [node]


def stored(nodes: list[Any]) -> set[str]:
    """The variables that are given a value in some statements or targets."""
    found = (n for node in nodes for n in ast.walk(node) if isinstance(n, ast.Name))
    return {n.id for n in found if isinstance(n.ctx, ast.Store | ast.Del)}


def load(name: str) -> ast.Name:
    """A variable that is used."""
    return ast.Name(name, ast.Load())


def store(name: str) -> ast.Name:
    """A variable that is given a value."""
    return ast.Name(name, ast.Store())


def on_seam(method: str, *arguments: ast.expr) -> ast.Call:
    """A call of one of the seam's methods."""
    return ast.Call(ast.Attribute(load("_seam"), method, ast.Load()), list(arguments), [])
