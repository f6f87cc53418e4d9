"""Radix selection on the device, most significant digit first: a histogram pass over all weights, then a small scan.

The algorithm is that of ``backends/radix.py``, which explains keys, rows and caps; the rows of a group are adjacent
here. A row with a negative prefix is done, and programs that work for it exit at once. Counts are integers added
atomically, so results do not depend on the order of programs.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from feather_kernels.backends.gpu.chunk_tables import ChunkTable
from feather_kernels.backends.interface import Histogram
from feather_kernels.backends.triton import chunks
from feather_kernels.backends.triton.chunks import clamp_nan, launch_chunks, load_chunk, load_keys
from feather_kernels.backends.triton.launch import Kernel

DIGIT_BITS = 8  # of one pass, at most: 256 bins stay in registers and shared memory on every version of triton


@Kernel
@triton.jit(do_not_specialize_on_alignment=["chunks", "scales", "prefixes", "counts"])
def histogram_kernel(
    chunks, scales, prefixes, counts,
    SHIFT: tl.constexpr, BITS: tl.constexpr, SCALED: tl.constexpr,
    STORED: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    """Add the digits of one chunk to counts (R, 2^BITS), int64; scales (L,) in DTYPE, prefixes (R,) int64.

    Digits of more than 8 bits are counted in parts of 256 values, each of which reads the chunk again.
    """
    address, aligned, elements, row, index = load_chunk(chunks)
    prefix = tl.load(prefixes + row)
    scale = tl.load(scales + index) if SCALED else 1.0
    BINS: tl.constexpr = 1 << BITS
    PART: tl.constexpr = BINS if BITS < 8 else 256
    PARTS: tl.constexpr = 1 if BITS < 8 else BINS // 256
    if prefix >= 0:
        for part in range(PARTS):
            found = tl.zeros((PART,), tl.int32)
            for i in range(LOOP):
                key = load_keys(address, aligned, i * BLOCK, elements, scale, SCALED, STORED, DTYPE, BLOCK)
                key = clamp_nan(key, DTYPE)
                inside = i * BLOCK + tl.arange(0, BLOCK) < elements
                upper = (prefix * PARTS + part).to(key.dtype)
                wanted = inside & ((key >> SHIFT) // PART == upper)
                found += tl.histogram(((key >> SHIFT) & (PART - 1)).to(tl.int32), PART, mask=wanted)
            bins = counts + row * BINS + part * PART + tl.arange(0, PART)
            tl.atomic_add(bins, found.to(tl.int64), mask=found > 0, sem="relaxed")


@Kernel
@triton.jit(
    do_not_specialize_on_alignment=[
        *("rank", "row_starts", "tensor_of_row", "caps", "counts", "prefixes", "below", "sizes", "keys")
    ]
)
def scan_kernel(
    rank, row_starts, tensor_of_row, caps, counts, prefixes, below, sizes, keys,
    BITS: tl.constexpr, CAPPED: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, NAN_KEY: tl.constexpr,
):  # fmt: skip
    """Each program finds the digit of a group's rank from the counts (R, 2^BITS) of its rows, and zeroes these.

    All int64. prefixes, below (R,): extended by the digit. sizes (G,): set by the first pass. keys (G, 2): set by the
    last; where the neighbour lies under another prefix its place holds NAN_KEY and prefixes keep the whole key.
    """
    group = tl.program_id(0).to(tl.int64)
    wanted = tl.load(rank + group)
    start, stop = tl.load(row_starts + group), tl.load(row_starts + group + 1)
    prefix = tl.load(prefixes + start, mask=start < stop, other=0)
    BINS: tl.constexpr = 1 << BITS
    bins = tl.arange(0, BINS)
    if prefix >= 0:
        total = tl.zeros((BINS,), tl.int64)
        for row in range(start, stop):
            total += capped_counts(row, tensor_of_row, caps, counts, below, CAPPED, BINS)
        digit = tl.sum((total <= wanted).to(tl.int32), 0).to(tl.int64)
        known = (wanted >= 0) & (digit < BINS)
        if FIRST:
            size = tl.max(total, 0)
            tl.store(sizes + group, size)
        else:
            size = tl.load(sizes + group)
        extended = (prefix << BITS) | digit
        if LAST:
            at_most = tl.sum(tl.where(bins == digit, total, 0), 0)
            following = tl.sum((total <= at_most).to(tl.int32), 0).to(tl.int64)
            same = (wanted + 1 < at_most) | (wanted + 1 >= size)
            here = following < BINS
            tl.store(keys + 2 * group, tl.where(known, extended, NAN_KEY))
            upper = tl.where(here, (prefix << BITS) | following, NAN_KEY)
            tl.store(keys + 2 * group + 1, tl.where(known & same, extended, tl.where(known, upper, NAN_KEY)))
            known &= (same | here) == 0
        elif known == 0:
            tl.store(keys + 2 * group, NAN_KEY)
            tl.store(keys + 2 * group + 1, NAN_KEY)
        for row in range(start, stop):
            found = tl.load(counts + row * BINS + bins)
            before = tl.load(below + row) + tl.sum(tl.where(bins < digit, found, 0), 0)
            open_row = known
            if LAST and CAPPED:
                through = before + tl.sum(tl.where(bins == digit, found, 0), 0)
                open_row &= through < tl.load(caps + tl.load(tensor_of_row + row))
            tl.store(below + row, before)
            tl.store(prefixes + row, tl.where(open_row, extended, -1))
            tl.store(counts + row * BINS + bins, tl.zeros((BINS,), tl.int64))


@triton.jit
def capped_counts(row, tensor_of_row, caps, counts, below, CAPPED: tl.constexpr, BINS: tl.constexpr):
    """(BINS,): how many of a row's keys are below the end of each bin, at most its cap."""
    total = tl.cumsum(tl.load(counts + row * BINS + tl.arange(0, BINS)), 0) + tl.load(below + row)
    if CAPPED:
        total = tl.minimum(total, tl.load(caps + tl.load(tensor_of_row + row)))
    return total


@Kernel
@triton.jit(do_not_specialize_on_alignment=["chunks", "scales", "bounds", "group_of_row", "keys"])
def smallest_above_kernel(
    chunks, scales, bounds, group_of_row, keys,
    SCALED: tl.constexpr, NAN_KEY: tl.constexpr,
    STORED: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    """Lower the second of keys (G, 2), int64, to the smallest key of one chunk that is above bounds (R,)."""
    address, aligned, elements, row, index = load_chunk(chunks)
    bound = tl.load(bounds + row)
    scale = tl.load(scales + index) if SCALED else 1.0
    if bound >= 0:
        least = tl.full((BLOCK,), NAN_KEY, tl.int64)
        for i in range(LOOP):
            key = load_keys(address, aligned, i * BLOCK, elements, scale, SCALED, STORED, DTYPE, BLOCK)
            least = tl.minimum(least, tl.where(key > bound, key.to(tl.int64), NAN_KEY))
        tl.atomic_min(keys + 2 * tl.load(group_of_row + row) + 1, tl.min(least, 0), sem="relaxed")


def magnitude_histogram(histogram: Histogram, out: Tensor) -> None:
    """Fill ``out`` (G, 2^bits) with the counts of one radix pass."""
    weights, groups, prefix, shift, bits, scales = histogram
    out.zero_()
    count_digits(chunks.make_tables(weights, groups), scales, prefix, shift, bits, out)


def count_digits(
    tables: Sequence[ChunkTable], scales: Tensor | None, prefixes: Tensor, shift: int, bits: int, counts: Tensor
) -> None:
    """Launch the histogram pass; its parameters are those of ``histogram_kernel``."""
    constants = shift, bits, scales is not None
    launch_chunks(histogram_kernel, tables, constants, scales, prefixes, counts, *constants)
