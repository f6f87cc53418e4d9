"""What the two GPU backends share: launches on the device of the result, and a probe that launches a kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, cast

import torch
from torch import Tensor

Parameters = ParamSpec("Parameters")

# in the words of cudaGetErrorString, and the names of the runtime's and the driver's code
OUT_OF_MEMORY = ("out of memory", "cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY")


def on_its_device(op: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """``op`` with the device of ``out``, its last argument, as the current one, on which kernels are launched."""

    @wraps(op)
    def run(*arguments: Parameters.args, **named: Parameters.kwargs) -> None:
        device = cast("Any", arguments[-1]).device
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
    """None if ``threshold`` launches and gives the right result on ``device``, else the reason why not.

    Errors that say nothing on the backend are raised, so that the next op probes again: memory that is used up, here
    or by another process, and a device that failed before.

    Raises:
        RuntimeError: the current stream is being captured, the device failed before, or has no memory left.
    """
    if device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("backends are probed by their first op: run a step before a CUDA graph is captured")
    _raise_earlier_error(device)
    try:
        w = torch.tensor([0.5, 2.0], dtype=torch.float32, device=device)
        t, out = torch.ones((), dtype=torch.float32, device=device), torch.empty_like(w)
        threshold(w, t, 1.0, out)
        result = out.tolist()
    except Exception as error:  # whatever a missing compiler, header, driver or kernel image makes of it
        if is_out_of_memory(error):
            raise
        return f"its probe kernel failed: {describe(error)}"
    return None if result == [0.0, 1.0] else f"its probe kernel gave {result} instead of [0.0, 1.0]"


def is_out_of_memory(error: Exception) -> bool:
    """Whether the device's memory was used up: torch's own error, or in the words of CUDA's runtime or driver.

    Loading a module takes memory too, and says so as a RuntimeError: "Triton Error [CUDA]: out of memory".
    """
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def _raise_earlier_error(device: torch.device) -> None:
    """Wait for the device: CUDA reports what failed in a kernel later, and would report it at the probe."""
    if device.type != "cuda" or not torch.cuda.is_initialized():  # nothing can have run there
        return
    try:
        torch.cuda.synchronize(device)
    except Exception as error:
        raise RuntimeError(
            f"{device} reports an error of an earlier operation, before feather_kernels launches its first kernel "
            f"there: {error}"
        ) from error
