"""Weights that are ``torch.distributed.tensor.DTensor``s, told without importing that package."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


def is_dtensor(tensor: Tensor | None) -> bool:
    """Whether this is a DTensor, of which this process may have a part only."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def local_part(tensor: Tensor) -> Tensor:
    """What this process has of a tensor, which is all of it unless it is a DTensor; writing to it writes to that."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        return cast("Any", tensor).to_local()


def computing_device(weight: Tensor) -> torch.device:
    """Where layers compute with a weight: on its device; FSDP2 may keep a DTensor elsewhere than its mesh computes."""
    if not is_dtensor(weight) or weight.device.type == "meta":
        return weight.device
    kind = cast("Any", weight).device_mesh.device_type
    if weight.device.type == kind:
        return weight.device
    return torch.device(kind, torch.get_device_module(kind).current_device())
