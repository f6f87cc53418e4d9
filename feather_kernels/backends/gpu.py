"""What the two GPU backends share: launches on the device of the result, and a probe that launches a kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, cast

import torch
from torch import Tensor

Parameters = ParamSpec("Parameters")


def on_its_device(op: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """``op`` with the device of ``out``, its last argument, as the current one, on which kernels are launched."""

    @wraps(op)
    def run(*arguments: Parameters.args, **named: Parameters.kwargs) -> None:
        device = cast(Any, arguments[-1]).device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                op(*arguments, **named)
        else:
            op(*arguments, **named)

    return run


def launch_problem(
    threshold: Callable[[Tensor, Tensor, float, Tensor], None],
    device: torch.device,
    describe: Callable[[Exception], str],
) -> str | None:
    """None if ``threshold`` launches and gives the right result on ``device``, else the reason why not."""
    if device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("backends are probed by their first op: run a step before a CUDA graph is captured")
    try:
        w = torch.tensor([0.5, 2.0], dtype=torch.float32, device=device)
        t, out = torch.ones((), dtype=torch.float32, device=device), torch.empty_like(w)
        threshold(w, t, 1.0, out)
        result = out.tolist()
    except torch.OutOfMemoryError:  # says nothing on the backend: another process may hold the memory
        raise
    except Exception as error:  # whatever a missing compiler, header, driver or kernel image makes of it
        return f"its probe kernel failed: {describe(error)}"
    return None if result == [0.0, 1.0] else f"its probe kernel gave {result} instead of [0.0, 1.0]"
