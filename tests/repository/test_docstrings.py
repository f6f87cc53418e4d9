"""Public classes and functions: their docstrings describe every parameter, and their examples run as they stand."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import feather_kernels as fk
from feather_kernels.integrations import feather_reference
from feather_kernels.sparsify.policies import Policy

MODULES = (fk, fk.nn, fk.functional, importlib.import_module("feather_kernels.sparsify"), feather_reference)
OTHERS = {"Policy": Policy}  # not exported, but what Sparsifier's documentation leads to


def exported() -> dict[str, Any]:
    named = {name: getattr(module, name) for module in MODULES for name in module.__all__} | OTHERS
    return {name: value for name, value in named.items() if inspect.isclass(value) or inspect.isroutine(value)}


PUBLIC = exported()


def methods() -> dict[str, Callable[..., Any]]:
    """Public methods that a public class has of this package."""
    found: dict[str, Callable[..., Any]] = {}
    for name, value in PUBLIC.items():
        for base in inspect.getmro(value) if inspect.isclass(value) else ():
            if base.__module__.startswith("feather_kernels"):
                own = {key: method for key, method in vars(base).items() if inspect.isfunction(method)}
                found |= {f"{name}.{key}": method for key, method in own.items() if not key.startswith("_")}
    return found


METHODS = methods()


def sections(documented: Any) -> dict[str, str]:
    """The docstring by section: "Args", "Example" and so on; the text before them is ""."""
    parts = re.split(r"^([A-Z][a-z]+)::?$", inspect.cleandoc(documented.__doc__ or ""), flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def described(documented: Any) -> set[str]:
    """Names that have an entry of their own."""
    text = "".join(sections(documented).get(section, "") for section in ("Args", "Attributes"))
    return set(re.findall(r"^    (\w+): ", text, flags=re.MULTILINE))


def parameters(value: Any) -> set[str]:
    variadic = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    found = inspect.signature(value).parameters.values()
    return {parameter.name for parameter in found if parameter.kind not in variadic} - {"self"}


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_parameter_is_described(name: str) -> None:
    value = PUBLIC[name]
    builtin = inspect.isclass(value) and issubclass(value, Exception)  # takes any arguments
    assert builtin or parameters(value) - described(value) == set()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_is_described(name: str) -> None:
    assert sections(METHODS[name])[""].strip(), "no docstring"
    assert parameters(METHODS[name]) - described(METHODS[name]) == set()


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_example_runs_as_it_stands(name: str) -> None:
    example = sections(PUBLIC[name]).get("Example", "")
    test = doctest.DocTestParser().get_doctest(example, {"torch": torch, "nn": nn, "fk": fk}, name, None, None)
    assert test.examples, "no lines that begin with >>>"
    torch.manual_seed(0)
    report: list[str] = []
    failed, _ = doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert failed == 0, "".join(report)
