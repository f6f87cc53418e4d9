"""The Triton backend for NVIDIA GPUs; for tests it takes CPU tensors in Triton's interpreter (TRITON_INTERPRET=1).

Importing it needs triton. The first launch on a device needs a C compiler and Python's headers; ``probe`` launches a
kernel to find out whether they are there.
"""

from __future__ import annotations

import os
import subprocess
import textwrap
from typing import TYPE_CHECKING

import triton

from feather_kernels.backends.gpu.device_guard import device_guard
from feather_kernels.backends.gpu.probe import probe_by_launch

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 5):
    raise ImportError(f"its kernels need triton 3.5 (torch 2.9) or newer, and this is {triton.__version__}")

from feather_kernels.backends.triton import count, elementwise, radix, select

if TYPE_CHECKING:
    import torch

__all__ = [
    "POWERS",
    "count_pruned",
    "magnitude_histogram",
    "magnitude_select",
    "probe",
    "scale_pruned_grad",
    "threshold",
]

POWERS = frozenset({1.0, 2.0, 3.0, float("inf")})


threshold = device_guard(elementwise.threshold)
scale_pruned_grad = device_guard(elementwise.scale_pruned_grad)
magnitude_select = device_guard(select.magnitude_select)
magnitude_histogram = device_guard(radix.magnitude_histogram)
count_pruned = device_guard(count.count_pruned)


def probe(device: torch.device) -> str | None:
    """Return None if a kernel compiles, launches and gives the right result on ``device``, else the reason why not."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cpu" and not interpreted:
        return "runs CPU tensors only in the interpreter (TRITON_INTERPRET=1)"
    if device.type not in ("cpu", "cuda"):
        return f"has no support for {device.type} devices"
    return probe_by_launch(threshold, device, describe)


def describe(error: Exception) -> str:
    """Return one line that says what stopped a launch."""
    if isinstance(error, subprocess.CalledProcessError):
        program = error.cmd[0] if isinstance(error.cmd, list) else error.cmd
        needs = "Triton needs a C compiler and Python's headers at run time"
        return f"the compiler {program} exited with status {error.returncode}; {needs}"
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300)
