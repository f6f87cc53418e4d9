"""Every name of torch that is not public, or on its way out, and what serves where a version of torch lacks it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad


def _absent(value: int) -> Callable[[], Any]:
    return lambda: value


transforms_active: Callable[[], int] = getattr(torch._C, "_are_functorch_transforms_active", _absent(True))
"""Whether a torch.func transform is running; where torch does not say, always, which costs 15 us a call."""

_graph_task: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", _absent(-1))


def in_backward() -> bool:
    """Whether this thread is inside a backward pass; False where torch does not say."""
    return _graph_task() != -1


def forward_mode_active() -> bool:
    """Whether a level of forward-mode differentiation is open; where torch does not say, always."""
    return getattr(forward_ad, "_current_level", 0) >= 0


tracing: Callable[[], bool] = getattr(torch.jit, "is_tracing", _absent(False))
"""Whether torch.jit.trace, or the ONNX exporter that is built on it, is recording."""
