"""The layers of docs/design/architecture.md: imports lead downwards, in no circle, and only to public names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[2] / "feather_kernels"
# from top to bottom; a module may import those of its own rank and below
RANKS = {
    "__main__": 7,
    "cli": 6,
    "integrations": 6,
    "sparsify": 5,
    "nn": 4,
    "functional": 3,
    "autograd": 2,
    "ops": 1,
    "backends": 0,
    "checks": 0,
    "dtypes": 0,
    "errors": 0,
    "quantile": 0,
    "torch_private": 0,
    "user_warnings": 0,
    "_version": 0,
}
LEAVES = ("backends", "dtypes", "errors", "_version")  # all that a backend may import
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


class Import(NamedTuple):
    """``from module import name``; ``name`` is "" for ``import module``."""

    module: str
    name: str
    line: int


def imports(path: Path) -> Iterator[Import]:
    """What a file imports of the package, wherever it stands in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: line {node.lineno}: imports are absolute here"
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "feather_kernels":
            yield from (Import(node.module or "", alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.Import):
            names = (alias.name for alias in node.names)
            yield from (Import(name, "", node.lineno) for name in names if name.partition(".")[0] == "feather_kernels")


def dotted(path: Path) -> str:
    """The module of a file."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


NAMES = {dotted(path) for path in MODULES}


def target(imported: Import) -> str:
    """The module that an import loads last."""
    inner = f"{imported.module}.{imported.name}"
    return inner if inner in NAMES else imported.module


def part(module: str) -> str:
    """Its name below the package: "sparsify" for feather_kernels.sparsify.report."""
    return ([*module.split("."), ""])[1]


def test_every_part_has_a_rank() -> None:
    assert {part(dotted(path)) for path in MODULES} == set(RANKS)


def test_the_page_on_architecture_names_every_part() -> None:
    table = (PACKAGE.parent / "docs" / "design" / "architecture.md").read_text().split("The backends:")[0]
    named = {name.removesuffix("/").removesuffix(".py") for name in re.findall(r"`([a-z_]+(?:/|\.py))`", table)}
    assert set(RANKS) - {"__main__", "_version"} <= named


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_lead_downwards(path: Path) -> None:
    own = part(dotted(path))
    for imported in imports(path):
        other = part(target(imported))
        if other:
            assert RANKS[other] <= RANKS[own], f"line {imported.line}: {own} imports {target(imported)}"
            assert own != "backends" or other in LEAVES, f"line {imported.line}: a backend imports {target(imported)}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {dotted(path): {target(imported) for imported in imports(path)} - {dotted(path)} for path in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_names_with_an_underscore_stay_in_their_module(path: Path) -> None:
    for imported in imports(path):
        private = imported.name.startswith("_") and not imported.name.startswith("__")
        assert not private, f"line {imported.line}: imports {imported.name} of {imported.module}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_fit_in_a_head(path: Path) -> None:
    """Docstrings do not count: they are to be complete, and test_docstrings.py says how."""
    source = path.read_text()
    code = source.count("\n")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = (ast.get_docstring(node, clean=False) or "").count("\n")
            code -= docstring
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno - docstring <= 60, f"{path.name}: {node.name}"
    assert code <= 350
