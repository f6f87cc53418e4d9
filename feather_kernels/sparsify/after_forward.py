"""A callback for the end of one forward pass."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import nn


def after_forward(module: nn.Module, callback: Callable[[], None]) -> None:
    """Call ``callback`` once, when the forward that this thread is about to run has ended, with an exception too."""
    owner = threading.get_ident()

    def hook(*_: Any) -> None:
        if threading.get_ident() == owner:
            handle.remove()
            callback()

    handle = module.register_forward_hook(hook, always_call=True)
