"""Exact selection over a list of tensors; every result stays on the device and nothing is read on the host.

A hint makes one pass over the weights suffice (``bracket.py``), unless it is far off. As the host cannot know, radix
passes (``radix.py``) are launched after it in any case; for groups that are done their programs exit at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from feather_kernels.backends.gpu.chunk_tables import element_count, make_rows
from feather_kernels.backends.interface import Selection
from feather_kernels.backends.triton import chunks
from feather_kernels.backends.triton.bracket import bracket_keys, try_bracket
from feather_kernels.backends.triton.chunks import launch_chunks
from feather_kernels.backends.triton.launch import Kernel
from feather_kernels.backends.triton.radix import DIGIT_BITS, count_digits, scan_kernel, smallest_above_kernel
from feather_kernels.dtypes import KEY_BITS, NAN_KEY

VALUES_BLOCK = 128


@Kernel
@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["keys", "out"])
def value_kernel(keys, out, count, DTYPE: tl.constexpr, NAN_KEY: tl.constexpr, BLOCK: tl.constexpr):
    """Fill out (count,), in DTYPE, with the values of keys, int64."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < count
    key = tl.load(keys + offsets, mask=inside, other=0)
    if DTYPE == tl.float64:
        value = key.to(tl.float64, bitcast=True)
    else:
        value = key.to(tl.int32).to(tl.float32, bitcast=True)
    tl.store(out + offsets, tl.where(key >= NAN_KEY, float("nan"), value), mask=inside)


def magnitude_select(selection: Selection, out: Tensor) -> None:
    """Fill ``out`` (G, 2) with the two order statistics of each group; hints are used in float32 without caps."""
    weights, groups, rank, scales, caps, hint = selection
    group_count, scaled, capped, nan_key = rank.numel(), scales is not None, caps is not None, NAN_KEY[out.dtype]
    rows = make_rows(tuple(groups), group_count, capped, rank.device)
    row_count = len(rows.groups)
    tables = chunks.make_tables(weights, rows.of_tensor)
    hinted = hint is not None and not capped
    bins = bracket_keys(out.dtype, group_count, element_count(weights)) if hinted else 0
    parts = [group_count * bins, 2 * group_count, *[group_count] * 2, *[row_count] * 2, row_count << DIGIT_BITS]
    bracket, keys, bracket_below, sizes, prefixes, below, counts = rank.new_zeros(sum(parts)).split(parts)  # one fill
    if bins:
        try_bracket(selection, tables, bins, bracket, bracket_below, prefixes, keys)
    shift = KEY_BITS[out.dtype]
    while shift:
        first, bits = shift == KEY_BITS[out.dtype], min(DIGIT_BITS, shift)
        shift -= bits
        count_digits(tables, scales, prefixes, shift, bits, counts)
        constants = bits, capped, first, shift == 0, nan_key
        scan_kernel.launch(
            group_count, constants,
            rank, rows.starts, rows.tensors, caps, counts, prefixes, below, sizes, keys, *constants,
        )  # fmt: skip
    launch_chunks(
        smallest_above_kernel, tables, (scaled, nan_key), scales, prefixes, rows.groups, keys, scaled, nan_key
    )
    write_values(keys, out)


def write_values(keys: Tensor, out: Tensor) -> None:
    """Fill ``out`` with the values of int64 keys."""
    dtype = tl.float64 if out.dtype == torch.float64 else tl.float32
    count = out.numel()
    programs = (count + VALUES_BLOCK - 1) // VALUES_BLOCK
    value_kernel.launch(programs, dtype, keys, out, count, dtype, NAN_KEY[out.dtype], VALUES_BLOCK)
