"""Dense memory for kernels that know no strides: elements in storage order, copied only where there are gaps."""

from __future__ import annotations

from torch import Tensor


def storage_order(tensor: Tensor) -> list[int]:
    """Dimensions by descending stride."""
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda d: (-strides[d], d))


def dense(w: Tensor) -> Tensor:
    """The elements of w in any order, one after the other; a copy only where its memory has gaps or repeats."""
    return w if w.is_contiguous() else w.detach().permute(storage_order(w)).contiguous()


def flatten(first: Tensor, *others: Tensor) -> list[Tensor]:
    """Contiguous tensors of matching elements, in the storage order of ``first``.

    Views where a tensor is dense in that order; other layouts are copied once. ``write_back`` completes a ``first``
    that was copied.
    """
    order = storage_order(first)
    return [tensor.detach().permute(order).contiguous() for tensor in (first, *others)]


def write_back(flat: Tensor, out: Tensor) -> None:
    """Copy what was written for ``out`` into it, if flatten had to copy it."""
    if flat.data_ptr() != out.data_ptr():
        out.permute(storage_order(out)).copy_(flat)
