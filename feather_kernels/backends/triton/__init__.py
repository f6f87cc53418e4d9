"""The Triton backend: NVIDIA GPUs first; CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1), for tests.

Importing it needs triton; the first launch on a device needs a C compiler and Python's headers, which ``probe`` finds
out by one.
"""

from __future__ import annotations

import os

import torch

from feather_kernels.backends.triton.elementwise import scale_pruned_grad, threshold
from feather_kernels.backends.triton.select import count_pruned, magnitude_histogram, magnitude_select

__all__ = [
    "count_pruned",
    "magnitude_histogram",
    "magnitude_select",
    "probe",
    "scale_pruned_grad",
    "threshold",
]


def probe(device: torch.device) -> str | None:
    """None if a kernel compiles, launches and gives the right result on ``device``, else the reason why not."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cpu" and not interpreted:
        return "runs CPU tensors only in the interpreter (TRITON_INTERPRET=1)"
    if device.type not in ("cpu", "cuda"):
        return f"has no support for {device.type} devices"
    try:
        out = torch.empty(2, device=device)
        threshold(torch.tensor([0.5, 2.0], device=device), torch.ones((), device=device), 1.0, out)
    except Exception as error:  # whatever a missing compiler, header or driver makes triton raise
        return f"its probe kernel failed: {type(error).__name__}: {str(error).strip().splitlines()[-1:]}"
    return None if out.tolist() == [0.0, 1.0] else f"its probe kernel gave {out.tolist()} instead of [0.0, 1.0]"
