"""The layers of docs/design: each module imports only what stands below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "feather_kernels"
# from top to bottom; a module may import those of its own rank and below
RANKS = {
    "__main__": 7,
    "cli": 7,
    "doctor": 6,
    "selftest": 6,
    "exact": 0,
    "gpu_report": 6,
    "warmup": 6,
    "integrations": 6,
    "recipes": 6,
    "sparsify": 5,
    "nn": 4,
    "functional": 3,
    "autograd": 2,
    "ops": 1,
    "errors": 0,
    "user_code": 0,
    "backends": 0,
    "_version": 0,
}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def part(dotted: str) -> str | None:
    names = dotted.split(".")
    return names[1] if names[0] == "feather_kernels" and len(names) > 1 else None


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_what_stands_below(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if "." in node.module else [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            other = part(name)
            if other in RANKS:
                assert RANKS[other] <= RANKS[own], f"{own} imports {name}"
                assert own != "backends" or other in ("backends", "_version"), f"a backend imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_fit_in_a_head(path: Path) -> None:
    source = path.read_text()
    assert source.count("\n") <= 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            docstring = ast.get_docstring(node, clean=False) or ""
            assert node.end_lineno - node.lineno - docstring.count("\n") <= 60, f"{path.name}: {node.name}"
