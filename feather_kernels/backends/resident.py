"""Small constant tensors that stay on a device, so that a training step uploads nothing after its first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

KEPT = 64  # of those that no CUDA graph has captured

_lock = threading.Lock()
_kept: OrderedDict[Hashable, Tensor] = OrderedDict()
_captured: dict[Hashable, Tensor] = {}  # graphs hold addresses only, for as long as they live


def resident(key: Hashable, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    """The tensor ``make()`` on the device; made and uploaded once for each key, which must say what stands in it.

    The upload is complete when this returns, so every stream may read it.

    Raises:
        RuntimeError: it is not there yet and the current stream is being captured.
    """
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    with _lock:
        tensor = _captured.get((key, device))
        if tensor is None:
            tensor = _kept.pop((key, device), None)
            if tensor is None and capturing:
                raise RuntimeError(
                    "a CUDA graph cannot be captured before the same call has run once (its tables of addresses are "
                    "uploaded then), nor with weights whose layout is not dense (their copies move)"
                )
            if tensor is None:
                with torch.inference_mode(False):  # it is kept for calls in any mode
                    tensor = make().to(device)
            (_captured if capturing else _kept)[key, device] = tensor
            while len(_kept) > KEPT:
                _kept.popitem(last=False)
    if device.type == "cuda" and not capturing:
        tensor.record_stream(torch.cuda.current_stream(device))  # before its memory is used again, if it is let go
    return tensor
