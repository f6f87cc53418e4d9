"""Kernels launch on torch's current device: the guard makes the result's device the current one."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, cast

import torch

Parameters = ParamSpec("Parameters")


def device_guard(op: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """Wrap an op of a backend so that the device of ``out``, its last argument, is current while it runs."""

    @wraps(op)
    def run(*arguments: Parameters.args, **named: Parameters.kwargs) -> None:
        device = cast("Any", arguments[-1]).device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                op(*arguments, **named)
        else:
            op(*arguments, **named)

    return run
