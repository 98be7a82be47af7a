"""The packages of vwn stand on floors, and no modules import each other in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import vwn

SOURCE = Path(vwn.__file__).parent
# Lowest first. Packages of one floor do not import each other.
FLOORS = (
    {"common"},
    {"ops"},
    {"nn"},
    {"hf"},
    {"cost", "data", "vllm"},
    {"training", "titan"},
    {"lab"},
    {"commands"},
    {"help"},
    {"cli"},
)
FLOOR = {package: floor for floor, packages in enumerate(FLOORS) for package in packages}


def imported_names(nodes: Iterator[ast.AST]) -> set[str]:
    """Dotted names of vwn that the statements import; of ``from a import b``, ``a.b``."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("vwn.")}


def outside_functions(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when a module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from outside_functions(node)


@pytest.mark.parametrize("package", sorted(FLOOR))
def test_a_package_imports_from_the_floors_below_it(package: str) -> None:
    place = SOURCE / package
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    assert files
    wrong = []
    for file in files:
        others = {name.split(".")[1] for name in imported_names(ast.walk(ast.parse(file.read_text())))}
        for other in (others & FLOOR.keys()) - {package}:
            if FLOOR[other] >= FLOOR[package]:
                wrong.append(f"{file.relative_to(SOURCE)} imports vwn.{other}")
    assert not wrong


def test_every_package_stands_on_a_floor() -> None:
    packages = {path.name for path in SOURCE.iterdir() if (path / "__init__.py").exists()}
    assert packages | {"cli", "help"} == FLOOR.keys()


def test_no_modules_import_each_other_in_a_circle() -> None:
    files = {".".join(path.relative_to(SOURCE.parent).with_suffix("").parts): path for path in SOURCE.rglob("*.py")}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    graph = {}
    for name, path in files.items():
        imported = imported_names(outside_functions(ast.parse(path.read_text())))
        modules = {other if other in files else other.rpartition(".")[0] for other in imported}
        graph[name] = (modules & files.keys()) - {name, "vwn"}
    assert any(graph.values())
    TopologicalSorter(graph).prepare()  # raises CycleError and names the circle
