"""The Triton backend: NVIDIA GPUs first; CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1), for tests.

Importing it needs triton; the first launch on a device needs a C compiler and Python's headers, which ``probe`` finds
out by one.
"""

from __future__ import annotations

import os
import subprocess
import textwrap
from collections.abc import Callable
from functools import wraps
from math import inf  # the name math is a module of this package
from typing import Any

import torch

from feather_kernels.backends.triton import count, elementwise, radix_passes, select

__all__ = [
    "count_pruned",
    "magnitude_histogram",
    "magnitude_select",
    "probe",
    "scale_pruned_grad",
    "threshold",
]

POWERS = (1.0, 2.0, 3.0, inf)


def on_its_device(op: Callable[..., None]) -> Callable[..., None]:
    """``op`` on the device of ``out``, its last argument: Triton launches on the current device."""

    @wraps(op)
    def run(*arguments: Any) -> None:
        device = arguments[-1].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                op(*arguments)
        else:
            op(*arguments)

    return run


threshold = on_its_device(elementwise.threshold)
scale_pruned_grad = on_its_device(elementwise.scale_pruned_grad)
magnitude_select = on_its_device(select.magnitude_select)
magnitude_histogram = on_its_device(radix_passes.magnitude_histogram)
count_pruned = on_its_device(count.count_pruned)


def probe(device: torch.device) -> str | None:
    """None if a kernel compiles, launches and gives the right result on ``device``, else the reason why not."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cpu" and not interpreted:
        return "runs CPU tensors only in the interpreter (TRITON_INTERPRET=1)"
    if device.type not in ("cpu", "cuda"):
        return f"has no support for {device.type} devices"
    if device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("backends are probed by their first op: run a step before a CUDA graph is captured")
    try:
        w = torch.tensor([0.5, 2.0], dtype=torch.float32, device=device)
        t, out = torch.ones((), dtype=torch.float32, device=device), torch.empty_like(w)
        threshold(w, t, 1.0, out)
        result = out.tolist()
    except torch.OutOfMemoryError:  # says nothing on the backend: another process may hold the memory
        raise
    except Exception as error:  # whatever a missing compiler, header or driver makes triton raise
        return f"its probe kernel failed: {describe(error)}"
    return None if result == [0.0, 1.0] else f"its probe kernel gave {result} instead of [0.0, 1.0]"


def describe(error: Exception) -> str:
    """One line on what stopped a launch."""
    if isinstance(error, subprocess.CalledProcessError):
        program = error.cmd[0] if isinstance(error.cmd, list) else error.cmd
        needs = "Triton needs a C compiler and Python's headers at run time"
        return f"the compiler {program} exited with status {error.returncode}; {needs}"
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300)
