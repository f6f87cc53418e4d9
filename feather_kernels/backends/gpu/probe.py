"""The probe of the GPU backends: one launch of a small kernel, whose result is checked."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# in the words of cudaGetErrorString, and the names of the runtime's and the driver's code
OUT_OF_MEMORY = ("out of memory", "cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY")


def probe_by_launch(
    threshold: Callable[[Tensor, Tensor, float, Tensor], None],
    device: torch.device,
    describe: Callable[[Exception], str],
) -> str | None:
    """Return None if an op launches and gives the right result on a device, else the reason why not.

    Errors that say nothing about the backend are raised, so that the next op probes again: an out-of-memory error,
    whoever holds the memory, and an error of an earlier operation.

    Args:
        threshold: the backend's ``threshold``.
        device: where it is launched.
        describe: makes the reason, in one line, of the exception that a launch raised.

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
    """Return whether an error says that the device's memory is used up.

    It is torch's own error, or has the words of CUDA's runtime or driver: loading a module takes memory too, and fails
    with the RuntimeError "Triton Error [CUDA]: out of memory".
    """
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def _raise_earlier_error(device: torch.device) -> None:
    """Wait for the device: CUDA reports the failure of a kernel later, and would report it at the probe."""
    if device.type != "cuda" or not torch.cuda.is_initialized():  # nothing can have run there
        return
    try:
        torch.cuda.synchronize(device)
    except Exception as error:
        raise RuntimeError(
            f"{device} reports an error of an earlier operation, before feather_kernels launches its first kernel "
            f"there: {error}"
        ) from error
