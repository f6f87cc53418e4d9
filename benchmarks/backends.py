"""The package's backends, as variants."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch

import feather_kernels as fk
from feather_kernels.backends.registry import registry


def available(device: torch.device) -> list[str]:
    """Names of the backends that run on ``device``, the one that is chosen by default first."""
    names = [registry.chosen_name(device)]
    for name in registry.modules:
        with suppress(fk.BackendUnavailableError), fk.use_backend(name):
            registry.backend_for(device)
            names.append(name)
    return list(dict.fromkeys(names))


def ours(
    device: torch.device, make: Callable[..., Any], only_default: bool = False, suffix: str = ""
) -> dict[str, Callable[..., Any]]:
    """``ours[NAME]`` -> ``make`` with ``backend=NAME``, for the default backend or all that run."""
    names = available(device)[:1] if only_default else available(device)
    return {variant_name(name) + suffix: partial(make, backend=name) for name in names}


def variant_name(backend: str) -> str:
    """How the variants of a backend are called."""
    return f"ours[{backend}]"


def cpp_module() -> Any | None:
    """The module of the C++ backend, or None where that backend does not run."""
    has_cpp = "cpp" in available(torch.device("cpu"))
    return importlib.import_module("feather_kernels._cpu") if has_cpp else None


def use_instruction_set(name: str) -> None:
    """Let the C++ backend run its kernels for this instruction set; raises ValueError if it cannot."""
    module = cpp_module()
    if module is None:
        raise ValueError(f"the C++ backend must run to use {name}: see `python -m feather_kernels`")
    if name not in module.available_instruction_sets():
        raise ValueError(f"instruction set must be one of {', '.join(module.available_instruction_sets())}, got {name}")
    module.use_instruction_set(name)
