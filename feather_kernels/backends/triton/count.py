"""Counts the pruned elements of a list of tensors, by one launch for each storage dtype."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from feather_kernels.backends.triton import chunks
from feather_kernels.backends.triton.chunks import launch_chunks, load_chunk, load_magnitudes
from feather_kernels.backends.triton.launch import Kernel
from feather_kernels.backends.triton.math import is_pruned


@Kernel
@triton.jit(do_not_specialize_on_alignment=["chunks", "thresholds", "counts"])
def count_kernel(
    chunks, thresholds, counts, STORED: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr
):
    """Add the number of pruned elements of one chunk to counts (L,), int64; thresholds (L,), exact in DTYPE."""
    address, aligned, elements, _, index = load_chunk(chunks)
    t = tl.load(thresholds + index).to(DTYPE)
    pruned = tl.zeros((BLOCK,), tl.int32)
    for i in range(LOOP):
        w = load_magnitudes(address, aligned, i * BLOCK, elements, STORED, DTYPE, BLOCK)
        pruned += is_pruned(w, t).to(tl.int32)  # NaN, as beyond the end, is not
    tl.atomic_add(counts + index, tl.sum(pruned, 0).to(tl.int64), sem="relaxed")


def count_pruned(weights: Sequence[Tensor], thresholds: Sequence[Tensor], out: Tensor) -> None:
    """Fill ``out`` (L,) with the number of pruned elements of each weight."""
    out.zero_()
    values = torch.stack(list(thresholds))  # float64 where dtypes are mixed
    tables = chunks.make_tables(weights, range(len(weights)))
    launch_chunks(count_kernel, tables, (values.dtype,), values, out)
