"""torch.compile for the peers."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch

from benchmarks.case import Setting


def bound(function: Callable[..., Any], setting: Setting, compile_it: bool, **constants: Any) -> Callable[..., Any]:
    """``function`` with the keyword arguments bound, as it is or compiled."""
    return compiled(function, setting, **constants) if compile_it else partial(function, **constants)


@lru_cache
def compiled(function: Callable[..., Any], setting: Setting, **constants: Any) -> Callable[..., Any]:
    """``function`` with the keyword arguments bound, compiled by inductor, once for all lengths of flat tensors.

    Bound because inductor makes a slower kernel for a power that it does not know. In a smoke run it is only traced.
    """
    return torch.compile(partial(function, **constants), dynamic=True, backend="eager" if setting.smoke else "inductor")
