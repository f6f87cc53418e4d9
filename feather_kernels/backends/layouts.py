"""Dense memory for kernels that know no strides: elements in storage order, copied only where there are gaps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)


def storage_order(tensor: Tensor) -> list[int]:
    """Dimensions by descending stride."""
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda d: (-strides[d], d))


def alike(*tensors: Tensor) -> bool:
    """Whether all are dense in one of torch's memory formats: matching elements stand at one place of their memory."""
    for form in FORMATS:  # every op comes here: plain loops
        for tensor in tensors:
            if not tensor.is_contiguous(memory_format=form):
                break
        else:
            return True
    return False


def dense(w: Tensor) -> Tensor:
    """The elements of w in any order, one after the other; a copy only where its memory has gaps or repeats."""
    return w if alike(w) else w.detach().permute(storage_order(w)).contiguous()


def flatten(first: Tensor, *others: Tensor) -> Sequence[Tensor]:
    """Tensors whose memory holds matching elements in the storage order of ``first``, without gaps.

    The tensors themselves where they are ``alike``; else contiguous views, and copies of layouts that are not dense in
    that order. ``write_back`` completes a ``first`` that was copied.
    """
    if alike(first, *others):
        return first, *others
    order = storage_order(first)
    return [tensor.detach().permute(order).contiguous() for tensor in (first, *others)]


def write_back(flat: Tensor, out: Tensor) -> None:
    """Copy what was written for ``out`` into it, if flatten had to copy it."""
    if flat is not out and flat.data_ptr() != out.data_ptr():
        out.permute(storage_order(out)).copy_(flat)
