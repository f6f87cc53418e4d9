"""Dense memory for kernels that take no strides: elements in storage order, copied only where there are gaps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)


def storage_order(tensor: Tensor) -> list[int]:
    """Return the dimensions by descending stride."""
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda d: (-strides[d], d))


def share_memory_format(*tensors: Tensor) -> bool:
    """Return whether all are dense in one of torch's memory formats.

    Then matching elements of tensors of one shape have the same offset.
    """
    for form in FORMATS:  # every op comes here: plain loops
        for tensor in tensors:
            if not tensor.is_contiguous(memory_format=form):
                break
        else:
            return True
    return False


def dense(w: Tensor) -> Tensor:
    """Return the elements of ``w`` without gaps, in any order: ``w`` itself, or a copy if it has gaps or repeats."""
    return w if share_memory_format(w) else w.detach().permute(storage_order(w)).contiguous()


def flatten(first: Tensor, *others: Tensor) -> Sequence[Tensor]:
    """Return tensors whose memory holds matching elements in the storage order of ``first``, without gaps.

    Tensors that share a memory format are returned as they are. Otherwise they become contiguous views, and copies
    where a layout is not dense in that order. ``write_back`` completes a ``first`` that was copied.

    Args:
        first: the result of an op, which gives the order.
        others: tensors of its shape.
    """
    if share_memory_format(first, *others):
        return first, *others
    order = storage_order(first)
    return [tensor.detach().permute(order).contiguous() for tensor in (first, *others)]


def write_back(flat: Tensor, out: Tensor) -> None:
    """Copy ``flat`` into ``out``, if ``flatten`` had to make a copy of it."""
    if flat is not out and flat.data_ptr() != out.data_ptr():
        out.permute(storage_order(out)).copy_(flat)
