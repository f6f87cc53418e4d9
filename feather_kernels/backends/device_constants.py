"""Small constant tensors that stay on a device, so that only the first training step uploads them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

KEPT = 64  # constants that no CUDA graph has captured


class Upload(NamedTuple):
    """A constant on its device.

    Attributes:
        tensor: the constant.
        stream: on a CUDA device, the stream of its copy from the host.
        end: on a CUDA device, the end of that copy.
    """

    tensor: Tensor
    stream: torch.cuda.Stream | None = None
    end: torch.cuda.Event | None = None


_lock = threading.Lock()
_kept: OrderedDict[Hashable, Upload] = OrderedDict()
_captured: dict[Hashable, Upload] = {}  # graphs hold addresses only, for as long as they live


def device_constant(key: Hashable, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    """Return a constant tensor on a device, uploading it at the first call for its key.

    The host does not wait for the upload; the current stream does, whichever it is. A stream that is being captured
    does not: ``torch.cuda.graph`` waits for the device before.

    Args:
        key: determines the values of the tensor.
        device: where it is kept.
        make: makes the tensor on the CPU.

    Raises:
        RuntimeError: the constant is not on the device yet and the current stream is being captured.
    """
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    with _lock:
        upload = _captured.get((key, device))
        if upload is None:
            upload = _kept.pop((key, device), None)
            if upload is None and capturing:
                raise RuntimeError(
                    "a CUDA graph cannot be captured before the same call has run once (its tables of addresses are "
                    "uploaded then), nor with weights whose layout is not dense (their copies move)"
                )
            if upload is None:
                with torch.inference_mode(False):  # kept for calls in any mode
                    upload = _upload(make(), device)
            (_captured if capturing else _kept)[key, device] = upload
            while len(_kept) > KEPT:
                _kept.popitem(last=False)
    if device.type == "cuda" and not capturing:
        stream = torch.cuda.current_stream(device)
        if upload.end is not None and stream != upload.stream:
            stream.wait_event(upload.end)
        upload.tensor.record_stream(stream)  # if it is dropped, its memory is not reused before the stream is done
    return upload.tensor


def _upload(values: Tensor, device: torch.device) -> Upload:
    if device.type != "cuda":
        return Upload(values.to(device))
    stream = torch.cuda.current_stream(device)
    # torch gives pinned memory to others only when the copies from it have ended
    tensor = values.pin_memory().to(device, non_blocking=True)
    return Upload(tensor, stream, stream.record_event())
