"""Selection by one read of the weights, given the result of an earlier call as a hint: the usual case in training.

A bracket of consecutive keys lies around the hint. One pass counts the keys below it and, key by key, those inside. If
the wanted ranks fall inside, the counts give the order statistics exactly, and the radix passes that follow exit at
once. A bracket that misses costs time, never correctness. Keys of float64 are too fine for it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from feather_kernels.backends.gpu.chunk_tables import ChunkTable, group_elements
from feather_kernels.backends.interface import Selection
from feather_kernels.backends.triton.chunks import NAN_KEY_32, clamp_nan, key_of, launch_chunks, load_chunk, load_keys
from feather_kernels.backends.triton.launch import Kernel, is_aligned

WIDEST = 1 << 17  # keys: the bracket reaches 0.4 % to 0.8 % of the hint to both sides
NARROWEST = 1 << 10
ELEMENTS_A_KEY = 16  # at least, in a bracket wider than the narrowest: 8 bytes of counts for 16 weights
MOST_GROUPS = 512
ROW = 512  # keys whose counts are summed, so that one program finds its place in two steps


@triton.jit
def bracket_start(value, BINS: tl.constexpr):
    """First key of the bracket around a value (float32), or -1 if the value is NaN, which is in no bracket."""
    key = clamp_nan(key_of(value, tl.float32), tl.float32)
    return tl.where(key == NAN_KEY_32, -1, tl.minimum(tl.maximum(key - BINS // 2, 0), NAN_KEY_32 - BINS))


@Kernel
@triton.jit(do_not_specialize_on_alignment=["chunks", "scales", "hint", "below", "counts"])
def bracket_kernel(
    chunks, scales, hint, below, counts,
    SCALED: tl.constexpr, BINS: tl.constexpr,
    STORED: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    """Count one chunk's keys: those before the bracket in below (G,), those inside in counts (G, BINS); int64.

    hint: (G, 2) float32. Keys that equal the hint are summed first: ties may be many, and atomics on one address are
    slow.
    """
    address, aligned, elements, row, index = load_chunk(chunks)
    value = tl.load(hint + 2 * row)
    start = bracket_start(value, BINS)
    scale = tl.load(scales + index) if SCALED else 1.0
    if start >= 0:
        bins = counts + row * BINS
        center = key_of(value, DTYPE) - start
        less_and_ties = tl.zeros((BLOCK,), tl.int32)  # ties in the upper half: a chunk has fewer than 2^16 elements
        for i in range(LOOP):
            key = load_keys(address, aligned, i * BLOCK, elements, scale, SCALED, STORED, DTYPE, BLOCK)
            place = key - start
            less_and_ties += tl.where(place == center, 1 << 16, (place < 0).to(tl.int32))
            single = (place.to(tl.uint32, bitcast=True) < BINS) & (place != center)
            tl.atomic_add(bins + place, tl.full((BLOCK,), 1, tl.int64), mask=single, sem="relaxed")
        total = tl.sum(less_and_ties, 0)
        tl.atomic_add(below + row, (total & 0xFFFF).to(tl.int64), sem="relaxed")
        tl.atomic_add(bins + center, (total >> 16).to(tl.int64), sem="relaxed")


@Kernel
@triton.jit(do_not_specialize_on_alignment=["sums"])
def sum_kernel(counts, sums, SIZE: tl.constexpr):
    """Each program sums SIZE counts, int64."""
    program = tl.program_id(0).to(tl.int64)
    tl.store(sums + program, tl.sum(tl.load(counts + program * SIZE + tl.arange(0, SIZE)), 0))


@Kernel
@triton.jit(do_not_specialize_on_alignment=["rank", "sizes", "hint", "below", "prefixes", "keys"])
def bracket_finish_kernel(
    rank, sizes, hint, below, counts, sums, prefixes, keys, BINS: tl.constexpr, ROW: tl.constexpr
):
    """Each program stores, if v[rank] and its neighbour are in a group's bracket, their keys and a prefix for "done".

    All int64. rank, sizes (elements of the group), below, prefixes: (G,); counts: (G, BINS); sums: (G, BINS / ROW), of
    ROW counts each; keys: (G, 2).
    """
    group = tl.program_id(0).to(tl.int64)
    wanted, size = tl.load(rank + group), tl.load(sizes + group)
    start = bracket_start(tl.load(hint + 2 * group), BINS)
    before, places = tl.load(below + group), tl.arange(0, ROW)
    ROWS: tl.constexpr = BINS // ROW
    row_sums = tl.load(sums + group * ROWS + tl.arange(0, ROWS))
    through = tl.cumsum(row_sums, 0) + before
    row = tl.sum((through <= wanted).to(tl.int32), 0)
    if (start >= 0) & (wanted >= before) & (row < ROWS):
        before += tl.sum(tl.where(tl.arange(0, ROWS) < row, row_sums, 0), 0)
        found = tl.load(counts + group * BINS + row * ROW + places)
        ends = tl.cumsum(found, 0) + before
        place = tl.sum((ends <= wanted).to(tl.int32), 0)
        at_most = before + tl.sum(tl.where(places <= place, found, 0), 0)
        in_row = tl.sum((ends <= at_most).to(tl.int32), 0)
        next_row = tl.sum((through <= before + tl.sum(found, 0)).to(tl.int32), 0)
        next_counts = tl.load(counts + group * BINS + tl.minimum(next_row, ROWS - 1) * ROW + places)
        in_next_row = tl.sum((tl.cumsum(next_counts, 0) == 0).to(tl.int32), 0)
        same = (wanted + 1 < at_most) | (wanted + 1 >= size)
        here = tl.where(in_row < ROW, row * ROW + in_row, next_row * ROW + in_next_row)
        if same | (in_row < ROW) | (next_row < ROWS):
            key = start + row * ROW + place
            tl.store(keys + 2 * group, key.to(tl.int64))
            tl.store(keys + 2 * group + 1, tl.where(same, key, start + here).to(tl.int64))
            tl.store(prefixes + group, tl.full((), -1, tl.int64))


def bracket_keys(dtype: torch.dtype, group_count: int, elements: int) -> int:
    """Return the number of keys in each group's bracket, a power of two; 0 if keys are too fine or groups too many.

    Args:
        dtype: of the selected values.
        group_count: G.
        elements: of all groups together.
    """
    if dtype != torch.float32 or group_count > MOST_GROUPS:
        return 0
    affordable = max(elements // ELEMENTS_A_KEY // group_count, NARROWEST)
    return min(1 << affordable.bit_length() - 1, WIDEST)


def try_bracket(
    selection: Selection,
    tables: list[ChunkTable],
    bins: int,
    counts: Tensor,
    below: Tensor,
    prefixes: Tensor,
    keys: Tensor,
) -> None:
    """Set the prefix and the keys of each group whose bracket around the hint holds the wanted order statistics.

    Args:
        selection: with a hint, without caps.
        tables: of its weights.
        bins: keys in a bracket, see ``bracket_keys``.
        counts: (G bins,), zeros.
        below: (G,), zeros.
        prefixes: (G,), set to -1 where a group is done.
        keys: (G, 2), set there.
    """
    weights, groups, rank, scales, _, hint = selection
    sizes, scaled = group_elements(weights, groups, rank), scales is not None
    launch_chunks(bracket_kernel, tables, (scaled, bins), scales, hint, below, counts, scaled, bins)
    sums = counts.new_empty(len(counts) // ROW)
    sum_kernel.launch(len(sums), is_aligned(counts), counts, sums, ROW)
    constants = bins, is_aligned(counts), is_aligned(sums)
    bracket_finish_kernel.launch(
        rank.numel(), constants, rank, sizes, hint, below, counts, sums, prefixes, keys, bins, ROW
    )
